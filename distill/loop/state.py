"""Training state as plain tensors, whatever shards it.

Under FSDP2 parameters, moments and averages are DTensors. Files hold them whole, so that a run may go on with another
number of processes, or sharded in another way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def gather(tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Whole copies in the CPU's memory, on the processes that keep them; all processes call it."""
    gathered = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            gathered[name] = whole.detach().to("cpu", copy=True).contiguous()
    return gathered


@torch.no_grad()
def restore(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Copy whole tensors into tensors that may be sharded; all processes call it.

    Raises ValueError where names or shapes differ.
    """
    if tensors.keys() != state.keys():
        differing = sorted(tensors.keys() ^ state.keys())
        raise ValueError(f"the state is of another network: {', '.join(differing[:3])} are in one and not in the other")
    for name, tensor in tensors.items():
        whole = state[name]
        if whole.shape != tensor.shape:
            raise ValueError(f"the state is of another network: {name} is {[*whole.shape]}, not {[*tensor.shape]}")
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
        tensor.copy_(whole)


def trained_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that learn, by name, and the buffers; what is frozen is found where it came from."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def adam_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Adam's moments and step counts by "parameter.moment"; those of a step that is still to come are zero."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trained_parameters(network).items():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        tensors |= {f"{name}.{key}": state[key] for key in ("step", *MOMENTS)}
    return tensors

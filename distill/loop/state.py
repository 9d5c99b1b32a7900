"""Training state as plain tensors, whatever shards it.

Under FSDP2 parameters, moments and averages are DTensors. Files hold them whole, so that a run may go on with another
number of processes, or sharded in another way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def gather(tensors: dict[str, torch.Tensor], kept: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Whole copies in the CPU's memory of the tensors that this process keeps, or of all; all processes call it."""
    gathered = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if kept is None or name in kept:
            gathered[name] = whole.detach().to("cpu", copy=True).contiguous()
    return gathered


def kept_by(process: int, num_processes: int, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """The names of the tensors that a process keeps, so that all keep about as many bytes: the largest go first."""
    sizes, kept = [0] * num_processes, set()
    for name in sorted(tensors, key=lambda name: (-tensors[name].numel(), name)):
        keeper = min(range(num_processes), key=sizes.__getitem__)
        sizes[keeper] += tensors[name].nbytes
        if keeper == process:
            kept.add(name)
    return kept


def save_share(
    name: str, tensors: dict[str, torch.Tensor], process: int, num_processes: int, folder: Path
) -> Path | None:
    """Write the tensors that one of the processes keeps, if it keeps any, into a file of its own, and return it."""
    suffix = "" if num_processes == 1 else f"-{process:05d}-of-{num_processes:05d}"
    path = folder / f"{name}{suffix}.safetensors"
    if not tensors:
        return None
    save_file(tensors, path)
    return path


class SavedTensors:
    """What processes saved under one name in a folder, in one file or in many, read when it is asked for."""

    def __init__(self, folder: Path, name: str):
        paths = [*folder.glob(f"{name}.safetensors"), *folder.glob(f"{name}-*-of-*.safetensors")]
        self._files: dict[str, Any] = {}
        for path in paths:
            file: Any = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def keys(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> list[int]:
        return self._files[name].get_slice(name).get_shape()

    def read(self, name: str, part: tuple[slice, ...] = ()) -> torch.Tensor:
        """The whole tensor, or a part of it."""
        file = self._files[name]
        return file.get_slice(name)[part] if part else file.get_tensor(name)


@torch.no_grad()
def restore(tensors: Mapping[str, torch.Tensor], saved: SavedTensors) -> None:
    """Copy what was saved into tensors, of those that are sharded their own part alone.

    Raises ValueError where names or shapes differ.
    """
    if tensors.keys() != saved.keys():
        differing = sorted(tensors.keys() ^ saved.keys())
        raise ValueError(f"the state is of another network: {', '.join(differing[:3])} are in one and not in the other")
    for name, tensor in tensors.items():
        if saved.shape(name) != [*tensor.shape]:
            raise ValueError(f"the state is of another network: {name} is {saved.shape(name)}, not {[*tensor.shape]}")
        if isinstance(tensor, DTensor):
            shape, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            part = tuple(slice(start, start + size) for start, size in zip(first, shape, strict=True))
            tensor.to_local().copy_(saved.read(name, part))
        else:
            tensor.copy_(saved.read(name))


def reshard(network: nn.Module) -> None:
    """Let go of weights that FSDP2 gathered for a forward that no backward followed."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_parts(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """What of tensors that may be sharded lies on this process: plain tensors, which torch works on many at a time.

    Those of parameters require gradients as these do, and have to: what does not, an `EMAModel` copies.
    """
    assert torch.is_grad_enabled()
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def shards_like(tensors: list[torch.Tensor], parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Parts as what they are: shards of whole tensors that are sharded as these."""
    return [
        DTensor.from_local(
            part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
        if isinstance(tensor, DTensor)
        else part
        for tensor, part in zip(tensors, parts, strict=True)
    ]


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

"""A GPU that is not there: tensors that say they are on `cuda:0`, while what they hold is on the CPU.

What a GPU's user does wrong and a CPU does not notice is an error here: tensors of both in one operation, and, where it
is forbidden, a number read from the device or a copy to it that the host waits for. All but the backward pass runs,
which torch does not start on a device that is not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda:0")
aten = torch.ops.aten
MOVES = (aten._to_copy, aten.copy_, aten.lift_fresh)
READS = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select, aten.bincount)


class HostWait(RuntimeError):
    """The host would wait for the device."""


class MixedDevices(RuntimeError):
    """An operation on tensors of the CPU and of the device."""


class There(torch.Tensor):
    """A tensor of the device; `held` is what it is."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        shape = torch.empty_strided(held.size(), held.stride(), dtype=held.dtype, device="meta")
        return torch.Tensor._make_subclass(cls, shape, False, dispatch_device=True, device_for_backend_keys=DEVICE)

    def __init__(self, held: torch.Tensor):
        self.held = held

    @property
    def device(self) -> torch.device:
        return DEVICE

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return FakeGPU.compute(function, args, kwargs or {})

    def __repr__(self):
        return f"There({self.held})"


class FakeGPU(TorchDispatchMode):
    """Real tensors stay where they are; `.to("cuda")`, and `device="cuda"`, give those of the device."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # or torch would look for the driver before it comes here

    def __init__(self) -> None:
        super().__init__()
        torch._C._ensureCUDADeviceGuardSet()  # one that asks no driver
        self.may_wait = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket is aten._pin_memory:
            return args[0]
        if not self.may_wait and self.waits(function, args, kwargs):
            raise HostWait(f"{function} of {tree_map(_described, args)}")
        return self.compute(function, args, kwargs)

    @staticmethod
    def compute(function, args, kwargs):
        if function is torch.ops.prim.device.default:
            return args[0].device
        target = kwargs.get("device")
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        is_there = any(isinstance(tensor, There) for tensor in tensors)
        mixed = is_there and any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors)
        if mixed and function.overloadpacket not in MOVES:
            raise MixedDevices(f"{function} of {tree_map(_described, args)}")
        if target is not None:
            is_there, kwargs = torch.device(target).type == "cuda", kwargs | {"device": torch.device("cpu")}
        if function.overloadpacket is aten.copy_:
            is_there = isinstance(args[0], There)
        held = tree_map(lambda value: value.held if isinstance(value, There) else value, (args, kwargs))
        result = function(*held[0], **held[1])
        if not is_there:
            return result
        same = {
            id(tensor.held): tensor for tensor in tensors if isinstance(tensor, There)
        }  # what was worked on in place

        def brought(value):
            if not isinstance(value, torch.Tensor):
                return value
            return same[id(value)] if id(value) in same else There(value)

        return tree_map(brought, result)

    @staticmethod
    def waits(function, args, kwargs) -> bool:
        """Whether the host waits for the device: for a number, a copy from it, or one to it that is in step."""
        if function.overloadpacket is aten._to_copy:
            target = torch.device(kwargs.get("device") or args[0].device)
            return target.type != args[0].device.type and not (kwargs.get("non_blocking") and target.type == "cuda")
        if function.overloadpacket is aten.copy_:
            return args[0].device.type != args[1].device.type and not (len(args) > 2 and args[2])
        is_there = any(isinstance(value, There) for value in tree_flatten(args)[0])
        masks = any(isinstance(value, There) and value.dtype == torch.bool for value in tree_flatten(args[1:])[0])
        if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            return masks
        return is_there and function.overloadpacket in READS

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        self.may_wait = False
        try:
            yield
        finally:
            self.may_wait = True


@pytest.fixture
def gpu(monkeypatch):
    """With autocast as on a GPU, and modules whose `.to` takes tensors of another class."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments: True)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # the CPU has none of its operations
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    with FakeGPU() as gpu:
        yield gpu
    torch.__future__.set_swap_module_params_on_conversion(before)


def _described(value):
    return (tuple(value.shape), value.dtype, value.device.type) if isinstance(value, torch.Tensor) else value

"""What memory training and sampling take at the sizes of released teachers, worked out on a machine without a GPU.

The project's own loop, methods and pipelines run on tensors that have shapes and no contents, and the bytes of all that
live at once are counted. Not seen are: what a kernel takes for itself while it runs, what the allocator keeps and
cannot use, the context of CUDA (about half a GiB) and the larger pieces that `divergence_gradient` works in on a GPU
(0.4 GiB at most). All tokens count as masked, which is the most that a step can meet.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from distill.benchmark.step import PeakMemory
from distill.config import load_config
from distill.jobs.student import TEACHER_DTYPES, StudentJob, learner_of
from distill.loop.state import adam_state, trained_parameters
from distill.loop.trainer import Trainer
from distill.methods import METHODS
from students.adapters import merged
from students.initialisation import TokenInitialiser
from students.pipeline import OneStepPipeline
from teachers.conditions.condition import ClassCondition, Condition, TextCondition
from teachers.cost import NUM_TEXT_TOKENS
from teachers.pipeline import MaskedDiffusionPipeline, TokenPipeline
from teachers.released.sizes import random_components

aten = torch.ops.aten

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {  # a configuration, and the samples that a card works on at a time
    "maskgit-256": (CONFIGS / "imagenet256" / "maskgit.yaml", 64),
    "amused-512": (CONFIGS / "amused" / "student.yaml", 16),
    "meissonic-1024": (CONFIGS / "meissonic" / "student.yaml", 2),
}
NUM_CARDS = (1, 8, 32)  # that what is sharded is divided over
CARD = 79.0  # GiB of a card of 80 GB
EVALUATION_TOKENS = 2**16  # of a batch on a GPU, as eval/evaluate.py generates them
NUM_SAMPLES = 8  # of a user's batch
MAX_READ = 64  # no code reads longer lists of numbers
WHOLE, SHARDED, CAST = "whole", "sharded", "cast"


class Hollow(TorchDispatchMode):
    """Tensors made within it are of the CPU, with shapes and no contents: no operation is computed, no memory touched.

    A number that is read is 1, a list of numbers zeros, and every entry of a mask is True.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs, schema = dict(kwargs or {}), function._schema
        if function is aten._local_scalar_dense.default:
            return 1
        if function is aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        if function.is_view or function is aten._unsafe_view.default or function.namespace == "profiler":
            return function(*args, **kwargs)
        if schema.is_mutable:
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
            written = [given[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            assert len(schema.returns) in (0, len(written))
            return None if not schema.returns else written[0] if len(written) == 1 else tuple(written)
        if function is aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _as_positions(index)])
        leaves, structure = tree_flatten((args, kwargs))
        shapes = [_shape(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return tree_map_only(_Shape, _hollow, _result(function, structure, *shapes))


@dataclass(frozen=True)
class _Shape:
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _shape(tensor: torch.Tensor) -> _Shape:
    return _Shape(tensor.size(), tensor.stride(), tensor.dtype)


def _hollow(shape: _Shape) -> torch.Tensor:
    tensor = torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype)
    return tensor.zero_() if tensor.numel() <= MAX_READ else tensor


@lru_cache(maxsize=None, typed=True)  # most calls are of the layers, which are alike
def _result(function: Any, structure: Any, *leaves: Any) -> Any:
    """What an operation gives, in place of tensors their shapes."""
    tensors = (_on_meta(leaf) if isinstance(leaf, _Shape) else leaf for leaf in leaves)
    args, kwargs = tree_unflatten(tensors, structure)
    if any(argument.name == "device" for argument in function._schema.arguments):
        kwargs["device"] = "meta"
    if "generator" in kwargs:
        kwargs["generator"] = None
    return tree_map_only(torch.Tensor, _shape, function(*args, **kwargs))


def _on_meta(shape: _Shape) -> torch.Tensor:
    return torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta")


def _as_positions(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A boolean index as the positions where it is True, one tensor for each of its dimensions."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]


@contextlib.contextmanager
def gpu_autocast() -> Iterator[None]:
    """Norms in float32, as autocast has them on a GPU and not on a CPU; in the backward pass, too."""
    plain = {name: getattr(F, name) for name in ("layer_norm", "group_norm")}

    def in_float32(function: Callable[..., torch.Tensor], tensor: torch.Tensor, *rest: Any) -> torch.Tensor:
        return function(tensor.float() if torch.is_autocast_enabled("cpu") else tensor, *rest)

    for name, function in plain.items():
        setattr(F, name, partial(in_float32, function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(F, name, function)


class Ledger(PeakMemory):
    """The most bytes that a card holds at once, `peaks`, for each number of cards that what is sharded is divided over.

    What is made of sharded tensors alone is sharded, but for weights that autocast casts: where there are shards, they
    are gathered in that precision.
    """

    def __init__(self, num_cards: Sequence[int] = NUM_CARDS) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.peaks = dict.fromkeys(num_cards, 0.0)
        self._kinds: dict[int, str] = {}
        self._kind = WHOLE

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        kinds = {self._kinds.get(tensor.untyped_storage().data_ptr()) for tensor in inputs}
        self._kind = WHOLE if kinds != {SHARDED} else CAST if function is aten._to_copy.default else SHARDED
        return super().__torch_dispatch__(function, types, args, kwargs)

    def hold(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Count tensors that were made before, or count them as another kind from now on."""
        for tensor in tensors:
            self._kind = kind
            storage = tensor.untyped_storage()
            self._see(storage)
            self._change(storage.data_ptr(), storage.nbytes(), kind)

    def on_each(self, num_cards: int) -> float:
        """Bytes on each of so many cards now."""
        cast = self.bytes[CAST] if num_cards == 1 else 0
        return self.bytes[WHOLE] + self.bytes[SHARDED] / num_cards + cast

    def forget_peaks(self) -> None:
        self.peaks = {num_cards: self.on_each(num_cards) for num_cards in self.peaks}

    def _see(self, storage: torch.UntypedStorage) -> None:
        super()._see(storage)
        address = storage.data_ptr()
        if address in self._known and address not in self._kinds:
            self._change(address, storage.nbytes(), self._kind)
            self.peaks = {number: max(peak, self.on_each(number)) for number, peak in self.peaks.items()}

    def _change(self, address: int, size: int, kind: str) -> None:
        if address in self._kinds:
            self.bytes[self._kinds[address]] -= size
        self._kinds[address] = kind
        self.bytes[kind] += size

    def _forget(self, address: int, size: int) -> None:
        super()._forget(address, size)
        self.bytes[self._kinds.pop(address)] -= size


class Distillation:
    """Training steps of a job on a teacher, and the evaluation of what they make, on hollow tensors."""

    def __init__(self, job: StudentJob, teacher: MaskedDiffusionPipeline, folder: Path):
        self.teacher = teacher
        self.num_evaluated = EVALUATION_TOKENS // teacher.sequence_length
        teacher.denoiser.eval().requires_grad_(False)
        teacher.register_modules(text_encoder=None)  # prompts come encoded
        self.initialiser = TokenInitialiser.for_teacher(teacher, **asdict(job.initial))
        learner = partial(learner_of, job, teacher.denoiser)
        self.method = METHODS[job.method.name](job.method, teacher.denoiser, self.initialiser, learner)
        averaged = copy.deepcopy(merged(self.method.networks[self.method.averaged]))
        self.student = OneStepPipeline(averaged, teacher.tokenizer, self.initialiser)
        TEACHER_DTYPES[job.teacher_dtype](teacher.denoiser)
        accelerator = Accelerator(mixed_precision=job.training.mixed_precision, cpu=True)
        self.trainer = Trainer(job.training, accelerator, self.method, self._draw_condition, folder)
        self.ledger = Ledger()
        self._hold_what_stays()

    def _draw_condition(self, step: int, places: range, generators: list[torch.Generator]) -> Condition:
        return some_condition(self.teacher, len(places))

    def _hold_what_stays(self) -> None:
        frozen = [*self.teacher.denoiser.parameters(), *self.teacher.tokenizer.parameters()]
        for name, network in self.trainer.networks.items():
            self.ledger.hold(network.parameters(), SHARDED)
            self.ledger.hold(adam_state(network, self.trainer.optimizers[name]).values(), SHARDED)
            for parameter in trained_parameters(network).values():
                parameter.register_post_accumulate_grad_hook(self._shard_gradient)
        self.ledger.hold(self.trainer.ema.shadow_params, SHARDED)
        self.ledger.hold([*frozen, *self.initialiser.buffers()], WHOLE)  # adapters lie on the teacher's own weights

    def _shard_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.hold([parameter.grad], SHARDED)

    def training(self) -> dict[str, float]:
        """Bytes of a step whose metrics are asked for, which takes the most."""
        self.ledger.forget_peaks()
        with self.ledger:
            self.trainer.train_step(measured=True)
        return self._by_layout(gathered=True)

    def evaluation(self) -> dict[str, float]:
        """Bytes while the averaged student, which is whole on each card, makes a batch of images."""
        self.ledger.hold(self.student.denoiser.parameters(), WHOLE)
        self.ledger.forget_peaks()
        with self.ledger:
            self.student(condition=some_condition(self.teacher, self.num_evaluated), output_type="pt")
        return self._by_layout(gathered=False)

    def _by_layout(self, gathered: bool) -> dict[str, float]:
        """On one card, with DDP, which keeps copies of gradients to send, and with FSDP2 on several cards."""
        networks, peaks = self.trainer.networks.values(), self.ledger.peaks
        buckets = sum(parameter.nbytes for network in networks for parameter in trained_parameters(network).values())
        own = {id(parameter) for parameter in self.teacher.denoiser.parameters()}
        shared = sum(p.nbytes for network in networks for p in network.parameters() if id(p) in own)
        whole = max(map(layer_bytes, networks)) + sum(map(root_bytes, networks)) if gathered else 0
        rows = {"one card": peaks[1], "DDP": peaks[1] + buckets}
        for num_cards in NUM_CARDS[1:]:  # each network has shards of its own of weights that adapters lie on
            rows[f"FSDP2, {num_cards} cards"] = peaks[num_cards] + shared / num_cards + whole
        return rows


def layer_bytes(network: Any) -> int:
    """What FSDP2 has of layers beside its shards: two with their weights in half precision, the largest, and the
    gradients of one, as they were computed and in float32 to be added up."""
    layers = [module for module in network.modules() if type(module).__name__ in network._no_split_modules]
    weights = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    gradients = max(sum(parameter.numel() for parameter in trained_parameters(layer).values()) for layer in layers)
    return 2 * 2 * weights + (2 + 4) * gradients


def root_bytes(network: Any) -> int:
    """The weights that are in no layer, in half precision: they stay gathered from the forward to the backward."""
    layers = [module for module in network.modules() if type(module).__name__ in network._no_split_modules]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return sum(2 * parameter.numel() for parameter in network.parameters() if id(parameter) not in inside)


def hollow_teacher(size: str, dtype: torch.dtype = torch.float32) -> MaskedDiffusionPipeline:
    """A teacher of a released size, whose tensors are as those made within `Hollow`."""
    with torch.device("meta"):
        components = random_components(size)
    with Hollow():
        for component in components.values():
            if isinstance(component, nn.Module):
                nn.Module.to(component.to_empty(device="cpu"), dtype)
    return MaskedDiffusionPipeline(**components)


def some_condition(pipeline: TokenPipeline, batch_size: int) -> Condition:
    if pipeline.condition_kind != "text":
        return ClassCondition.none(batch_size)
    width, pooled_width = pipeline.denoiser.text_sizes
    shapes = (NUM_TEXT_TOKENS, width), (pooled_width,), (5,), (NUM_TEXT_TOKENS, width), (pooled_width,)
    return TextCondition(*(torch.empty(batch_size, *shape) for shape in shapes))


def released_job(size: str, settings: Sequence[str] = ()) -> tuple[StudentJob, int]:
    """The job of a size's configuration on one card, and the samples that this works on at a time.

    Of many accumulation steps two are enough: the first leaves gradients, the second meets them.
    """
    path, batch_size = SIZES[size]
    num_parts = min(2, load_config(StudentJob, path).training.gradient_accumulation_steps)
    loop = {"batch_size": num_parts * batch_size, "gradient_accumulation_steps": num_parts, "tracker": "none"}
    overrides = [*(f"training.{key}={value}" for key, value in loop.items()), *settings]
    return load_config(StudentJob, path, overrides), batch_size


def measure_memory(sizes: Iterable[str], adapter_rank: int, teacher_dtype: str) -> list[dict[str, Any]]:
    """The rows of all sizes: training and evaluation, of whole networks and of adapters, with gradient checkpointing
    and without; and sampling."""
    rows = []
    for size in sizes:
        for rank in (0, adapter_rank):
            for checkpointing in (False, True):
                settings = [f"adapter_rank={rank}", f"teacher_dtype={teacher_dtype}"]
                found = measure_training(size, [*settings, f"training.gradient_checkpointing={checkpointing}"])
                rows += found[:1] if checkpointing else found  # an evaluation has nothing to compute again
        rows += measure_sampling(size)
    return rows


def measure_training(size: str, settings: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row for the training step and one for the evaluation, of a size's job with other settings."""
    job, batch_size = released_job(size, settings)
    teacher = hollow_teacher(size)
    with tempfile.TemporaryDirectory() as folder, Hollow(), gpu_autocast():
        run = Distillation(job, teacher, Path(folder))
        step, evaluation = run.training(), run.evaluation()
    learns = f"adapters of rank {job.adapter_rank}" if job.adapter_rank else "all weights"
    recomputed = ", checkpointing" if job.training.gradient_checkpointing else ""
    about = {"size": size, "teacher_dtype": job.teacher_dtype}
    return [
        about | {"what": f"step, {learns}{recomputed}", "batch_size": batch_size, "gib": in_gib(step)},
        about | {"what": f"evaluation, {learns}", "batch_size": run.num_evaluated, "gib": in_gib(evaluation)},
    ]


def measure_sampling(size: str, batch_size: int = NUM_SAMPLES) -> list[dict[str, Any]]:
    """A row for the teacher, guided, and one for the student, in each precision of their weights."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        teacher = hollow_teacher(size, getattr(torch, dtype))
        with Hollow():
            initialiser = TokenInitialiser.for_teacher(teacher, random_tokens="uniform")
            student = OneStepPipeline(teacher.denoiser, teacher.tokenizer, initialiser, teacher.text_encoder)
            for name, pipeline, settings in [("teacher", teacher, {"guidance_scale": 4.0}), ("student", student, {})]:
                modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
                ledger = Ledger((1,))
                ledger.hold((parameter for module in modules for parameter in module.parameters()), WHOLE)
                with ledger:
                    pipeline(condition=some_condition(pipeline, batch_size), output_type="pt", **settings)
                about = {"size": size, "what": f"sampling, {name} in {dtype}", "batch_size": batch_size}
                rows.append(about | {"gib": in_gib({"one card": ledger.peaks[1]})})
    return rows


def in_gib(peaks: dict[str, float]) -> dict[str, float]:
    return {layout: peak / 2**30 for layout, peak in peaks.items()}


def memory_table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, in GiB, with a star where a card of 80 GB has not as much."""
    layouts = list(dict.fromkeys(layout for row in rows for layout in row["gib"]))
    lines = [f"{'':15} {'':50} {'batch':>5}" + "".join(f"{layout:>17}" for layout in layouts)]
    for row in rows:
        peaks = [row["gib"].get(layout) for layout in layouts]
        cells = ["-" if peak is None else f"{peak:.1f}{'*' if peak > CARD else ' '}" for peak in peaks]
        lines.append(f"{row['size']:15} {row['what']:50} {row['batch_size']:5}" + "".join(f"{c:>17}" for c in cells))
    return "\n".join(lines)

"""Random draws, each from an explicit generator.

A generator is one `torch.Generator` for the whole batch, or a list with one per sample (as in diffusers): then
what a sample gets does not depend on the batch, the process or the device that it is computed in.
"""

import hashlib
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

Generators = torch.Generator | list[torch.Generator] | None
GOLDEN_RATIO, MIX = -0x61C8864680B583EB, ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))  # of SplitMix64
CHUNK = 2**20  # numbers worked on at a time: they stay in the caches of a CPU, and small on a GPU


def sample_generators(*key: int | str, places: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per sample, a function of the key (seed, step, ...) and the sample's place."""
    return [torch.Generator().manual_seed(derive_seed(*key, place)) for place in places]


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed; different keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def select_generators(generator: Generators, rows: torch.Tensor) -> Generators:
    """The generators of some samples (rows (R,) int64) of the batch; one that the whole batch shares stays as it is."""
    return [generator[row] for row in rows.tolist()] if isinstance(generator, list) else generator


def check_generators(generator: Any, batch_size: int) -> Generators:
    """What a user gave as generator of so many samples; a ValueError where it is none, or a list that does not fit."""
    several = isinstance(generator, list | tuple)
    for given in generator if several else [generator]:
        if not isinstance(given, torch.Generator) and (several or given is not None):
            raise ValueError(
                f"generator={given!r} is no torch.Generator; torch.Generator().manual_seed(0) is one with a seed. Pass "
                "one for the batch, or a list with one for each sample"
            )
    if several and len(generator) != batch_size:
        raise ValueError(f"got {len(generator)} generators for a batch of {batch_size}; pass one per sample or one")
    return list(generator) if several else generator


def rand(*shape: int, generator: Generators, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform numbers in [0, 1) of the shape, whose first axis is the batch."""
    return _draw(torch.rand, shape, generator, device)


def noise(*shape: int, generator: Generators, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard normal numbers of the shape, whose first axis is the batch, worked out on the device.

    There may be millions of them, for which a GPU would have to wait if they came from generators on the CPU. So these
    give one number for each sample, the seed of SplitMix64 (Steele, Lea and Flood, 2014), whose n-th number is a
    function of the seed and n, the same on every device; Box and Muller's transform makes two normal numbers of each.
    """
    seeds = _draw(partial(torch.randint, 2**63 - 1), shape[:1], generator, device)
    num_drawn = math.prod(shape[1:])
    counter = torch.arange(1, -(-num_drawn // 2) + 1, device=device)
    normal = [
        box_muller(split_mix(some_seeds[:, None], counter))[:, :num_drawn]
        for some_seeds in seeds.split(max(1, CHUNK // (num_drawn + 1)))
    ]
    return torch.cat(normal).view(shape)


def split_mix(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """The numbers (B, N) of SplitMix64, 64 bits each, for seeds (B, 1) and places (N,) from 1 on."""
    bits = counter * GOLDEN_RATIO + seed  # modulo 2^64, as integers do here
    for shift, factor in MIX:
        bits.bitwise_xor_(_shifted(bits, shift)).mul_(factor)
    return bits.bitwise_xor_(_shifted(bits, 31))


def _shifted(bits: torch.Tensor, shift: int) -> torch.Tensor:
    """To the right, with zeros from the left."""
    return (bits >> shift).bitwise_and_(2 ** (64 - shift) - 1)


def box_muller(bits: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers (B, 2 N) of 64 random bits each (B, N): sqrt(-2 log u) (cos 2 pi v, sin 2 pi v)."""
    radius = (_shifted(bits, 32).float().add_(0.5).mul_(2.0**-32)).log_().mul_(-2).sqrt_()
    angle = bits.bitwise_and(2**32 - 1).float().mul_(2 * math.pi * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)


def _draw(function, shape: tuple[int, ...], generator: Generators, device: torch.device | str) -> torch.Tensor:
    if generator is None:
        return function(shape, device=device)
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"got {len(generator)} generators for a batch of {shape[0]}; pass one per sample or one")
        drawn = torch.stack([function(shape[1:], generator=g, device=g.device) for g in generator])
    else:
        drawn = function(shape, generator=generator, device=generator.device)
    return to_device(drawn, torch.device(device))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor there; the way to a GPU does not wait for what the GPU has still to do."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def sample_cumulative(cumulative: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Draw an index from each row of cumulative (unnormalised) probabilities by inverting them.

    cumulative (B, ..., V), non-decreasing along V -> (B, ...) int64; an index of zero probability is never drawn.
    """
    return invert_cumulative(cumulative, rand(*cumulative.shape[:-1], generator=generator, device=cumulative.device))


def invert_cumulative(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The index (...) at which uniform numbers (...) in [0, 1) fall in cumulative probabilities (..., V)."""
    threshold = uniform[..., None].to(cumulative.dtype) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def check_shape(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None:
    """A ValueError for what `shape_logits` cannot shape logits with."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (the most probable tokens) or more, and finite")
    if top_k < 0 or top_k != int(top_k):
        raise ValueError(f"top_k={top_k} must be a whole number, of the most probable tokens to keep; 0 keeps all")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be more than 0 and at most 1, which keeps all tokens")


def shape_logits(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Float32 logits (..., V) of softmax(logits / temperature), cut to the top-k and then the top-p.

    What is cut is -inf. Temperature 0 leaves the most probable token alone; top_k 0 and top_p 1 cut nothing.
    """
    logits = logits.float()
    if temperature == 0:
        return torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0)
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        lowest_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < lowest_kept, -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        # A token goes when those before it hold top_p already, so that the first always stays.
        cut = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(cut.gather(-1, order.argsort(-1)), -torch.inf)
    return logits


def sample_tokens(logits: torch.Tensor, generator: Generators = None, **shape) -> torch.Tensor:
    """Draw a token at every position from logits (B, L, V), shaped as `shape_logits` says -> (B, L) int64.

    Some samples at a time, since what is made of their logits on the way takes several times the memory of these.
    """
    uniform = rand(*logits.shape[:-1], generator=generator, device=logits.device)
    num_samples = max(1, CHUNK // logits[0].numel())
    tokens = []
    for some_logits, some_uniform in zip(logits.split(num_samples), uniform.split(num_samples), strict=True):
        probabilities = shape_logits(some_logits, **shape).softmax(-1)
        # float64: a float32 uniform times a float64 sum stays below the sum, and small probabilities keep their share.
        tokens.append(invert_cumulative(probabilities.cumsum(-1, dtype=torch.float64), some_uniform))
    return torch.cat(tokens)

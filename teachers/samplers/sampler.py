"""What samplers share. Shapes: B batch, R those of it that are not finished, L tokens, V codebook size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers import ConfigMixin, SchedulerMixin
from torch import Tensor

from teachers.corruption import MASK_SCHEDULES, scheduled_mask_ratio
from teachers.guidance import GuidedDenoiser
from teachers.randomness import Generators, invert_cumulative, rand, select_generators

Evaluate = Callable[..., Tensor]


class Sampler(SchedulerMixin, ConfigMixin):
    """How masks become tokens: `tokens = sampler(denoise, tokens, generator=generator)`.

    Its settings are a diffusers config, saved with the pipeline. Guidance, temperature, top-k and top-p are not its
    business: the logits that it sees are those of the distribution that tokens are drawn from.
    """

    def __init_subclass__(cls) -> None:
        if cls.__module__.startswith(f"{__package__}."):
            cls.__module__ = "one_step_mdm.teachers.samplers"  # the name it is saved by, as in `teachers`

    def __call__(
        self,
        denoise: GuidedDenoiser,
        tokens: Tensor,
        *,
        num_inference_steps: int | None = None,
        block_length: int | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Fill in the masked positions of tokens (B, L); the others stay as they are.

        Args:
            denoise: (tokens (R, L), progress, rows (R,)) -> logits (R, L, V).
            num_inference_steps: instead of the sampler's own, if its settings have one; shared out over the blocks.
            block_length: fill so many masked positions from left to right before the next ones (semi-autoregressive);
                default: all at once.
        """
        masked = tokens == denoise.mask_token_id
        num_steps = self.num_steps(num_inference_steps, tokens.shape[1])
        blocks = list(split_blocks(masked, block_length))
        for block in blocks:
            tokens = self.fill(denoise, tokens, block, max(1, num_steps // len(blocks)), generator)
        return tokens

    def num_steps(self, num_inference_steps: int | None, length: int) -> int:
        """The number of steps for images of so many tokens; a ValueError where it makes no sense."""
        raise NotImplementedError

    def fill(
        self, denoise: GuidedDenoiser, tokens: Tensor, block: Tensor, num_steps: int, generator: Generators
    ) -> Tensor:
        """Fill in the `block` (B, L), positions that are all masked, in `num_steps` at most, or as few as they are.

        After each step goes on with what `denoise.end_step` gives for its tokens.
        """
        raise NotImplementedError


class ScheduledSampler(Sampler):
    """A sampler that takes a given number of steps along a mask schedule, each of which reveals a token at least."""

    def num_steps(self, num_inference_steps: int | None, length: int) -> int:
        num_steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        if not 1 <= num_steps <= length or num_steps != int(num_steps):
            raise ValueError(
                f"num_inference_steps={num_steps} must be between 1 and {length}, the number of tokens, and whole: "
                "each step reveals one at least"
            )
        return int(num_steps)


class AdaptiveSampler(Sampler):
    """A sampler that takes as many steps as it finds it needs, for each sample of the batch by itself."""

    def num_steps(self, num_inference_steps: int | None, length: int) -> int:
        if num_inference_steps is not None:
            raise ValueError(f"{type(self).__name__} takes as many steps as it needs; leave out num_inference_steps")
        return length

    def fill(
        self, denoise: GuidedDenoiser, tokens: Tensor, block: Tensor, num_steps: int, generator: Generators
    ) -> Tensor:
        num_positions = block.sum(-1)
        while True:
            masked = block & (tokens == denoise.mask_token_id)
            rows = masked.any(-1).nonzero().squeeze(-1)  # what is finished costs nothing more
            if len(rows) == 0:
                return tokens
            masked = masked[rows]
            progress = 1 - masked.sum(-1) / num_positions[rows]

            def evaluate(tokens: Tensor, among: Tensor | None = None, progress=progress, rows=rows):
                if among is None:
                    return denoise(tokens, progress, rows)
                return denoise(tokens, progress[among], rows[among])

            filled = self.step(evaluate, tokens[rows], masked, select_generators(generator, rows))
            tokens = tokens.index_copy(0, rows, filled)
            left = (block & (tokens == denoise.mask_token_id)).sum(-1).max()  # each step fills in one at least
            tokens = denoise.end_step(tokens, int(left))

    def step(self, evaluate: Evaluate, tokens: Tensor, masked: Tensor, generator: Generators) -> Tensor:
        """Tokens (R, L) with at least one more of the `masked` (R, L) filled in, in each row.

        `evaluate(tokens)` is the denoiser for these rows, `evaluate(tokens[among], among)` for some of them.
        """
        raise NotImplementedError


def split_blocks(masked: Tensor, block_length: int | None) -> Iterator[Tensor]:
    """The masked positions (B, L) from left to right, `block_length` of each row at a time."""
    if block_length is None:
        block_length = masked.shape[1]
    if block_length < 1:
        raise ValueError(f"block_length={block_length} must be at least 1")
    block = (masked.cumsum(-1) - 1) // block_length
    for index in range(-(-int(masked.sum(-1).max()) // block_length)):
        yield masked & (block == index)


def scheduled_num_masked(num_positions: Tensor, schedule: str, step: int, num_steps: int) -> Tensor:
    """How many of the positions (B,) stay masked after a step: as scheduled, rounded down (MaskGIT).

    But each step reveals a token, and leaves one for each step after it.
    """
    left = num_steps - (step + 1)
    scheduled = num_positions * scheduled_mask_ratio(schedule, (step + 1) / num_steps)
    scheduled = (scheduled + 1e-4).floor().long()  # 3 (1 - 1/3) is 2, whatever rounding says
    most = (num_positions - (step + 1)).clamp(min=0)
    return scheduled.clamp(min=left).minimum(most)


def highest(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` (B,) positions of the highest score among those of `among`; all (B, L)."""
    return among & (descending_rank(score, among) < count[:, None])


def descending_rank(score: Tensor, among: Tensor) -> Tensor:
    """The rank (B, L) of each score, 0 the highest; positions outside `among` come after all of it."""
    order = score.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(-1)


def draw(logits: Tensor, masked: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) drawn from logits (B, L, V) where masked, and the probability (B, L) of each; elsewhere 0."""
    uniform = rand(*masked.shape, generator=generator, device=logits.device)
    probabilities = logits[masked].softmax(-1)
    # float64, as in `sample_tokens`.
    drawn = invert_cumulative(probabilities.cumsum(-1, dtype=torch.float64), uniform[masked])
    tokens = torch.zeros_like(masked, dtype=torch.long)
    probability = torch.zeros_like(uniform)
    tokens[masked] = drawn
    probability[masked] = probabilities.gather(-1, drawn[:, None]).squeeze(-1)
    return tokens, probability


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[tokens] (...) for logits (..., V)."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def gumbel_noise(tokens: Tensor, generator: Generators) -> Tensor:
    """Standard Gumbel noise for each of the tokens (B, L)."""
    uniform = rand(*tokens.shape, generator=generator, device=tokens.device)
    return -(-uniform.clamp(min=1e-20).log()).log()


def check_choice(name: str, value: str, known: tuple[str, ...] | dict) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; choose from {', '.join(known)}")


def check_schedule(schedule: str) -> None:
    check_choice("schedule", schedule, MASK_SCHEDULES)


def check_range(name: str, value: float, lowest: float, highest: float = float("inf"), *, above: bool = False) -> None:
    """A ValueError unless lowest <= value <= highest, or lowest < value <= highest with `above`."""
    if not (lowest < value if above else lowest <= value) or value > highest:
        bound = f"more than {lowest:g}" if above else f"at least {lowest:g}"
        bound += f" and at most {highest:g}" if highest < float("inf") else ""
        raise ValueError(f"{name}={value} must be {bound}")

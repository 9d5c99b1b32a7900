"""What happens at the end of each step of a teacher: a progress bar moves, and a callback may change the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

# (pipeline, number of the step, steps that are left at most, tensors by name) -> these tensors, or others for them.
StepCallback = Callable[[Any, int, int, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def callback_inputs(pipeline: Any, callback: StepCallback | None, asked: Sequence[str]) -> list[str]:
    """The names of the tensors that a callback is given: those asked for, or what a class of callbacks names itself."""
    names = list(getattr(callback, "tensor_inputs", asked))
    if unknown := [name for name in names if name not in pipeline._callback_tensor_inputs]:
        known = ", ".join(pipeline._callback_tensor_inputs)
        raise ValueError(f"callback_on_step_end_tensor_inputs={unknown} are not known; choose from {known}")
    return names


class StepEnd:
    """What a sampler calls at the end of each step of one batch: (tokens (B, L), left) -> the tokens to go on with."""

    def __init__(self, pipeline: Any, bar: tqdm, num_steps: int, callback: StepCallback | None, inputs: Sequence[str]):
        self.pipeline, self.bar, self.num_steps = pipeline, bar, num_steps
        self.callback, self.inputs = callback, inputs
        self.num_done = 0

    def __call__(self, tokens: torch.Tensor, left: int) -> torch.Tensor:
        self.bar.update(self.num_steps - left - self.bar.n)  # no step of its own where a sampler leaps
        if self.callback is None:
            return tokens
        returned = self.callback(self.pipeline, self.num_done, left, dict.fromkeys(self.inputs, tokens))
        self.num_done += 1
        if not isinstance(returned, dict):
            raise ValueError(
                f"callback_on_step_end returned {returned!r}; it has to return its callback_kwargs, a dict"
            )
        chosen = returned.get("latents", tokens)
        self.pipeline.check_tokens(chosen, tokens.shape, masks=left > 0)
        return chosen.to(tokens)

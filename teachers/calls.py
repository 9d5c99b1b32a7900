"""What pipelines are asked for, in the words of diffusers' users, as a condition of each image.

Shapes: B prompts, T text tokens, E text width, P pooled width.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from teachers.conditions.condition import ClassCondition, Condition, TextCondition
from teachers.conditions.prompts import encode_prompts, micro_conditions
from teachers.denoiser import ConditionKind, Denoiser
from teachers.opening import SavedPipeline
from teachers.randomness import to_device

Labels = Sequence[int | str] | torch.Tensor | np.ndarray | int | str
Encoded = tuple[torch.Tensor, torch.Tensor]  # states (B, T, E) and pooled embeddings (B, P)


class Given(TypedDict, total=False):
    """What a call may say of its images beside prompts or class labels.

    The embeddings are those of diffusers' aMUSEd: `prompt_embeds` (B, P) is the pooled one, `encoder_hidden_states`
    (B, T, E) are the states of the layer before the last; the `negative_` ones take the place of the negative prompt.
    """

    condition: Condition | None  # what `encode_condition` gave, instead of prompts or class labels
    batch_size: int | None  # of an unconditional model
    num_images_per_prompt: int  # for each prompt, class label or row of a condition; they lie beside each other
    negative_prompt: str | Sequence[str] | None  # one for all prompts, or one for each
    prompt_embeds: torch.Tensor | None
    encoder_hidden_states: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    negative_encoder_hidden_states: torch.Tensor | None


def as_rows(given: Any) -> list[Any]:
    """One prompt or label, or several of them, in whatever holds them."""
    if isinstance(given, torch.Tensor | np.ndarray | np.generic):
        given = given.tolist()
    return [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)


class ConditionedPipeline(SavedPipeline):
    """A pipeline that knows what its denoiser is conditioned on, and what its users call that.

    A denoiser conditioned on text has a text encoder and its tokenizer beside it; they may be left out (None) where all
    conditions come encoded.
    """

    _optional_components: ClassVar = ["text_encoder", "text_tokenizer"]

    denoiser: Denoiser
    tokenizer: Any
    text_encoder: CLIPTextModelWithProjection | None
    text_tokenizer: CLIPTokenizer | None

    @property
    def condition_kind(self) -> ConditionKind:
        """The denoiser's: "classes", "text" or "none"."""
        return self.denoiser.condition_kind

    @property
    def num_classes(self) -> int:
        return self.denoiser.config.num_classes

    @property
    def class_names(self) -> list[str] | None:
        """In the order of their labels; None where classes have no names."""
        names = self.config.get("class_names")
        return None if names is None else [names[str(label)] for label in range(len(names))]

    def _name_classes(self, class_names: Sequence[str] | Mapping[str, str] | None) -> None:
        """Keep the names in the config, by label: a list in an index is a component to diffusers."""
        if not class_names:
            return
        named = class_names.items() if isinstance(class_names, Mapping) else enumerate(class_names)
        names = {str(label): name for label, name in named}
        num_classes = self.num_classes if self.condition_kind == "classes" else 0
        fit = names.keys() == {str(label) for label in range(num_classes)}
        if not fit or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"class_names must be {num_classes} names, one for each class; got {class_names}")
        self.register_to_config(class_names=names)

    def encode_condition(
        self,
        conditions: Sequence[str] | Sequence[None] | Labels,
        negative_prompt: str | Sequence[str] | None = None,
    ) -> Condition:
        """The condition of prompts, of class labels, each in 0 .. num_classes - 1 or a class name, or of as many times
        None.

        The negative prompt (one, or one for each prompt; default: `pipe.config.negative_prompt`) is what guidance leads
        away from.
        """
        rows = as_rows(conditions)
        if self.condition_kind == "text":
            return self._text_condition(rows, None, negative_prompt, None)
        if negative_prompt is not None:
            raise ValueError("got a negative prompt, but this model is not conditioned on text")
        if self.condition_kind == "none":
            if any(row is not None for row in rows):
                raise ValueError(
                    "this model is unconditional: it takes neither class labels nor prompts, only batch_size"
                )
            return ClassCondition.none(len(rows), self._execution_device)
        if not rows:
            raise ValueError("got an empty list of class labels")
        labels = torch.tensor([self._label(row) for row in rows])
        return ClassCondition(to_device(labels, self._execution_device))

    def _label(self, given: Any) -> int:
        """Of a class, of which the label or the name is given."""
        if isinstance(given, str):
            return self._label_of_name(given)
        try:
            label = operator.index(given)
        except TypeError as error:
            raise ValueError(f"class labels must be whole numbers or a list of them, got {given!r}") from error
        if not 0 <= label < self.num_classes:
            raise ValueError(f"class label {label} is out of range: this model knows 0 to {self.num_classes - 1}")
        return label

    def _label_of_name(self, name: str) -> int:
        names = self.class_names
        if names is None:
            raise ValueError(
                f"got {name!r}, but this model takes no prompts: it is conditioned on class labels, which have no "
                "names here; pass integers"
            )
        labels = [label for label, known in enumerate(names) if known == name]
        if len(labels) == 1:
            return labels[0]
        if labels:
            raise ValueError(f"{name!r} is the name of the classes {labels}; pass one of these numbers")
        near = difflib.get_close_matches(name, names, cutoff=0.5) or names[:10]
        raise ValueError(f"{name!r} is no class name of this model; near it, or the first: {', '.join(near)}")

    def _text_condition(
        self,
        prompts: Sequence[str],
        embeds: Encoded | None,
        negative_prompt: str | Sequence[str] | None,
        null: Encoded | None,
    ) -> TextCondition:
        """Of prompts, or of embeddings in place of them, beside the negative prompt's or `null` in place of these."""
        count = len(prompts) if embeds is None else len(embeds[0])
        if count == 0:
            raise ValueError("got an empty list of prompts")
        negatives = [] if null is not None else self._negative_prompts(negative_prompt, count)
        if embeds is None or negatives:
            states, pooled = self._encode([*prompts, *negatives])
            split = len(prompts)
            embeds = embeds or (states[:split], pooled[:split])
            null = (states[split:], pooled[split:]) if negatives else null
        micro = micro_conditions(self.tokenizer.config.image_size, count, self._execution_device)
        if null is None:
            return TextCondition(*embeds, micro)
        if len(null[0]) not in (1, count) or null[0].shape[1] != embeds[0].shape[1]:
            raise ValueError(
                f"negative embeddings of {tuple(null[0].shape[:2])} prompts and tokens are not of one prompt, or of "
                f"each of {tuple(embeds[0].shape[:2])}"
            )
        return TextCondition(*embeds, micro, null[0].expand(count, -1, -1), null[1].expand(count, -1))

    def _negative_prompts(self, given: str | Sequence[str] | None, count: int) -> list[str]:
        """None at all of a one-step student, which knows none, nor where nothing can encode the default."""
        if given is None:
            given = None if self.text_encoder is None else self.config.get("negative_prompt")
        if given is None:
            return []
        if isinstance(given, str):
            return [given]
        if len(given) != count or not all(isinstance(prompt, str) for prompt in given):
            raise ValueError(f"negative_prompt must be text, or {count} of them, one for each prompt; got {given!r}")
        return list(given)

    def _encode(self, prompts: list[str]) -> Encoded:
        if self.text_encoder is None or self.text_tokenizer is None:
            raise ValueError(
                "this pipeline was opened without its text encoder; pass an encoded `condition`, or embeds"
            )
        return encode_prompts(self.text_encoder, self.text_tokenizer, prompts)

    def _embeds(self, pooled: torch.Tensor | None, states: torch.Tensor | None, prefix: str = "") -> Encoded | None:
        """The two embeddings of a call, where it has them."""
        if pooled is None and states is None:
            return None
        if self.condition_kind != "text":
            raise ValueError(f"got {prefix}prompt_embeds, but this model is not conditioned on text")
        if pooled is None or states is None:
            raise ValueError(f"pass both {prefix}prompt_embeds and {prefix}encoder_hidden_states, or neither")
        width, pooled_width = self.denoiser.text_sizes
        if states.shape != (len(pooled), *states.shape[1:2], width) or pooled.shape[1:] != (pooled_width,):
            raise ValueError(
                f"{prefix}prompt_embeds and {prefix}encoder_hidden_states must be (B, {pooled_width}) and "
                f"(B, T, {width}), got {tuple(pooled.shape)} and {tuple(states.shape)}"
            )
        device, dtype = self._execution_device, self.denoiser.dtype
        return states.to(device, dtype), pooled.to(device, dtype)

    def _condition(
        self,
        prompt: Any = None,
        class_labels: Any = None,
        *,
        condition: Condition | None = None,
        batch_size: int | None = None,
        num_images_per_prompt: int | None = 1,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_encoder_hidden_states: torch.Tensor | None = None,
        **unknown: Any,
    ) -> Condition:
        """Of each image of a call: of what was given of the four (the first may be class labels too), or of none."""
        if unknown:
            raise TypeError(
                f"{type(self).__name__} knows no {', '.join(unknown)}; of its images a call may say "
                f"{', '.join(Given.__annotations__)}"
            )
        num_images_per_prompt = 1 if num_images_per_prompt is None else num_images_per_prompt
        if num_images_per_prompt < 1 or num_images_per_prompt != int(num_images_per_prompt):
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt} must be a whole number, at least 1")
        embeds = self._embeds(prompt_embeds, encoder_hidden_states)
        null = self._embeds(negative_prompt_embeds, negative_encoder_hidden_states, "negative_")
        given: list[Any] = [kind for kind in (prompt, class_labels, condition, embeds) if kind is not None]
        if self.condition_kind == "none" and not given:
            found: Condition = self._no_condition(batch_size, negative_prompt)
        elif len(given) != 1 or batch_size is not None:
            raise ValueError(
                "pass one of prompt, class_labels and condition (or embeds); batch_size is of unconditional models"
            )
        elif sum([negative_prompt is not None, null is not None, isinstance(given[0], Condition)]) > 1:
            raise ValueError(
                "got a negative prompt beside its embeddings, or either beside a condition, which has its own"
            )
        elif isinstance(given[0], Condition):
            found = given[0].to(self._execution_device)
        elif embeds is not None or null is not None:
            prompts = [] if embeds is not None else as_rows(given[0])
            found = self._text_condition(prompts, embeds, negative_prompt, null)
        else:
            found = self.encode_condition(given[0], negative_prompt)
        if num_images_per_prompt == 1:
            return found
        return found.select(torch.arange(len(found)).repeat_interleave(int(num_images_per_prompt)))

    def _no_condition(self, batch_size: int | None, negative_prompt: Any) -> Condition:
        batch_size = 1 if batch_size is None else batch_size
        if batch_size < 1 or batch_size != int(batch_size) or negative_prompt is not None:
            raise ValueError(
                f"got batch_size={batch_size} and negative_prompt={negative_prompt!r}; an unconditional model makes "
                "one image or more, and takes no prompt"
            )
        return ClassCondition.none(int(batch_size), self._execution_device)

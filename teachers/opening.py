"""How pipelines of ours are opened from a folder or the hub: nothing but their own parts, and whole."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError

from teachers.component import check_weights

# What components were called in folders of the time when a file's name was part of theirs.
FORMER_NAMES = {
    "teachers.network": "teachers",
    "teachers.halton_network": "teachers",
    "teachers.meissonic_network": "teachers",
    "teachers.amused": "teachers",
    "teachers.tokenizer": "teachers",
    "teachers.vq": "teachers",
    "students.initialisation": "students",
}


class SavedPipeline(DiffusionPipeline):
    """A diffusers pipeline that opens what its constructor's type hints admit, and nothing else."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **settings) -> Self:
        """The pipeline of a folder or hub id; settings are those of diffusers.

        Raises ValueError where it asks for classes that are no part of one or have not been imported, or holds weights
        that are damaged, missing or not finite numbers. Weights are safetensors alone.
        """
        try:
            pipeline = cls._open(name, **{"use_safetensors": True, **settings})
        except SafetensorError as error:
            raise ValueError(f"weights in {name} cannot be read; are they whole? ({error})") from error
        for key, component in pipeline.components.items():
            if isinstance(component, torch.nn.Module) and key not in settings:
                check_weights(component, f"the {key} in {name}")
        return pipeline

    @classmethod
    def _open(cls, name: str | Path, **settings) -> Self:
        cls._check_components(cls.load_config(name))
        return super().from_pretrained(name, **settings)

    @classmethod
    def load_config(cls, name: Any, **settings) -> Any:
        """The index of a folder or hub id, as diffusers reads it, with today's names of the components."""
        loaded = super().load_config(name, **settings)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        for key, entry in index.items():
            if isinstance(entry, list) and entry and str(entry[0]) in FORMER_NAMES:
                index[key] = [FORMER_NAMES[entry[0]], *entry[1:]]
        return loaded

    @classmethod
    def _check_components(cls, index: dict[str, Any]) -> None:
        hints = get_type_hints(cls.__init__)
        for name, entry in index.items():
            if name.startswith("_") or not isinstance(entry, list | tuple) or not any(entry):
                continue
            library, class_name = map(str, entry)
            part = getattr(sys.modules.get(library), class_name, None)  # diffusers would import the library
            if not isinstance(part, type) or not _is_part(part, hints.get(name)):
                raise ValueError(
                    f"model_index.json is refused: it names {library}.{class_name} as the {name}. A network of your "
                    "own has to be imported first, and needs the interface that docs/guide.md says"
                )


def _is_part(part: type, hint: Any) -> bool:
    """Whether a class is what a type hint admits; as denoiser, any network that looks like one."""
    if hint is ModelMixin:
        return issubclass(part, ModelMixin) and hasattr(part, "embedding_parameters")
    return issubclass(part, get_args(hint) or (hint or ()))

"""How pipelines of ours are opened from a folder or the hub, nothing but their own parts, and whole; and saved."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from teachers.component import check_weights
from teachers.custom_code import INSTALLED, is_ours, write_code
from teachers.folder import stamp
from teachers.hub import HUB_SETTINGS, INDEX, KEPT, LICENSE, fetch_components, find_index, has_variant, send

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
logger = logging.getLogger(__name__)

HERE = __name__.removesuffix("teachers.opening")  # what the packages' names begin with in this process
NETWORK_SETTINGS = ("variant", "device_map", "low_cpu_mem_usage")


class SavedPipeline(DiffusionPipeline):
    """A diffusers pipeline that opens what its constructor's type hints admit, and nothing else.

    It opens the components itself: diffusers would run code that lies beside them.
    """

    opened_from: Path | None = None  # the folder, of a hub id its copy here

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **settings
    ) -> Self:
        """The pipeline of a folder or hub id.

        Args:
            subfolder: of the folder or repository, where the pipeline is.
            settings: as in diffusers, for the hub `token`, `revision`, `cache_dir`, `local_files_only` and
                `force_download`; for the networks `torch_dtype` (or `dtype`; default: float32), `variant`,
                `device_map` and `low_cpu_mem_usage`; and arguments of the constructor in place of what was saved.
                `trust_remote_code` changes nothing: no code of the folder is ever run.

        Weights are safetensors alone. Raises FileNotFoundError where there is no pipeline; ValueError where it is of
        another kind, asks for classes that are no part of this one or have not been imported, or has weights that are
        damaged, missing or not finite numbers.
        """
        name = pretrained_model_name_or_path
        settings.pop("trust_remote_code", None)
        hub = {key: settings.pop(key) for key in HUB_SETTINGS if key in settings}
        network = {key: settings.pop(key) for key in NETWORK_SETTINGS if key in settings}
        network["dtype"] = _dtype(settings.pop("dtype", None), settings.pop("torch_dtype", None))
        if not settings.pop("use_safetensors", True):
            raise ValueError("got use_safetensors=False; weights are opened from safetensors alone")
        path = find_index(name, subfolder, **hub)
        index = read_index(path)
        cls._check_index(name, index)
        if not Path(name).is_dir():
            wanted = [key for key in cls._components(index) if key not in settings]
            fetch_components(str(name), path, wanted, network.get("variant"), subfolder, **hub)
        try:
            pipeline = cls._open(path.parent, index, network, **settings)
        except SafetensorError as error:
            raise ValueError(f"weights in {name} cannot be read; are they whole? ({error})") from error
        for key, component in pipeline.components.items():
            if isinstance(component, torch.nn.Module) and key not in settings:
                check_weights(component, f"the {key} in {name}")
        return pipeline

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **hub,
    ) -> None:
        """Save a folder that opens here and, by the code in it, in diffusers itself.

        What the folder that the pipeline was opened from says of it stays: card, pictures, the weights' metadata; not
        where weights were changed since, of which only its LICENSE still holds. With `push_to_hub` the folder is also
        sent to the repository `repo_id` (default: its name), as `push_to_hub` does.
        """
        if not safe_serialization:
            raise ValueError("got safe_serialization=False; weights are saved, and opened, as safetensors alone")
        folder, source = Path(save_directory), self.opened_from
        metadata = {name: _metadata(source / name) for name in self.components} if source else {}
        networks = {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}
        changed = [name for name, part in networks.items() if source and _is_changed(part, source / name)]
        if changed:
            logger.warning(
                "weights have changed since %s was opened (%s): what it says of them is not copied", source, changed
            )
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        for name in (name for name, found in metadata.items() if found and name not in changed):
            stamp(folder / name, metadata[name])
        for name in (LICENSE,) if changed else KEPT:
            if source and (source / name).is_file() and not (folder / name).exists():
                shutil.copyfile(source / name, folder / name)
        write_code(folder, type(self), self._components(json.loads((folder / INDEX).read_text())))
        _forget_where_it_lay(folder)
        if push_to_hub:
            send(folder, hub.pop("repo_id", folder.name), **hub)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """As in diffusers, but with the card of the folder that the pipeline was opened from."""
        hub = {"private": private, "token": token, "create_pr": create_pr, "subfolder": subfolder}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant)
            return send(Path(folder), repo_id, commit_message=commit_message, **hub)

    @classmethod
    def _settings(cls) -> list[str]:
        """The arguments of the constructor that are no components."""
        arguments = inspect.signature(cls).parameters.values()
        optional = [argument.name for argument in arguments if argument.default is not argument.empty]
        return [name for name in optional if name not in cls._optional_components]

    @classmethod
    def _components(cls, index: dict[str, Any]) -> dict[str, list[Any]]:
        """What an index says of each component that is there: the library and the class."""
        settings = cls._settings()
        return {
            name: entry
            for name, entry in index.items()
            if isinstance(entry, list) and any(entry) and not name.startswith("_") and name not in settings
        }

    @classmethod
    def _check_index(cls, name: str | Path, index: dict[str, Any]) -> None:
        """Raise ValueError unless it is of a pipeline of this class, or one of its bases, and of its parts."""
        kind = index.get("_class_name")
        if kind not in [base.__name__ for base in cls.__mro__]:
            raise ValueError(f"{name} holds a {kind}, no {cls.__name__}: open it with {kind}.from_pretrained")
        cls._parts(index)

    @classmethod
    def _parts(cls, index: dict[str, Any]) -> dict[str, type]:
        """The classes that an index names; ValueError unless they are what the constructor's type hints say."""
        hints = get_type_hints(cls.__init__)
        parts = {}
        for name, entry in cls._components(index).items():
            library, _, class_name = (named := ".".join(map(str, entry))).rpartition(".")
            module = sys.modules.get(HERE + library if is_ours(library) else library)  # nothing is imported for it
            part = getattr(module, class_name, None)
            if not isinstance(part, type) or not _is_part(part, hints.get(name)):
                raise ValueError(
                    f"model_index.json is refused: it names {named} as the {name}. A network of your own has to be "
                    "imported first, and needs the interface that docs/guide.md says"
                )
            parts[name] = part
        return parts

    @classmethod
    def _open(cls, folder: Path, index: dict[str, Any], network: dict[str, Any], **settings) -> Self:
        taken, parts = inspect.signature(cls).parameters, cls._parts(index)
        variant = network.get("variant")
        if variant and not any(has_variant(folder / name, variant) for name in parts):
            raise ValueError(f"{folder} has no weights of variant={variant!r}")
        saved = {key: index[key] for key in cls._settings() if key in index}
        opened = {key: open_part(parts[key], folder / key, **network) for key in parts if key not in settings}
        arguments = {**saved, **opened, **settings}
        if missing := [key for key in taken if key not in arguments and taken[key].default is inspect.Parameter.empty]:
            raise ValueError(f"model_index.json is refused: it names no {' and no '.join(missing)}")
        pipeline = cls(**arguments)
        pipeline.opened_from = folder
        pipeline.register_to_config(_name_or_path=str(folder))
        return pipeline


def read_index(path: Path) -> dict[str, Any]:
    """A `model_index.json`, with today's names of the components as in a checkout; ValueError where it is none."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(index, dict):
        raise ValueError(f"{path} holds no pipeline's index")
    for entry in index.values():
        if isinstance(entry, list) and entry and isinstance(entry[0], str):
            library = entry[0].removeprefix(INSTALLED)
            entry[0] = FORMER_NAMES.get(library, library)
    return index


def open_part(part: type, folder: Path, *, dtype: torch.dtype, variant: str | None = None, **settings: Any) -> Any:
    """A component of this class; a network in that precision, from its weights of the variant if it has some."""
    if not issubclass(part, torch.nn.Module):
        return part.from_pretrained(folder)
    variant = variant if variant and has_variant(folder, variant) else None
    precision = {"dtype" if issubclass(part, PreTrainedModel) else "torch_dtype": dtype}
    return part.from_pretrained(folder, variant=variant, use_safetensors=True, **precision, **settings)


def _dtype(dtype: torch.dtype | None, torch_dtype: torch.dtype | None) -> torch.dtype:
    """The one that was given of diffusers' two names for it, or float32."""
    found = torch_dtype if dtype is None else dtype
    if found is not None and not isinstance(found, torch.dtype):
        raise ValueError(f"torch_dtype={found!r} must be one of torch's, such as torch.bfloat16")
    return torch.float32 if found is None else found


def _is_part(part: type, hint: Any) -> bool:
    """Whether a class is what a type hint admits; as denoiser, any network that looks like one."""
    if hint is ModelMixin:
        return issubclass(part, ModelMixin) and hasattr(part, "embedding_parameters")
    return issubclass(part, get_args(hint) or (hint or ()))


def _metadata(component: Path) -> dict[str, str]:
    """What `stamp` wrote into the weights of a component."""
    for path in component.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            return {key: value for key, value in (file.metadata() or {}).items() if key != "format"}
    return {}


def _is_changed(network: torch.nn.Module, component: Path) -> bool:
    """Whether a weight differs, in its precision, from all of its name in a component's folder, whatever variant."""
    weights, differing, same = network.state_dict(), set(), set()
    for path in component.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in weights.keys() & file.keys():
                saved, weight = file.get_tensor(key), weights[key].cpu()
                (same if torch.equal(saved.to(weight.dtype), weight) else differing).add(key)
    return not differing <= same


def _forget_where_it_lay(folder: Path) -> None:
    """Take out of a saved folder where on this machine each part was opened: others shall read it."""
    for path in (folder / INDEX, *folder.glob("*/*config.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

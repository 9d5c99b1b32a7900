"""Pipelines of the hub: fetched at one commit, without code and pickles, and sent there."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, hf_hub_download, snapshot_download, upload_folder
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

INDEX = "model_index.json"
LICENSE = "LICENSE"
KEPT = ("README.md", "samples.png", "measurements.json", LICENSE)  # what an export says of itself, beside its parts
HUB_SETTINGS = ("token", "revision", "cache_dir", "local_files_only", "force_download")

# Of these, an error has the first that it is an instance of.
REASONS = {
    HFValidationError: "nor is that the id of a repository of the hub (owner/name)",
    LocalEntryNotFoundError: "the hub cannot be reached, or is not to be, and nothing of that name is in its cache",
    RepositoryNotFoundError: "the hub shows no repository of that name; a private one needs token=...",
    RevisionNotFoundError: "its repository of the hub has no such revision",
    EntryNotFoundError: f"its repository of the hub has no {INDEX}",
    HfHubHTTPError: "the hub does not give it",
}


def find_index(name: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """The `model_index.json` of a folder, or of a hub id, at `hub`'s revision and for its token.

    Where there is none it raises FileNotFoundError.
    """
    if Path(name).is_dir():
        index = Path(name, subfolder or "", INDEX)
        if not index.is_file():
            raise FileNotFoundError(f"there is no pipeline in {index.parent}: it has no {INDEX}")
        return index
    with _as_missing(name):
        return Path(hf_hub_download(str(name), INDEX, subfolder=subfolder, **hub))


def fetch_components(
    name: str,
    index: Path,
    components: list[str],
    variant: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> None:
    """Fetch the components of a hub id at the commit of its index: JSON, text and safetensors, nothing that runs.

    Of a variant, its weights, and the plain ones of components that have no others.
    """
    snapshot = index.parents[len(Path(subfolder or "").parts)]
    inside = f"{glob.escape(subfolder)}/" if subfolder else ""  # a pattern is of the whole path

    def fetch(files: list[str], ignored: Iterable[str] = ()) -> None:
        patterns = [inside + pattern for pattern in files]
        pinned = {**hub, "revision": snapshot.name, "ignore_patterns": [inside + pattern for pattern in ignored]}
        with _as_missing(name):
            snapshot_download(name, allow_patterns=patterns, **pinned)

    kinds = ["json", "txt", *([f"{variant}.safetensors", f"{variant}-*.safetensors"] if variant else [])]
    fetch([*KEPT, *(f"{component}/*.{kind}" for component in components for kind in kinds)])
    plain = [component for component in components if not (variant and has_variant(index.parent / component, variant))]
    other_variants = [f"{component}/*.*.safetensors" for component in plain]
    fetch([f"{component}/*.safetensors" for component in plain], ignored=other_variants)


def has_variant(component: Path, variant: str) -> bool:
    """Whether a component's folder holds weights of a variant."""
    return any(component.glob(f"*.{variant}.safetensors")) or any(component.glob(f"*.{variant}-*.safetensors"))


def send(
    folder: Path,
    name: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    subfolder: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder as one commit of a repository, made where there is none; the commit's address."""
    repository = create_repo(name, private=private, token=token, exist_ok=True).repo_id
    return upload_folder(
        repo_id=repository,
        folder_path=folder,
        path_in_repo=subfolder,
        token=token,
        commit_message=commit_message,
        create_pr=create_pr,
    )


@contextlib.contextmanager
def _as_missing(name: str | Path) -> Iterator[None]:
    try:
        yield
    except tuple(REASONS) as error:
        reason = next(reason for kind, reason in REASONS.items() if isinstance(error, kind))
        raise FileNotFoundError(f"there is no folder {name}; {reason}") from error

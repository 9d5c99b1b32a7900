"""The code by which diffusers itself opens a folder of ours. We write it, and never run what lies in a folder.

For `DiffusionPipeline.from_pretrained(folder or hub id, custom_pipeline="pipeline", trust_remote_code=True)` the
pipeline's class is in `pipeline.py`, and, in a repository of the hub, each component's in `<component>/<library>.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

INSTALLED = "one_step_mdm."  # what the packages' names begin with where they are installed
CODE = '''"""For diffusers, which finds a class of the package one-step-mdm by this file."""

from one_step_mdm.{library} import {imported}
'''


def write_code(folder: Path, pipeline: type, components: dict[str, list[Any]]) -> None:
    """Write it into a folder with a pipeline of this class, and with the components of its index."""
    # One name for every class: diffusers keeps the names of other folders' files, and admits one pipeline among them.
    _write(folder / "pipeline.py", pipeline.__module__.rpartition(".")[0], f"{pipeline.__name__} as Pipeline")
    for component, (library, class_name) in components.items():
        _write(folder / component / f"{library}.py", library, class_name)


def _write(path: Path, library: str, imported: str) -> None:
    library = library.removeprefix(INSTALLED)
    if is_ours(library):
        path.write_text(CODE.format(library=library, imported=imported))


def is_ours(library: str) -> bool:
    """Whether a library that a component is named by is a package of this project."""
    return library.split(".")[0] in ("teachers", "students")

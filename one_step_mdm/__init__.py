"""The name below which all packages lie where they are installed: `one_step_mdm.teachers`, `one_step_mdm.students`, ...

In a checkout they lie beside this one, and import each other as `teachers`. There this file gives their modules the
installed name as well. A wheel has the packages themselves in its place: build_backend/one_name.py.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PACKAGES = ("teachers", "students", "distill", "eval")


class OtherName(MetaPathFinder, Loader):
    """Who imports `one_step_mdm.teachers.pipeline` is handed `teachers.pipeline`, not a second one of its kind."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        above, *below = name.split(".")
        return ModuleSpec(name, self) if above == __name__ and below and below[0] in PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(spec.name.removeprefix(f"{__name__}."))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None  # that of the other name, which importing has just put there
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, OtherName())  # before Python's own, which would execute the files of a submodule again
__path__.append(str(Path(__file__).parents[1]))  # scripts/, which are imported by this name alone

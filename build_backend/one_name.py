"""Builds the wheel: all packages of the checkout below one name, `one_step_mdm`.

In a checkout they import each other as `teachers` or `eval`, names that would meet others' in a user's environment. So
a wheel holds `one_step_mdm.teachers`, files of its own whose imports say so, which any editor can follow. The sdist and
an editable install are setuptools' own, and have the checkout's layout.
"""

import ast
import contextlib
import shutil
import tempfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import build_editable, build_sdist

__all__ = ["build_editable", "build_sdist", "build_wheel"]

NAME = "one_step_mdm"
PACKAGES = ("teachers", "students", "distill", "eval")
BESIDE_THEM = ("scripts", "configs")  # where the packages look for them: one folder up


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """setuptools' wheel of another tree than the checkout; nothing is left in the checkout."""
    wheels = Path(wheel_directory).resolve()
    with tempfile.TemporaryDirectory() as tree:
        write_tree(Path.cwd(), Path(tree))
        with contextlib.chdir(tree):
            return build_meta.build_wheel(str(wheels), config_settings)


def write_tree(checkout: Path, tree: Path) -> None:
    """Write what the wheel is built of."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(checkout / name, tree)
    package = tree / NAME
    for name in (*PACKAGES, *BESIDE_THEM):
        shutil.copytree(checkout / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(checkout / NAME / "__main__.py", package)
    (package / "__init__.py").write_text('"""Distil masked diffusion models into one-step generators."""\n')
    (package / "py.typed").touch()
    for path in package.rglob("*.py"):
        path.write_bytes(below_one_name(path.read_bytes(), str(path.relative_to(package))))


def below_one_name(source: bytes, path: str) -> bytes:
    """Python source with imports of our packages from below the one name; all else, and its place, as it was."""
    places = []
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.ImportFrom) and node.module and _is_ours(node.module):
            places.append((node.lineno, node.col_offset + len("from "), node.module))
        elif isinstance(node, ast.Import):
            for imported in node.names:
                if _is_ours(imported.name) and imported.asname is None:
                    raise ValueError(
                        f"{path}, line {imported.lineno}: `import {imported.name}` has no form below {NAME} that binds "
                        f"the same name; say `from ... import ...` or `import {imported.name} as ...`"
                    )
                if _is_ours(imported.name):
                    places.append((imported.lineno, imported.col_offset, imported.name))
    lines = source.splitlines(keepends=True)
    for number, column, module in sorted(places, reverse=True):
        line = lines[number - 1]
        assert line[column:].startswith(module.encode()), f"{path}, line {number}: {module} is not at {column}"
        lines[number - 1] = line[:column] + f"{NAME}.".encode() + line[column:]
    return b"".join(lines)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES

"""Which way imports point: down, as docs/where.md draws it; nobody in a circle, no file that holds two ideas."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each room knows those below it, and itself; rooms in one line do not know each other.
ROOMS = [
    {"scripts"},
    {"eval", "distill.benchmark"},
    {"distill.jobs"},
    {"distill.loop", "distill.methods"},
    {"distill.config"},
    {"students"},
    {"teachers.pipeline"},
    {"teachers.text", "teachers.released", "teachers.cost"},
    {"teachers.networks", "teachers.samplers", "teachers.objectives"},
    {"teachers.guidance", "teachers.calls", "teachers.inpainting", "teachers.steps"},
    {"teachers.denoiser"},
    {"teachers.tokenizers", "teachers.conditions"},
    {"teachers.data", "teachers.corruption", "teachers.opening"},
    {
        "teachers.component", "teachers.custom_code", "teachers.folder", "teachers.hub", "teachers.progress",
        "teachers.randomness", "teachers.shards", "teachers.sharing", "teachers.sources",
    },
]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
PACKAGES = ("teachers", "students", "distill", "eval", "scripts")


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imported(module):
    """The modules of ours that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        else:
            continue
        found |= {name for name in names if name in FILES}
    return found - {module}


def room_of(module):
    """The longest room that a module lies in; a package's own file is the door to it and in no room."""
    rooms = [room for room in LEVEL if module == room or module.startswith(room + ".")]
    return max(rooms, key=len) if rooms else None


GRAPH = {module: imported(module) for module in FILES}


def test_every_module_has_a_room():
    doors = {"teachers", "distill"}
    assert {module for module in FILES if room_of(module) is None} == doors


def test_imports_point_down():
    arrows = [(module, other) for module in FILES for other in GRAPH[module] if room_of(module) and room_of(other)]
    assert len(arrows) > 300
    rooms = [(room_of(module), room_of(other), module, other) for module, other in arrows]
    wrong = [(module, other) for here, there, module, other in rooms if here != there and LEVEL[there] <= LEVEL[here]]
    assert not wrong


def test_a_method_knows_no_loop_and_the_loop_no_method():
    assert not any(
        other.startswith("distill.loop") for module in FILES if "methods" in module for other in GRAPH[module]
    )
    assert not any(
        other.startswith("distill.methods") for module in FILES if ".loop" in module for other in GRAPH[module]
    )


def test_mathematics_knows_no_accelerate():
    for module in (
        "teachers.corruption",
        "distill.methods.divergence",
        "distill.methods.dimo",
        "students.initialisation",
    ):
        assert "accelerate" not in FILES[module].read_text()


def test_no_circle():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError


def test_no_file_is_long():
    files = [*FILES.values(), *(ROOT / "tests").rglob("*.py")]
    assert not [path for path in files if len(path.read_text().splitlines()) > 400]

"""What pip installs: one name, the commands and the recipes; and folders that open there as they do here."""

import ast
import json
import os
import pickle
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import one_step_mdm.teachers.samplers.maskgit
import teachers.samplers.maskgit
from distill.config import find_config, load_config, recipes
from distill.jobs.student import StudentJob
from students import OneStepPipeline, TokenInitialiser
from students.loading import load_pipeline
from teachers.randomness import sample_generators

ROOT = Path(__file__).parents[1]
PACKAGES = ("teachers", "students", "distill", "eval")
SAVED_NAMES = {"one_step_mdm.teachers", "one_step_mdm.teachers.samplers", "one_step_mdm.students"}


def build(source, folder):
    """The wheel that pip makes of a checkout or an sdist."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def names_in(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def commands(wheel, tmp_path_factory):
    """The folder of the commands of an environment with the wheel, all that it depends on, and not this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # without what its own .pth files add
    return folder / "bin"


@pytest.fixture
def call(commands, tmp_path):
    """Runs a command of that environment in tmp_path; returns its exit status, stdout and stderr."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")

    def call(command, *arguments):
        line = [str(part) for part in (commands / command, *arguments)]
        ended = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return ended.returncode, ended.stdout, ended.stderr

    return call


def test_a_wheel_has_one_name_and_all_that_runs(wheel):
    names = names_in(wheel)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"one_step_mdm"}
    wanted = {path for folder in (*PACKAGES, "scripts") for path in (ROOT / folder).rglob("*.py")}
    wanted |= {path for path in ROOT.rglob("*.jinja") if path.relative_to(ROOT).parts[0] in PACKAGES}
    wanted |= set((ROOT / "configs").rglob("*.yaml"))
    assert len(wanted) > 120
    inside = {name.removeprefix("one_step_mdm/") for name in names if name.startswith("one_step_mdm/")}
    of_its_own = {"__init__.py", "__main__.py", "py.typed"}
    assert inside == of_its_own | {path.relative_to(ROOT).as_posix() for path in wanted}


def test_its_modules_import_each_other_below_that_name_and_are_else_the_same(wheel):
    with zipfile.ZipFile(wheel) as opened:
        for name in names_in(wheel):
            if not name.endswith(".py") or name == "one_step_mdm/__init__.py":
                continue
            source = opened.read(name).decode()
            nodes = list(ast.walk(ast.parse(source)))
            imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
            imported += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            assert not {module.split(".")[0] for module in imported} & {*PACKAGES, "scripts"}, name
            here = ROOT / name if name.endswith("__main__.py") else ROOT / name.removeprefix("one_step_mdm/")
            assert source.replace("one_step_mdm.", "") == here.read_text().replace("one_step_mdm.", ""), name


@pytest.mark.parametrize(
    ("source", "installed"),
    [
        ("from teachers import a", "from one_step_mdm.teachers import a"),
        ("é = 1; from teachers.x import a, teachers", "é = 1; from one_step_mdm.teachers.x import a, teachers"),
        ("import os, eval.x as eval, json", "import os, one_step_mdm.eval.x as eval, json"),
        (
            "if x:\n    from eval import (\n        y,\n    )",
            "if x:\n    from one_step_mdm.eval import (\n        y,\n    )",
        ),
        ("'import teachers'\n# from teachers import x", "'import teachers'\n# from teachers import x"),
        ("from evaluate import x; import teachers_of_others", "from evaluate import x; import teachers_of_others"),
        ("teachers.eval(students)", "teachers.eval(students)"),
    ],
)
def test_imports_are_found_as_python_finds_them(monkeypatch, source, installed):
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    from one_name import below_one_name

    assert below_one_name(source.encode(), "x.py").decode() == installed


def test_an_import_that_binds_a_package_s_own_name_ends_the_build(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    from one_name import below_one_name

    with pytest.raises(ValueError, match=r"x.py, line 2: `import teachers.x` has no form"):
        below_one_name(b"import os\nimport teachers.x", "x.py")


def test_an_sdist_makes_the_same_wheel(wheel, tmp_path):
    code = f"import sys; sys.path.insert(0, 'build_backend'); import one_name; one_name.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    again = build(sdist, tmp_path / "again")
    assert names_in(again) == names_in(wheel)
    same = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    assert all(same[0].read(name) == same[1].read(name) for name in names_in(wheel) if "dist-info" not in name)


def test_the_commands_work_from_any_folder(call):
    status, out, _ = call("one-step-mdm", "--help")
    assert status == 0
    for script in (ROOT / "scripts").glob("*.py"):
        assert f"\n  {script.stem.replace('_', '-')} " in out
    assert "digits/student" in out
    assert call("python", "-m", "one_step_mdm", "--help") == (0, out, "")
    assert call("one-step-mdm", "train-studnet")[0] == 2
    status, out, _ = call("one-step-mdm", "train-student", "--config", "digits/student", "--dry-run", "output=mine")
    assert status == 0
    assert "output: mine\n" in out
    assert "auxiliary_updates: 2\n" in out  # of the recipe
    assert call("python", "-c", "import teachers")[0] == 1


OPEN_AND_SAVE = """
import sys

from diffusers import DiffusionPipeline
from safetensors.torch import save_file

for name in ("teacher", "student"):
    pipeline = DiffusionPipeline.from_pretrained(name, custom_pipeline="pipeline", trust_remote_code=True)

    # Only now, for diffusers is to find what it needs by itself.
    from one_step_mdm.students.loading import load_pipeline
    from one_step_mdm.teachers.randomness import sample_generators

    assert type(load_pipeline(name)) is type(pipeline)
    load_pipeline(name).save_pretrained(f"{name}-there")
    generator = sample_generators(0, places=range(2))
    images = pipeline(class_labels=[3, 7], generator=generator, output_type="pt").images
    save_file({"images": images}, f"{name}.safetensors")
assert not {"teachers", "students", "distill", "eval"} & set(sys.modules)
"""


def test_a_folder_saved_here_opens_there_and_one_saved_there_opens_here(call, teacher, tmp_path):
    student = OneStepPipeline(teacher.denoiser, teacher.tokenizer, TokenInitialiser.for_teacher(teacher))
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    status, _, errors = call("python", "-c", OPEN_AND_SAVE)
    assert status == 0, errors
    for name, pipeline in [("teacher", teacher), ("student", student)]:
        expected = images(pipeline)
        torch.testing.assert_close(load_file(tmp_path / f"{name}.safetensors")["images"], expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(images(load_pipeline(tmp_path / f"{name}-there")), expected, atol=1e-6, rtol=0)
        assert libraries(tmp_path / name) == libraries(tmp_path / f"{name}-there") <= SAVED_NAMES


def images(pipeline):
    return pipeline(class_labels=[3, 7], generator=sample_generators(0, places=range(2)), output_type="pt").images


def libraries(folder):
    index = json.loads((folder / "model_index.json").read_text())
    return {entry[0] for entry in index.values() if isinstance(entry, list) and entry[0]}


def test_in_a_checkout_both_names_are_of_the_same_modules():
    module = teachers.samplers.maskgit
    assert one_step_mdm.teachers.samplers.maskgit is module
    assert one_step_mdm.teachers is teachers
    assert module.__spec__.name == module.__name__ == "teachers.samplers.maskgit"
    with pytest.raises(ModuleNotFoundError):
        import_module("one_step_mdm.teachers.nothing")


def test_a_component_s_class_is_pickled_by_the_name_it_is_saved_by(teacher):
    for part in (type(teacher.denoiser), type(teacher.sampler), TokenInitialiser):
        assert part.__module__ in SAVED_NAMES
        assert pickle.loads(pickle.dumps(part)) is part


def test_a_configuration_is_a_file_or_else_a_recipe_s_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"digits/student", "mnist/tokenizer", "imagenet256/maskgit"} <= set(recipes())
    assert load_config(StudentJob, "digits/student") == load_config(StudentJob, ROOT / "configs/digits/student.yaml")
    for name in ("digits/studnet", "../configs/digits/student", "accelerate/ddp", "digits"):
        with pytest.raises(FileNotFoundError, match=f"no configuration file {name}; recipes are .*digits/student"):
            find_config(name)
    Path("digits").mkdir()
    Path("digits/student").write_text("output: here")  # one's own goes first
    assert load_config(StudentJob, "digits/student").output == "here"


@pytest.mark.slow
def test_commands_alone_make_a_student_of_the_digits(call, tmp_path):
    def done(*command):
        status, out, errors = call(*command)
        assert status == 0, errors
        return out

    short = ["training.num_steps=20", "training.evaluate_every=20", "training.tracker=none"]
    done("one-step-mdm", "train-teacher", "--config", "digits/teacher", *short)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "-m", "one_step_mdm"]
    assert "2 x cpu" in done("python", *launch, "train-student", "--config", "digits/student", *short)
    done("one-step-mdm", "export", "runs/digits/student", "--output", "one-step")
    done("one-step-mdm", "sample", "one-step", "--output", "grid.png")
    assert (tmp_path / "grid.png").is_file()
    found = json.loads(done("one-step-mdm", "evaluate", "one-step", "--num-images", 200).splitlines()[-1])
    assert found["nfe"] == 1
    assert found["fd"] > 0
    quick = ["quickstart", "--teacher", "runs/digits/teacher/pipeline", "--output", "quick", *short]
    summary = json.loads(done("one-step-mdm", *quick).splitlines()[-1])
    assert summary
    assert (tmp_path / "quick" / "report.html").is_file()

"""The entry points, called as commands would call them."""

import argparse
import errno
import json
import os
from pathlib import Path

import PIL.Image
import pytest
import torch

from eval.sampling import add_device_options, open_pipeline, pipeline_digest
from students import OneStepPipeline
from teachers import MaskedDiffusionPipeline, PatchTokenizer

FRONTIER = ["frontier", "--teacher", "teacher", "--student", "teacher", "--output", "frontier"]


@pytest.fixture
def run(teacher, command):
    """A finished run in ./run, distilled from ./teacher."""
    teacher.save_pretrained("teacher")
    settings = ["teacher=teacher", "output=run", "monitor.name="]
    settings += ["training={num_steps: 2, batch_size: 8, tracker: none}"]
    status, _, errors = command("train_student.py", *settings)
    assert status == 0, errors


@pytest.mark.usefixtures("run")
def test_from_run_to_samples_measurements_and_timings(command):
    assert command("export.py", "run", "--output", "one", "--temperature", "0.7")[0] == 0
    assert OneStepPipeline.from_pretrained("one").config.temperature == 0.7
    assert command("export.py", "run", "--output", "one")[0] == 2  # never over something

    assert command("sample.py", "one", "--output", "grid.png", "--class-labels", 3, 7, "--num-rows", 2)[0] == 0
    assert PIL.Image.open("grid.png").size == (2 * 34, 2 * 34)
    assert command("sample.py", "one", "--output", "half.png", "--dtype", "bfloat16")[0] == 0

    status, last, errors = command("evaluate.py", "one", "--num-images", 200, "--classifier", "classifier")
    assert status == 0, errors
    result = json.loads(last)
    assert {"fd", "kd", "precision", "recall", "class_consistency"} <= result.keys()
    assert result["protocol"]["num_images"] == 200
    assert result["protocol"]["reference"].startswith("1797 images of digits, sha256 ")
    assert result["nfe"] == 1
    (output,) = Path("runs/evaluation").iterdir()
    assert len(output.name) == 12
    kept = sorted((path.name, path.stat().st_mtime_ns) for path in output.glob("*.safetensors"))
    assert len(kept) == 2 + 2
    again = command("evaluate.py", "one", "--num-images", 200, "--classifier", "classifier")[1]
    assert json.loads(again) == result
    assert sorted((path.name, path.stat().st_mtime_ns) for path in output.glob("*.safetensors")) == kept
    few = ["one", "--num-images", 20, "--classifier", "classifier", "--output", "bf16", "--dtype", "bfloat16"]
    status, last, errors = command("evaluate.py", *few, "split=test")
    assert status == 0, errors
    protocol = json.loads(last)["protocol"]
    assert protocol["dtype"] == "bfloat16"
    assert protocol["data"]["split"] == "test"
    assert protocol["reference"].startswith("297 images of digits, sha256 ")

    both = ["--teacher", "teacher", "--student", "one"]
    arguments = [
        *both,
        "--steps",
        1,
        2,
        "--batch-sizes",
        2,
        "--num-repeats",
        1,
        "--variants",
        "bfloat16",
        "channels last",
    ]
    status, last, _ = command("benchmark.py", "sample", *arguments)
    assert status == 0
    rows = json.loads(last)["rows"]
    assert len(rows) == 10
    operations = {row["name"]: row["gflop"] for row in rows if not row["decode"]}
    assert operations["teacher, 2 steps"] == 2 * operations["student"] == 2 * operations["student, bfloat16"]
    assert command("benchmark.py", "sample", "--teacher", "teacher")[0] == 2

    arguments = [*both, "--output", "frontier", "--classifier", "classifier", "--guidance-scales", 1, "--save-best"]
    arguments += ["--temperatures", 1, "--num-tuning-images", 100, "--num-report-images", 100]
    arguments += ["--samplers", "random order", "PUNT"]
    status, last, errors = command("benchmark.py", "frontier", *arguments)
    assert status == 0, errors
    rows = json.loads(Path("frontier/frontier.json").read_text())["rows"]
    assert list(dict.fromkeys(row["sampler"] for row in rows)) == ["one-step student", "random order", "PUNT"]
    on_frontier = [row for row in rows if row["on_frontier"]]
    assert min(on_frontier, key=lambda row: row["nfe"])["setting"] == "1 step"
    assert pipeline_digest(OneStepPipeline.from_pretrained("one")) in json.loads(last)["protocol"]["Models"]
    best = min(rows[1:], key=lambda row: row["fd"])
    assert best in on_frontier
    assert json.loads(last)["best_teacher"] == best
    saved = MaskedDiffusionPipeline.from_pretrained("teacher").sampler
    assert type(saved).__name__ == best["sampler_settings"]["class"]
    assert len(Path("frontier/frontier.csv").read_text().splitlines()) == 1 + len(rows)
    assert Path("frontier/frontier.html").exists()

    # What is measured is kept, and a line torn by an interruption is measured again.
    points = Path("frontier/points.jsonl")
    lines = points.read_text().splitlines()
    points.write_text("\n".join([*lines[:-1], lines[-1][:50]]))
    assert command("benchmark.py", "frontier", *arguments)[0] == 0
    again = json.loads(Path("frontier/frontier.json").read_text())["rows"]
    assert [row["fd"] for row in again] == [row["fd"] for row in rows]
    assert len(points.read_text().splitlines()) == len(lines) + 1


@pytest.mark.usefixtures("run")
def test_mistakes_are_one_line(command):
    for name in ("dark", "light"):
        Path("colour", name).mkdir(parents=True)
        for number in range(6):
            PIL.Image.new("RGB", (8, 9 + number)).save(Path("colour", name, f"{number}.png"))
    Path("small").mkdir()
    PIL.Image.new("L", (8, 5)).save("small/0.png")
    for script, arguments, message in [
        ("sample.py", ["nowhere", "--output", "x.png"], "there is no folder nowhere"),
        ("sample.py", ["teacher", "--output", "x.png", "--class-labels", 12], "class label 12 is out of range"),
        ("sample.py", ["teacher", "--output", "x.png", "--device", "warp"], "--device warp cannot be used"),
        ("export.py", ["nowhere", "--output", "x"], "not the folder of a distillation run"),
        ("evaluate.py", ["teacher", "nam=digits"], "did you mean name?"),
        (
            "evaluate.py",
            ["teacher", "--features", "inception", "--few-images", "--inception-path", "no"],
            "no Inception weights",
        ),
        ("evaluate.py", ["teacher", "--num-images", 0], "--num-images 0 must be at least 1"),
        ("evaluate.py", ["teacher", "--num-images", 3], "3 generated images; what is measured needs at least 4"),
        ("evaluate.py", ["teacher", "name=colour"], "has 2 classes and the pipeline 10"),
        ("evaluate.py", ["teacher", "name=colour", "label_column=", "image_size=9"], "where images of 8x8 in grey"),
        ("evaluate.py", ["teacher", "name=colour", "label_column="], "a classifier needs labels of at least two"),
        ("sample.py", ["teacher", "--output", "grid"], "call it grid.png"),
        ("sample.py", ["teacher", "--output", "x.png", "--num-rows", 0], "--num-rows 0 must be at least 1"),
        ("evaluate.py", ["teacher", "name=small", "label_column="], "say image_size=8"),
        ("sample.py", ["teacher", "--output", "x.png", "--class-labels", "cat"], "'cat'"),
        ("benchmark.py", [*FRONTIER, "--features", "inception", "--inception-path", "no"], "images is not one"),
        ("benchmark.py", [*FRONTIER, "--samplers", "Holton"], "no sampler 'Holton'; choose from random order, "),
        ("train_student.py", ["teacher=teacher", "output=run"], "output folder run is not empty"),
        ("train_student.py", ["teacher=./nowhere", "output=other"], "no MaskedDiffusionPipeline at ./nowhere"),
        ("train_teacher.py", ["data.split=validation", "output=other"], "no split 'validation'"),
    ]:
        status, _, errors = command(script, *arguments)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert (status, len(lines)) == (2, 1), (script, errors)
        assert message in lines[0]
    assert not any(Path(name).exists() for name in ("x", "x.png", "other", "runs"))


def test_a_picture_is_written_whole_or_not_at_all(command, teacher, monkeypatch):
    teacher.save_pretrained("teacher")
    assert command("sample.py", "teacher", "--output", "pictures/grid.jpg", "--num-rows", 1)[0] == 0
    with PIL.Image.open("pictures/grid.jpg") as picture:
        assert picture.format == "JPEG"
    kept = Path("pictures/grid.jpg").read_bytes()

    def save(picture, path, format):
        Path(path).write_bytes(b"half a picture")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PIL.Image.Image, "save", save)
    for name in ("grid.jpg", "grid.png"):
        status, _, errors = command("sample.py", "teacher", "--output", f"pictures/{name}", "--seed", 1)
        assert (status, sum(line.startswith("error: ") for line in errors.splitlines())) == (2, 1)
    assert [path.name for path in Path("pictures").iterdir()] == ["grid.jpg"]
    assert Path("pictures/grid.jpg").read_bytes() == kept


def test_images_are_read_in_the_tokenizers_colours_to_be_encoded(command):
    """And not at all where they are of another size than it is for."""
    Path("colour").mkdir()
    for number in range(3):
        PIL.Image.new("RGB", (9, 10), (0, 100 * number, 0)).save(Path("colour", f"{number}.png"))
    PatchTokenizer.fit(torch.rand(4, 3, 8, 8), patch_size=4, codebook_size=8).save_pretrained("tokenizer")
    arguments = ["--tokenizer", "tokenizer", "--output", "tokens", "name=colour", "label_column="]
    status, _, errors = command("cache_tokens.py", *arguments)
    assert (status, "read as 10x9 in colour, where images of 8x8 in colour" in errors) == (2, True), errors
    assert not Path("tokens").exists()
    status, last, errors = command("cache_tokens.py", *arguments, "image_size=8")
    assert status == 0, errors
    assert json.loads(last)["num_images"] == 3


def test_classes_are_sampled_by_name(command, teacher):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    named = MaskedDiffusionPipeline(teacher.denoiser, teacher.tokenizer, teacher.sampler, class_names=names)
    named.save_pretrained("teacher")
    for name, labels in [("names.png", ["seven", "3"]), ("numbers.png", [7, "three"])]:
        status, _, errors = command("sample.py", "teacher", "--output", name, "--class-labels", *labels)
        assert status == 0, errors
    assert Path("names.png").read_bytes() == Path("numbers.png").read_bytes()


def test_a_pipeline_is_opened_where_and_as_the_options_say(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    parser = argparse.ArgumentParser()
    add_device_options(parser)
    for options, device, dtype in [
        ([], "cuda" if torch.cuda.is_available() else "cpu", torch.float32),
        (["--device", "meta", "--dtype", "bfloat16"], "meta", torch.bfloat16),
        (["--device", "cpu", "--dtype", "float16"], "cpu", torch.float16),
    ]:
        opened = open_pipeline(tmp_path / "teacher", parser.parse_args(options))
        assert (opened.device.type, opened.dtype) == (device, dtype)


def test_figures_of_other_weights_or_settings_are_of_another_protocol(teacher):
    digests = [pipeline_digest(teacher)]
    assert pipeline_digest(teacher) == digests[0]
    teacher.register_to_config(temperature=0.5)
    digests.append(pipeline_digest(teacher))
    teacher.sampler.register_to_config(num_inference_steps=2)
    digests.append(pipeline_digest(teacher))
    with torch.no_grad():
        next(teacher.denoiser.parameters()).view(-1)[0] += 1e-3
    digests.append(pipeline_digest(teacher))
    assert len(set(digests)) == 4


@pytest.mark.usefixtures("run")
def test_a_truncated_checkpoint_is_not_exported(command):
    (weights,) = Path("run").glob("checkpoints/*/averaged.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    status, _, errors = command("export.py", "run", "--output", "one")
    assert status == 2
    assert "no whole checkpoint" in errors
    assert not Path("one").exists()


def test_the_step_and_its_loss_are_measured_against_the_authors_order(command):
    size = ["--batch-size", 2, "--token-grid", 4, 4, "--num-repeats", 1]
    arguments = [*size, "--hidden-size", 64, "--num-layers", 2, "--codebook-size", 16]
    status, last, errors = command("benchmark.py", "step", "--baseline", *arguments)
    assert status == 0, errors
    rows = {row["name"]: row for row in json.loads(last)["rows"]}
    operations = {name: row["gflop"] for name, row in rows.items()}
    # Forwards of the authors' order and ours: 3 + 2 + 1 + 1 + 3, and 3 + 2 + 3; what is not in the blocks blurs it.
    assert operations["shared samples"] / operations["the authors' order"] == pytest.approx(0.8, abs=0.05)
    assert operations["fresh samples"] / operations["the authors' order"] == pytest.approx(1.0, abs=0.05)
    assert operations["adapters of rank 16"] < operations["shared samples"]

    status, last, errors = command("benchmark.py", "loss", *size, "--codebook-sizes", 2048, "--hidden-size", 16)
    assert status == 0, errors
    plain, ours, compiled = json.loads(last)["rows"]
    assert compiled["peak_memory_mib"] <= ours["peak_memory_mib"] < plain["peak_memory_mib"]

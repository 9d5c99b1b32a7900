"""Time a one-step student against its teacher, draw the frontier of the teacher's samplers beside the student, or time
the training step or its loss against the schedule of the authors' loop.

    python scripts/benchmark.py sample --teacher runs/digits/teacher/pipeline --student runs/digits/one-step
    python scripts/benchmark.py frontier --teacher runs/digits/teacher/pipeline --student runs/digits/one-step \\
        --output runs/digits/frontier
    python scripts/benchmark.py step --baseline
    python scripts/benchmark.py loss

The last line of stdout is one JSON object.
"""

import argparse
import copy
import hashlib
import json
import os
import platform
import tempfile
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from distill.benchmark.step import LossPath, StepBenchmark, loss_table, step_table
from distill.config import load_config
from distill.jobs.command import run
from distill.loop.config import TrainingConfig
from eval.clip_score import ClipFeatures
from eval.evaluate import Reference
from eval.frontier import (
    SPEED_ROUNDS,
    STUDENT,
    measure_frontier,
    samplers_to_try,
    write_csv,
)
from eval.monitor import real_images, reference_for
from eval.report import frontier_plot, write_frontier_page
from eval.speed import measure_speed, speed_summary, speed_table
from eval.tuning import Grid
from students.initialisation import TokenInitialiser
from students.loading import load_pipeline
from students.pipeline import OneStepPipeline
from teachers import samplers
from teachers.conditions.prompts import PromptConfig, Prompts, load_prompts
from teachers.cost import num_parameters
from teachers.data import DataConfig
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.released.sizes import random_pipeline

STEPS = [1, 2, 4, 8, 16, 32]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed, and quality against compute, of a student and its teacher.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, function, text in [
        ("sample", sample, "time a student against its teacher"),
        ("frontier", frontier, "quality against compute of every sampler of the teacher, and of the student"),
    ]:
        options = kinds.add_parser(kind, help=text, description=text.capitalize() + ".")
        options.set_defaults(function=function)
        required = kind == "frontier"
        options.add_argument("--teacher", type=Path, required=required, help="folder of a MaskedDiffusionPipeline")
        options.add_argument("--student", type=Path, required=required, help="folder of a OneStepPipeline")
        options.add_argument("--prompts", nargs="+", metavar="key=value", help="for text: name=, split=, column=")
        options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for kind, function, text in [
        ("step", step, "time the training step of Di[M]O"),
        ("loss", loss, "time the way from the last hidden states to their gradients, and its memory"),
    ]:
        options = kinds.add_parser(kind, help=text, description=text.capitalize() + ".")
        options.set_defaults(function=function)
        options.add_argument("--guidance-scale", type=float, default=2.0, help="of the teacher; 1 is none")
        options.add_argument("--num-repeats", type=int, default=7, help="interleaved rounds")
    add_step_options(kinds.choices["step"])
    add_loss_options(kinds.choices["loss"])
    add_sample_options(kinds.choices["sample"])
    add_frontier_options(kinds.choices["frontier"])
    arguments = parser.parse_args()
    run(lambda: arguments.function(arguments))


def add_sample_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--random", metavar="SIZE", help="untrained models of a released size, e.g. maskgit-256")
    options.add_argument("--variants", nargs="+", default=[], choices=VARIANTS, help="the student in other ways, too")
    options.add_argument("--steps", type=int, nargs="+", help="of the teacher; default: 1 to 32, as its tokens allow")
    options.add_argument("--guidance-scale", type=float, default=1.0, help="of the teacher; above 1 counts twice")
    options.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 256])
    options.add_argument("--num-repeats", type=int, default=10)


def add_step_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--baseline", action="store_true", help="beside the schedule of the authors' loop")
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--token-grid", type=int, nargs=2, default=[16, 16])
    options.add_argument("--codebook-size", type=int, default=1024)
    options.add_argument("--hidden-size", type=int, default=384)
    options.add_argument("--num-layers", type=int, default=6)
    options.add_argument("--adapter-rank", type=int, default=16, help="of the step with adapters")
    options.add_argument("settings", nargs="*", metavar="key=value", help="of the loop, e.g. mixed_precision=bf16")


def add_loss_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--token-grid", type=int, nargs=2, default=[16, 16])
    options.add_argument("--codebook-sizes", type=int, nargs="+", default=[1025, 8192])
    options.add_argument("--hidden-size", type=int, default=256)


def add_frontier_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--output", type=Path, required=True, help="folder; run again, it goes on where it stopped")
    options.add_argument("--data", nargs="+", default=[], metavar="key=value", help="the real images, e.g. name=folder")
    options.add_argument("--features", choices=["classifier", "inception"], default="classifier", help="FD, or FID")
    options.add_argument("--clip", help="for models of text: the CLIP (folder or hub id) of FD and CLIP score")
    options.add_argument("--classifier", type=Path, default=Path("runs/classifier"), help="where it is kept")
    options.add_argument("--inception-path", type=Path, help="Inception weights; default: downloaded once")
    options.add_argument("--samplers", nargs="+", metavar="NAME", help="some of them; default: all")
    options.add_argument("--guidance-scales", type=float, nargs="+", default=[1.0, 1.25])
    options.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.8, 0.6, 0.4])
    options.add_argument("--num-tuning-images", type=int, default=1000)
    options.add_argument("--num-report-images", type=int, default=2000)
    options.add_argument("--speed-batch-size", type=int, default=128, help="of the timings")
    options.add_argument("--save-best", action="store_true", help="make the best setting the teacher folder's default")


def sample(arguments: argparse.Namespace) -> None:
    if arguments.random:
        teacher = random_pipeline(arguments.random)
        initialiser = TokenInitialiser.for_teacher(teacher, random_tokens="uniform")
        student = OneStepPipeline(teacher.denoiser, teacher.tokenizer, initialiser)
    elif arguments.teacher and arguments.student:
        teacher, student = load_pipeline(arguments.teacher), load_pipeline(arguments.student)
    else:
        raise ValueError("name a --teacher and a --student, or the size of --random ones")
    teacher, student = teacher.to(arguments.device), student.to(arguments.device)
    candidates = {"student": (student, {})}
    for name in arguments.variants:
        candidates[f"student, {name}"] = (VARIANTS[name](copy.deepcopy(student)), {})
    for steps in arguments.steps or [steps for steps in STEPS if steps <= teacher.sequence_length]:
        settings = {"num_inference_steps": steps, "guidance_scale": arguments.guidance_scale}
        candidates[f"teacher, {steps} steps"] = (teacher, settings)
    rows = []
    for decode in (False, True):
        rows += measure_speed(
            candidates,
            batch_sizes=arguments.batch_sizes,
            num_repeats=arguments.num_repeats,
            decode=decode,
            conditions=prompts_of(teacher, arguments),
        )
    print(speed_table(rows))
    print(speed_summary(rows, "student", [name for name, (pipeline, _) in candidates.items() if pipeline is teacher]))
    print(json.dumps({"rows": rows, "protocol": machine(arguments.device) | {"num_repeats": arguments.num_repeats}}))


def compiled(pipeline: OneStepPipeline) -> OneStepPipeline:
    """On a GPU as CUDA graphs, which matter for small batches."""
    mode = "reduce-overhead" if pipeline.device.type == "cuda" else None
    pipeline.denoiser.compile_repeated_blocks(mode=mode)
    return pipeline


def channels_last(pipeline: OneStepPipeline) -> OneStepPipeline:
    """The decoder alone: it is what has convolutions."""
    pipeline.tokenizer.to(memory_format=torch.channels_last)
    return pipeline


VARIANTS = {
    "bfloat16": lambda pipeline: pipeline.to(torch.bfloat16),
    "compiled": compiled,
    "channels last": channels_last,
}


def step(arguments: argparse.Namespace) -> None:
    rank = arguments.adapter_rank
    settings = load_config(TrainingConfig, overrides=[f"batch_size={arguments.batch_size}", *arguments.settings])
    with tempfile.TemporaryDirectory() as folder:
        benchmark = StepBenchmark(
            tuple(arguments.token_grid),
            arguments.codebook_size,
            arguments.hidden_size,
            arguments.num_layers,
            arguments.guidance_scale,
            replace(settings, tracker="none"),
            Path(folder),
        )
        builders = {
            "shared samples": benchmark.ours,
            "fresh samples": partial(benchmark.ours, auxiliary_samples="fresh"),
            f"adapters of rank {rank}": partial(benchmark.ours, adapter_rank=rank),
        }
        if arguments.baseline:
            builders = {"the authors' order": benchmark.baseline, **builders}
        rows = benchmark.measure(builders, arguments.num_repeats)
    print(step_table(rows))
    protocol = machine(benchmark.device.type) | {
        "parameters": num_parameters(benchmark.teacher),
        **asked_for(arguments),
    }
    print(json.dumps({"rows": rows, "protocol": protocol}))


def loss(arguments: argparse.Namespace) -> None:
    rows = []
    for codebook_size in arguments.codebook_sizes:
        path = LossPath(
            arguments.batch_size,
            tuple(arguments.token_grid),
            codebook_size,
            arguments.hidden_size,
            arguments.guidance_scale,
        )
        rows += [{"codebook_size": codebook_size, **row} for row in path.measure(arguments.num_repeats)]
    print(loss_table(rows))
    print(json.dumps({"rows": rows, "protocol": machine("cpu") | asked_for(arguments)}))


def asked_for(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, without the function that does it."""
    return {key: value for key, value in vars(arguments).items() if key not in ("function", "kind")}


def prompts_of(teacher: MaskedDiffusionPipeline, arguments: argparse.Namespace) -> Prompts | None:
    if not teacher.takes_prompts:
        return None
    if not arguments.prompts:
        raise ValueError("these models are conditioned on text: name prompts with --prompts")
    return Prompts(teacher, load_prompts(load_config(PromptConfig, overrides=arguments.prompts)))


def machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "CPU"
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}


def frontier(arguments: argparse.Namespace) -> None:
    data = load_config(DataConfig, overrides=arguments.data)
    teacher = load_pipeline(arguments.teacher).to(arguments.device)
    student = load_pipeline(arguments.student).to(arguments.device)
    chosen = samplers_to_try(teacher.token_grid)
    unknown = set(arguments.samplers or []) - set(chosen)
    if unknown:
        raise ValueError(f"there is no sampler {min(unknown)!r}; choose from {', '.join(chosen)}")
    chosen = {name: chosen[name] for name in arguments.samplers or chosen}
    grid = Grid(
        tuple(arguments.temperatures),
        tuple(arguments.guidance_scales),
        (),
        arguments.num_tuning_images,
        arguments.num_report_images,
    )
    prompts = prompts_of(teacher, arguments)
    if prompts is None:
        reference = reference_for(data, arguments.classifier, arguments.features, arguments.inception_path)
    elif arguments.clip is None:
        raise ValueError("these models are conditioned on text: name a CLIP to measure with (--clip)")
    else:
        features = ClipFeatures.load(arguments.clip, prompts.prompts, arguments.device)
        reference = Reference(features, real_images(data))
    arguments.output.mkdir(parents=True, exist_ok=True)
    identity = {
        "teacher": digest(arguments.teacher),
        "student": digest(arguments.student),
        "data": data.name,
        "features": reference.features.name,
    } | ({} if prompts is None else {"prompts": arguments.prompts})
    cache = arguments.output / "points.jsonl"
    rows = measure_frontier(
        teacher, student, chosen, reference, grid, cache, identity, arguments.speed_batch_size, prompts
    )

    distance = reference.features.distance_names[0]
    best = min((row for row in rows if row["sampler"] != STUDENT), key=lambda row: row[distance])
    student_row = rows[0]
    protocol = {
        "Images": f"{grid.num_report_images} for every row, against {len(reference.real_features)} of {data.name}; "
        f"the teacher's temperature chosen from {grid.temperatures} on another draw of {grid.num_tuning_images}",
        "Features": reference.features.name,
        "Speed": f"median of {SPEED_ROUNDS} interleaved rounds, batch of {arguments.speed_batch_size}, images decoded; "
        + ", ".join(f"{key} {value}" for key, value in machine(arguments.device).items()),
        "Versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "clean-fid")),
    }
    plot = frontier_plot(rows, distance, STUDENT)
    plot.save(arguments.output / "frontier.png")
    write_frontier_page(arguments.output / "frontier.html", rows, plot, distance, STUDENT, protocol)
    write_csv(rows, arguments.output / "frontier.csv")
    summary = {
        "student": student_row,
        "best_teacher": best,
        "ratio": student_row[distance] / best[distance],
        "speedup": student_row["images_per_second"] / best["images_per_second"],
        "protocol": protocol,
    }
    (arguments.output / "frontier.json").write_text(json.dumps({"rows": rows, **summary}, indent=2))
    for row in sorted(rows, key=lambda row: row["nfe"]):
        if row["on_frontier"] or row is student_row:
            guidance = f"guidance {row['guidance_scale']:g}" if "guidance_scale" in row else ""
            print(f"{row['sampler']:32}{row['setting']:16}{guidance:14}NFE {row['nfe']:6.1f}  {row[distance]:8.3f}")
    if arguments.save_best:
        save_default(arguments.teacher, best)
    print(f"\npage: {arguments.output / 'frontier.html'}")
    print(json.dumps(summary))


def save_default(folder: Path, row: dict[str, Any]) -> None:
    """Make a row's sampler, guidance and temperature the defaults of the pipeline in the folder."""
    teacher = load_pipeline(folder)
    settings = dict(row["sampler_settings"])
    sampler = getattr(samplers, settings.pop("class"))(**settings)
    teacher.register_modules(sampler=sampler)
    teacher.register_to_config(guidance_scale=row["guidance_scale"], temperature=row["temperature"])
    sampler.save_pretrained(folder / "sampler")
    teacher.save_config(folder)


def digest(folder: Path) -> str:
    """Of a pipeline's weights."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*/*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()

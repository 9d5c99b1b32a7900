"""Speed, memory and quality of a student and its teacher.

A one-step student is timed against its teacher, the frontier of the teacher's samplers is drawn beside the student, or
the training step or its loss is timed against the order of the authors' loop.

    python scripts/benchmark.py sample --teacher runs/digits/teacher/pipeline --student runs/digits/one-step
    python scripts/benchmark.py frontier --teacher runs/digits/teacher/pipeline --student runs/digits/one-step \\
        --output runs/digits/frontier
    python scripts/benchmark.py step --baseline
    python scripts/benchmark.py loss
    python scripts/benchmark.py memory

The last line of stdout is one JSON object.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from distill.benchmark.loss import loss_table, measure_loss
from distill.benchmark.memory import SIZES, measure_memory, memory_table
from distill.benchmark.step import measure_step, step_table
from distill.config import load_config
from distill.jobs.command import run
from distill.jobs.student import TEACHER_DTYPES
from distill.loop.config import TrainingConfig
from eval.clip_score import ClipFeatures
from eval.frontier import choose_samplers, frontier_table, measure_frontier, save_default, write_frontier
from eval.inception import add_inception_options, check_num_images
from eval.real import data_like, make_features, make_reference, names_size, settings_like
from eval.sampling import DTYPES, add_device_options, device_of, json_digest, open_pipeline
from eval.speed import VARIANTS, compare_speed, speed_table
from eval.tuning import Grid
from students.initialisation import TokenInitialiser
from students.pipeline import OneStepPipeline
from teachers.conditions.prompts import PromptConfig, Prompts, load_prompts
from teachers.cost import machine
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.released.sizes import RELEASED, random_components


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed, memory and quality of a student and its teacher.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, function, text in [
        ("sample", sample, "time a student against its teacher"),
        ("frontier", frontier, "quality against compute of every sampler of the teacher, and of the student"),
    ]:
        options = kinds.add_parser(kind, help=text, description=text.capitalize() + ".")
        options.set_defaults(function=function)
        required = kind == "frontier"
        options.add_argument("--teacher", required=required, help="a MaskedDiffusionPipeline: a folder, or a hub id")
        options.add_argument("--student", required=required, help="a OneStepPipeline: a folder, or a hub id")
        options.add_argument("--prompts", nargs="+", metavar="key=value", help="for text: name=, split=, column=")
        add_device_options(options)
    for kind, function, text in [
        ("step", step, "time the training step of Di[M]O"),
        ("loss", loss, "time the way from the last hidden states to their gradients, and its memory"),
    ]:
        options = kinds.add_parser(kind, help=text, description=text.capitalize() + ".")
        options.set_defaults(function=function)
        options.add_argument("--batch-size", type=int, default=4)
        options.add_argument("--token-grid", type=int, nargs=2, default=[16, 16])
        options.add_argument("--guidance-scale", type=float, default=2.0, help="of the teacher; 1 is none")
        options.add_argument("--num-repeats", type=int, default=7, help="interleaved rounds")
    add_step_options(kinds.choices["step"])
    add_loss_options(kinds.choices["loss"])
    text = "the memory of training and sampling at the sizes of released teachers"
    options = kinds.add_parser("memory", help=text, description=text.capitalize() + ", worked out without a GPU.")
    options.set_defaults(function=memory)
    add_memory_options(options)
    add_sample_options(kinds.choices["sample"])
    add_frontier_options(kinds.choices["frontier"])
    arguments = parser.parse_args()
    run(lambda: arguments.function(arguments))


def add_sample_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--random", choices=RELEASED, help="untrained models of a released size")
    options.add_argument("--variants", nargs="+", default=[], choices=VARIANTS, help="the student in other ways, too")
    options.add_argument("--steps", type=int, nargs="+", help="of the teacher; default: 1 to 32, as its tokens allow")
    options.add_argument("--guidance-scale", type=float, default=1.0, help="of the teacher; above 1 counts twice")
    options.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 256])
    options.add_argument("--num-repeats", type=int, default=10)


def add_step_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--baseline", action="store_true", help="beside the order of the authors' loop")
    options.add_argument("--codebook-size", type=int, default=1024)
    options.add_argument("--hidden-size", type=int, default=384)
    options.add_argument("--num-layers", type=int, default=6)
    options.add_argument("--adapter-rank", type=int, default=16, help="of the step with adapters")
    options.add_argument("settings", nargs="*", metavar="key=value", help="of the loop, e.g. mixed_precision=bf16")


def add_loss_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--codebook-sizes", type=int, nargs="+", default=[1025, 8192])
    options.add_argument("--hidden-size", type=int, default=256)


def add_memory_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options.add_argument("--adapter-rank", type=int, default=16, help="of the rows with adapters")
    options.add_argument("--teacher-dtype", choices=TEACHER_DTYPES, default="float32", help="in training")


def add_frontier_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--output", type=Path, required=True, help="folder; run again, it goes on where it stopped")
    options.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="key=value",
        help="the real images, e.g. name=folder; size and colours follow",
    )
    options.add_argument("--features", choices=["classifier", "inception"], default="classifier", help="FD, or FID")
    options.add_argument("--clip", help="for models of text: the CLIP (folder or hub id) of FD and CLIP score")
    options.add_argument("--classifier", type=Path, default=Path("runs/classifier"), help="where it is kept")
    add_inception_options(options)
    options.add_argument("--samplers", nargs="+", metavar="NAME", help="some of them; default: all")
    options.add_argument("--guidance-scales", type=float, nargs="+", default=[1.0, 1.25])
    options.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.8, 0.6, 0.4])
    options.add_argument("--num-tuning-images", type=int, default=1000)
    options.add_argument("--num-report-images", type=int, default=2000)
    options.add_argument("--speed-batch-size", type=int, default=128, help="of the timings")
    options.add_argument("--save-best", action="store_true", help="make the best setting the teacher folder's default")


def sample(arguments: argparse.Namespace) -> None:
    if arguments.random:
        teacher = MaskedDiffusionPipeline(**random_components(arguments.random))
        teacher = teacher.to(device_of(arguments), DTYPES[arguments.dtype])
        initialiser = TokenInitialiser.for_teacher(teacher, random_tokens="uniform")
        student = OneStepPipeline(teacher.denoiser, teacher.tokenizer, initialiser)
    elif arguments.teacher and arguments.student:
        teacher, student = (open_pipeline(folder, arguments) for folder in (arguments.teacher, arguments.student))
    else:
        raise ValueError("name a --teacher and a --student, or the size of --random ones")
    rows, summary = compare_speed(
        teacher,
        student,
        variants=arguments.variants,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        batch_sizes=arguments.batch_sizes,
        num_repeats=arguments.num_repeats,
        conditions=prompts_of(teacher, arguments),
    )
    print(speed_table(rows))
    print(summary)
    protocol = machine(teacher.device) | {"dtype": arguments.dtype, "num_repeats": arguments.num_repeats}
    print(json.dumps({"rows": rows, "protocol": protocol}))


def step(arguments: argparse.Namespace) -> None:
    settings = load_config(TrainingConfig, overrides=[f"batch_size={arguments.batch_size}", *arguments.settings])
    rows, protocol = measure_step(
        tuple(arguments.token_grid),
        arguments.codebook_size,
        arguments.hidden_size,
        arguments.num_layers,
        arguments.guidance_scale,
        settings,
        adapter_rank=arguments.adapter_rank,
        baseline=arguments.baseline,
        num_repeats=arguments.num_repeats,
    )
    print(step_table(rows))
    print(json.dumps({"rows": rows, "protocol": protocol | asked_for(arguments)}))


def loss(arguments: argparse.Namespace) -> None:
    rows = measure_loss(
        arguments.codebook_sizes,
        arguments.num_repeats,
        batch_size=arguments.batch_size,
        token_grid=tuple(arguments.token_grid),
        hidden_size=arguments.hidden_size,
        guidance_scale=arguments.guidance_scale,
    )
    print(loss_table(rows))
    print(json.dumps({"rows": rows, "protocol": machine("cpu") | asked_for(arguments)}))


def memory(arguments: argparse.Namespace) -> None:
    rows = measure_memory(arguments.sizes, arguments.adapter_rank, arguments.teacher_dtype)
    print(memory_table(rows))
    print(json.dumps({"rows": rows, "protocol": asked_for(arguments)}))


def frontier(arguments: argparse.Namespace) -> None:
    if arguments.save_best and not Path(arguments.teacher).is_dir():
        raise ValueError(f"--save-best changes a folder, and {arguments.teacher} is none")
    teacher, student = (open_pipeline(folder, arguments) for folder in (arguments.teacher, arguments.student))
    chosen = choose_samplers(teacher.token_grid, arguments.samplers)
    grid = Grid(
        tuple(arguments.temperatures),
        tuple(arguments.guidance_scales),
        (),
        arguments.num_tuning_images,
        arguments.num_report_images,
    )
    config, prompts = settings_like(teacher, arguments.data), prompts_of(teacher, arguments)
    data = data_like(teacher, config, may_enlarge=names_size(arguments.data))
    if prompts is None:
        if arguments.features == "inception":
            generated = min(arguments.num_tuning_images, arguments.num_report_images)
            check_num_images(arguments, generated_images=generated, real_images=len(data))
        network = arguments.features, arguments.inception_path, teacher.device
        features = make_features(config, arguments.classifier, *network, class_names=teacher.class_names)
    elif arguments.clip is None:
        raise ValueError("these models are conditioned on text: name a CLIP to measure with (--clip)")
    else:
        features = ClipFeatures.load(arguments.clip, prompts.prompts, teacher.device)
    reference = make_reference(features, config)
    arguments.output.mkdir(parents=True, exist_ok=True)
    about = {"reference": reference.source}
    if prompts is not None:
        about |= {"prompts": arguments.prompts, "prompts_sha256": json_digest(prompts.prompts)}
    cache, batch_size = arguments.output / "points.jsonl", arguments.speed_batch_size
    rows = measure_frontier(teacher, student, chosen, reference, grid, cache, about, batch_size, prompts)
    summary = write_frontier(rows, arguments.output, reference, grid, batch_size, teacher, student)
    print(frontier_table(rows, reference.features.distance_names[0]))
    if arguments.save_best:
        save_default(Path(arguments.teacher), summary["best_teacher"])
    print(f"\npage: {arguments.output / 'frontier.html'}")
    print(json.dumps(summary))


def prompts_of(teacher: MaskedDiffusionPipeline, arguments: argparse.Namespace) -> Prompts | None:
    if teacher.condition_kind != "text":
        return None
    if not arguments.prompts:
        raise ValueError("these models are conditioned on text: name prompts with --prompts")
    return Prompts(teacher, load_prompts(load_config(PromptConfig, overrides=arguments.prompts)))


def asked_for(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, without the function that does it."""
    return {key: value for key, value in vars(arguments).items() if key not in ("function", "kind")}


if __name__ == "__main__":
    main()

"""Quality against compute: a teacher under every sampler and setting, and the one-step student beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from eval.evaluate import Reference
from eval.files import write_json, write_picture
from eval.report import frontier_plot, write_frontier_page
from eval.sampling import pipeline_digest
from eval.speed import measure_speed, sampler_overhead
from eval.tuning import Grid, tune_and_measure
from students.loading import load_pipeline
from students.pipeline import OneStepPipeline
from teachers import samplers as all_samplers
from teachers.component import settings_of, weights_digest
from teachers.conditions.condition import Conditions
from teachers.cost import machine
from teachers.folder import new_file, renewed_folder
from teachers.guidance import check_guidance
from teachers.pipeline import MaskedDiffusionPipeline, TokenPipeline
from teachers.progress import progress_bar
from teachers.samplers import (
    ConfidenceThresholdSampler,
    EntropyBoundedSampler,
    FirstHittingSampler,
    HaltonSampler,
    MaskGITSampler,
    PUNTSampler,
    ReMDMSampler,
    Sampler,
    SelfCorrectionSampler,
)

STUDENT = "one-step student"
SPEED_ROUNDS = 3


def samplers_to_try(token_grid: tuple[int, int]) -> dict[str, list[Sampler]]:
    """Each sampler over its settings, from few evaluations to many, for images of h x w tokens."""
    length = token_grid[0] * token_grid[1]
    steps = [steps for steps in (1, 2, 4, 8, 16, 32) if steps <= length]
    many = [steps for steps in steps if steps >= 8]
    # Of few tokens the default fractions are hardly one in all steps together.
    corrections = [SelfCorrectionSampler().config.fractions, (1 / 16, 1 / 32, 1 / 64)]
    samplers: dict[str, list[Sampler]] = {
        "random order": [MaskGITSampler(k, order="random") for k in steps],
        "confidence": [MaskGITSampler(k, order="confidence") for k in steps[1:]],
        "Halton": [HaltonSampler(token_grid, k) for k in steps[1:]],
        "self-correction": [SelfCorrectionSampler(k, fractions=fractions) for k in many for fractions in corrections],
        "self-correction, leave one out": [
            SelfCorrectionSampler(8, fractions=fractions, score="leave_one_out") for fractions in corrections
        ],
        "ReMDM": [ReMDMSampler(k, eta=eta) for k in (16, 32) for eta in (0.02, 0.1)],
        "entropy bound": [EntropyBoundedSampler(bound * length) for bound in (0.1, 0.3)],
        "confidence threshold": [ConfidenceThresholdSampler(threshold) for threshold in (0.1, 0.3)],
        "PUNT": [PUNTSampler(epsilon) for epsilon in (0.1, 0.5, 2.0)],
        "PUNT, random order": [PUNTSampler(epsilon, order="random") for epsilon in (0.1, 0.5, 2.0)],
        "first hitting": [FirstHittingSampler()],
    }
    return {family: chosen for family, chosen in samplers.items() if chosen}


def choose_samplers(token_grid: tuple[int, int], names: Sequence[str] | None = None) -> dict[str, list[Sampler]]:
    """`samplers_to_try`, or those of these names alone; an unknown one is a ValueError."""
    samplers = samplers_to_try(token_grid)
    if unknown := set(names or []) - set(samplers):
        raise ValueError(f"there is no sampler {min(unknown)!r}; choose from {', '.join(samplers)}")
    return {name: samplers[name] for name in names or samplers}


def sampler_settings(sampler: Sampler) -> dict[str, Any]:
    """What a sampler is made of again: `getattr(samplers, settings.pop("class"))(**settings)`."""
    return {"class": type(sampler).__name__, **settings_of(sampler)}


def describe(sampler: Sampler) -> str:
    """What sets the sampler apart from others of its kind."""
    config = sampler.config
    if isinstance(sampler, PUNTSampler):
        return f"epsilon {config.epsilon:g}"
    if isinstance(sampler, EntropyBoundedSampler):
        return f"bound {config.entropy_bound:.3g}"
    if isinstance(sampler, ConfidenceThresholdSampler):
        return f"threshold {config.threshold:g}"
    if isinstance(sampler, FirstHittingSampler):
        return "a token a step"
    text = f"{config.num_inference_steps} step" + ("s" if config.num_inference_steps > 1 else "")
    if isinstance(sampler, SelfCorrectionSampler):
        text += f", from 1/{1 / config.fractions[0]:g}"
    return f"{text}, eta {config.eta:g}" if isinstance(sampler, ReMDMSampler) else text


def measure_frontier(
    teacher: MaskedDiffusionPipeline,
    student: OneStepPipeline,
    samplers: dict[str, list[Sampler]],
    reference: Reference,
    grid: Grid,
    cache: Path,
    about: dict[str, Any],
    speed_batch_size: int = 128,
    conditions: Conditions | None = None,
) -> list[dict[str, Any]]:
    """A row for each sampler, setting and guidance scale, and for the student: what it costs and how good it is.

    The teacher's temperature is tuned for each on one draw of images, the row is of another; the student has the
    temperature it was exported with. `grid.num_steps` is not used. Rows are kept in `cache` (a line each) under their
    settings, the weights of both and what the measurement is `about`, and not measured twice. `conditions` are what to
    generate from, by default all classes.
    """
    for guidance_scale in grid.guidance_scales:
        check_guidance(teacher.denoiser, guidance_scale)
    points: list[tuple[str, str, float, dict[str, Any]]] = [(STUDENT, "", 1.0, {})]
    pipelines: list[MaskedDiffusionPipeline | OneStepPipeline] = [student]
    for guidance_scale in grid.guidance_scales:
        for family, chosen in samplers.items():
            for sampler in chosen:
                points.append((family, describe(sampler), guidance_scale, sampler_settings(sampler)))
                pipelines.append(MaskedDiffusionPipeline(teacher.denoiser, teacher.tokenizer, sampler))

    identity = about | {"features": reference.features.name}
    identity |= {"teacher": _weights(teacher), "student": _weights(student)}
    kept = _read_cache(cache)
    rows = []
    bar = progress_bar(zip(points, pipelines, strict=True), total=len(points), desc="frontier", unit="setting")
    for (family, setting, guidance_scale, settings), pipeline in bar:
        key = json.dumps([family, guidance_scale, settings, asdict(grid) | {"guidance_scales": None}, identity])
        if key not in kept:
            if family == STUDENT:
                candidates = [{"temperature": student.config.temperature}]
            else:
                candidates = [{"guidance_scale": guidance_scale, **tried} for tried in grid.student_settings()]
            name = f"{family} {setting}".strip()
            kept[key] = tune_and_measure(pipeline, candidates, reference, grid, name, conditions=conditions)
            with cache.open("a") as file:
                file.write("\n" + json.dumps({"key": key, "row": kept[key]}))  # below a line that was torn
        measured = {name: value for name, value in kept[key].items() if name not in ("settings", "tuning")}
        call = kept[key]["settings"]
        rows.append({"sampler": family, "setting": setting, "sampler_settings": settings, **call, **measured})

    calls = [(pipeline, _call(row)) for pipeline, row in zip(pipelines, rows, strict=True)]
    candidates = {str(place): call for place, call in enumerate(calls)}
    speeds = measure_speed(
        candidates,
        batch_sizes=[speed_batch_size],
        num_repeats=SPEED_ROUNDS,
        conditions=conditions,
        progress=partial(print, "timing:", flush=True),
    )
    timed = progress_bar(zip(rows, speeds, calls, strict=True), total=len(rows), desc="overhead", unit="setting")
    for row, speed, call in timed:
        row["images_per_second"] = speed["images_per_second"]
        row["sampler_overhead"] = sampler_overhead(*call, speed_batch_size, conditions)
    distance = reference.features.distance_names[0]
    mark_frontier(rows, distance)
    return rows


def _weights(pipeline: TokenPipeline) -> dict[str, str]:
    components = pipeline.components.items()
    return {name: weights_digest(component) for name, component in components if isinstance(component, nn.Module)}


def _call(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("temperature", "guidance_scale") if name in row}


def _read_cache(cache: Path) -> dict[str, dict[str, Any]]:
    """What is there; a line that an interruption tore is left out."""
    kept = {}
    for line in cache.read_text().splitlines() if cache.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        kept[entry["key"]] = entry["row"]
    return kept


def mark_frontier(rows: list[dict[str, Any]], distance: str) -> None:
    """Mark the teacher's rows that no other one beats in distance and cost: in evaluations (`on_frontier`), in time
    (`on_speed_frontier`)."""
    teacher = [row for row in rows if row["sampler"] != STUDENT]
    for mark, cost, sign in [("on_frontier", "nfe", 1), ("on_speed_frontier", "images_per_second", -1)]:
        points = [(sign * row[cost], row[distance]) for row in teacher]
        for row in rows:
            here = (sign * row[cost], row[distance])
            beaten = any(x <= here[0] and y <= here[1] and (x, y) != here for x, y in points)
            row[mark] = row["sampler"] != STUDENT and not beaten


def write_frontier(
    rows: list[dict[str, Any]],
    folder: Path,
    reference: Reference,
    grid: Grid,
    speed_batch_size: int,
    teacher: MaskedDiffusionPipeline,
    student: OneStepPipeline,
) -> dict[str, Any]:
    """Write the rows of `measure_frontier` as frontier.html, .png, .csv and .json; the summary that is in the last."""
    distance = reference.features.distance_names[0]
    best = min((row for row in rows if row["sampler"] != STUDENT), key=lambda row: row[distance])
    measured = rows[0]
    protocol = {
        "Images": f"{grid.num_report_images} for every row, against {reference.source}; "
        f"the teacher's temperature chosen from {grid.temperatures} on another draw of {grid.num_tuning_images}",
        "Features": reference.features.name,
        "Models": f"teacher {pipeline_digest(teacher)}, student {pipeline_digest(student)} (sha256), "
        + str(teacher.dtype).removeprefix("torch."),
        "Speed": f"median of {SPEED_ROUNDS} interleaved rounds, batch of {speed_batch_size}, images decoded; "
        + ", ".join(f"{key} {value}" for key, value in machine(teacher.device).items()),
        "Versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "clean-fid")),
    }
    plot = frontier_plot(rows, distance, STUDENT)
    write_picture(folder / "frontier.png", plot)
    write_frontier_page(folder / "frontier.html", rows, plot, distance, STUDENT, protocol)
    write_csv(rows, folder / "frontier.csv")
    summary = {
        "student": measured,
        "best_teacher": best,
        "ratio": measured[distance] / best[distance],
        "speedup": measured["images_per_second"] / best["images_per_second"],
        "protocol": protocol,
    }
    write_json(folder / "frontier.json", {"rows": rows, **summary})
    return summary


def frontier_table(rows: list[dict[str, Any]], distance: str) -> str:
    """The student and the frontier as text."""
    lines = []
    for row in sorted(rows, key=lambda row: row["nfe"]):
        if row["on_frontier"] or row["sampler"] == STUDENT:
            guidance = f"guidance {row['guidance_scale']:g}" if "guidance_scale" in row else ""
            lines.append(
                f"{row['sampler']:32}{row['setting']:16}{guidance:14}NFE {row['nfe']:6.1f}  {row[distance]:8.3f}"
            )
    return "\n".join(lines)


def save_default(folder: Path, row: dict[str, Any]) -> None:
    """Make a row's sampler, guidance and temperature the defaults of the pipeline in the folder."""
    teacher = load_pipeline(folder)
    settings = dict(row["sampler_settings"])
    sampler = getattr(all_samplers, settings.pop("class"))(**settings)
    teacher.register_modules(sampler=sampler)
    teacher.register_to_config(guidance_scale=row["guidance_scale"], temperature=row["temperature"])
    with renewed_folder(folder / "sampler") as staging:
        sampler.save_pretrained(staging)
    with renewed_folder(folder) as staging:
        teacher.save_config(staging)


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row if name != "sampler_settings"))
    with new_file(path) as staging, staging.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)

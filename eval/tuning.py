"""A sampler's best settings: chosen on one draw of images, reported on another."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from eval.distances import MIN_SAMPLES, check_num_samples
from eval.evaluate import Reference, generate_features
from teachers.conditions.condition import Conditions
from teachers.pipeline import TokenPipeline

TUNING_SEED, REPORT_SEED = 0, 1


@dataclass(frozen=True)
class Grid:
    """Settings to try, and how many images to judge them by.

    Step counts past the number of tokens are left out: each step reveals a token at least, so they change nothing.
    """

    temperatures: tuple[float, ...]
    guidance_scales: tuple[float, ...]
    num_steps: tuple[int, ...]
    num_tuning_images: int
    num_report_images: int

    def teacher_settings(self, num_steps: int) -> list[dict[str, Any]]:
        return [
            {"num_inference_steps": num_steps, "guidance_scale": guidance_scale, "temperature": temperature}
            for guidance_scale, temperature in product(self.guidance_scales, self.temperatures)
        ]

    def student_settings(self) -> list[dict[str, Any]]:
        return [{"temperature": temperature} for temperature in self.temperatures]


def tune_and_measure(
    pipeline: TokenPipeline,
    candidates: list[dict[str, Any]],
    reference: Reference,
    grid: Grid,
    name: str,
    at_least: dict[str, float] | None = None,
    conditions: Conditions | None = None,
) -> dict[str, Any]:
    """The candidate with the lowest Fréchet distance on the tuning draw, measured in full on the report draw.

    Only candidates with measures (by name) of `at_least` that much on the tuning draw are considered, unless there are
    none. `conditions` are what to generate from, by default all classes. Too few images, generated or real, are a
    ValueError.

    Returns {"settings", "nfe", measures ..., "tuning": [{settings ..., measures ...} for each candidate]}.
    """
    check_num_samples(2, images_to_tune_by=grid.num_tuning_images)
    check_num_samples(MIN_SAMPLES, images_to_report=grid.num_report_images, real_images=len(reference.real_features))
    distance, _ = reference.features.distance_names
    tuning = []
    for number, settings in enumerate(candidates):
        description = f"{name}: tuning {number + 1}/{len(candidates)}"
        features, rows, _ = generate_features(
            pipeline,
            reference.features,
            grid.num_tuning_images,
            conditions=conditions,
            seed=TUNING_SEED,
            description=description,
            **settings,
        )
        tuning.append(settings | reference.judge(features, rows))
    allowed = [
        number
        for number, measures in enumerate(tuning)
        if all(measures[measure] >= least for measure, least in (at_least or {}).items())
    ]
    best = min(allowed or range(len(candidates)), key=lambda number: tuning[number][distance])
    features, rows, nfe = generate_features(
        pipeline,
        reference.features,
        grid.num_report_images,
        conditions=conditions,
        seed=REPORT_SEED,
        description=f"{name}: measuring",
        **candidates[best],
    )
    return {"settings": candidates[best], "nfe": nfe, **reference.measure(features, rows), "tuning": tuning}

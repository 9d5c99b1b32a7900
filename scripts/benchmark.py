"""Time a one-step student against its teacher.

    python scripts/benchmark.py --teacher runs/digits/teacher/pipeline --student runs/digits/one-step

The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import platform
from pathlib import Path

import torch

from distill.command import run
from eval.speed import measure_speed, speed_table
from students.loading import load_pipeline

STEPS = [1, 2, 4, 8, 16, 32]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a one-step student against its teacher.")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of a MaskedDiffusionPipeline")
    parser.add_argument("--student", type=Path, required=True, help="folder of a OneStepPipeline")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="of the teacher")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="of the teacher; above 1 counts twice")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--num-repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run(lambda: benchmark(parser.parse_args()))


def benchmark(arguments: argparse.Namespace) -> None:
    teacher = load_pipeline(arguments.teacher).to(arguments.device)
    student = load_pipeline(arguments.student).to(arguments.device)
    candidates = {"student": (student, {})}
    for steps in arguments.steps:
        settings = {"num_inference_steps": steps, "guidance_scale": arguments.guidance_scale}
        candidates[f"teacher, {steps} steps"] = (teacher, settings)
    rows = []
    for decode in (False, True):
        rows += measure_speed(
            candidates, batch_sizes=arguments.batch_sizes, num_repeats=arguments.num_repeats, decode=decode
        )
    print(speed_table(rows))
    protocol = {
        "device": torch.cuda.get_device_name()
        if arguments.device.startswith("cuda")
        else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "num_repeats": arguments.num_repeats,
        "torch": torch.__version__,
    }
    print(json.dumps({"rows": rows, "protocol": protocol}))


if __name__ == "__main__":
    main()

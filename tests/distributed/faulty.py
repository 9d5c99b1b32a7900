"""scripts/train_student.py with faults on `RANK_AT_FAULT`.

Its loss is not a number at the steps `FAULTY_STEPS`; it fails in the evaluations of the steps `FAULTY_EVALUATIONS`.
"""

import json
import os
import runpy
from pathlib import Path

from distill.methods.dimo import DiMO
from eval import monitor

losses, steps, generate = DiMO.losses, [], monitor.generate


def is_at_fault(what):
    return os.environ["RANK"] == os.environ["RANK_AT_FAULT"] and len(steps) in json.loads(os.environ.get(what, "[]"))


def faulty(self, *arguments):
    values, metrics = losses(self, *arguments)
    if is_at_fault("FAULTY_STEPS"):
        values["student"] = values["student"] * float("nan")
    steps.append(None)
    return values, metrics


def faulty_images(*arguments, **settings):
    if is_at_fault("FAULTY_EVALUATIONS"):
        raise RuntimeError("it has no images")
    return generate(*arguments, **settings)


DiMO.losses, monitor.generate = faulty, faulty_images
runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "train_student.py"), run_name="__main__")

"""scripts/train_student.py with a fault: the loss of `RANK_AT_FAULT` is not a number at the steps `FAULTY_STEPS`."""

import json
import os
import runpy
from pathlib import Path

from distill.methods.dimo import DiMO

losses, steps = DiMO.losses, []


def faulty(self, *arguments):
    values, metrics = losses(self, *arguments)
    if len(steps) in json.loads(os.environ["FAULTY_STEPS"]) and os.environ["RANK"] == os.environ["RANK_AT_FAULT"]:
        values["student"] = values["student"] * float("nan")
    steps.append(None)
    return values, metrics


DiMO.losses = faulty
runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "train_student.py"), run_name="__main__")

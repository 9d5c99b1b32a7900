"""Distil a teacher into a one-step student.

accelerate launch scripts/train_student.py --config configs/digits/student.yaml [key=value ...]
"""

from pathlib import Path

from distill.config import parse_arguments
from distill.jobs.command import run
from distill.jobs.student import StudentJob, train_student
from distill.loop.launch import run_processes
from eval.monitor import SampleMonitor


def main() -> None:
    job = parse_arguments(StudentJob, "Distil a teacher into a one-step student, by Di[M]O or another method.")
    run_processes(
        lambda: run(lambda: train_student(job, SampleMonitor(Path(job.output), job.monitor, job.scoring_clip)))
    )


if __name__ == "__main__":
    main()

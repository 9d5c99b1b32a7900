"""Distil a teacher into a one-step student with Di[M]O.

accelerate launch scripts/train_student.py --config configs/digits/student.yaml [key=value ...]
"""

from pathlib import Path

from distill.command import run
from distill.config import parse_arguments
from distill.launch import run_processes
from distill.student_job import StudentJob, train_student
from eval.monitor import SampleMonitor


def main() -> None:
    job = parse_arguments(StudentJob, "Distil a teacher into a one-step student with Di[M]O.")
    run_processes(
        lambda: run(lambda: train_student(job, SampleMonitor(Path(job.output), job.monitor, job.scoring_clip)))
    )


if __name__ == "__main__":
    main()

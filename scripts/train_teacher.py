"""Train a masked diffusion teacher.

accelerate launch scripts/train_teacher.py --config configs/digits/teacher.yaml [key=value ...]
"""

from pathlib import Path

from distill.config import parse_arguments
from distill.jobs.command import run
from distill.jobs.teacher import TeacherJob, train_teacher
from distill.loop.launch import run_processes
from eval.monitor import SampleMonitor


def main() -> None:
    job = parse_arguments(TeacherJob, "Train a masked diffusion teacher.")
    monitor = SampleMonitor(Path(job.output), job.data, job.scoring_clip)
    run_processes(lambda: run(lambda: train_teacher(job, monitor)))


if __name__ == "__main__":
    main()

"""Train a small CLIP on captioned images.

accelerate launch scripts/train_clip.py --config configs/emoji/clip.yaml
"""

from distill.config import parse_arguments
from distill.jobs.clip import CLIPJob, train_clip
from distill.jobs.command import run
from distill.loop.launch import run_processes
from eval.monitor import RetrievalMonitor


def main() -> None:
    job = parse_arguments(CLIPJob, "Train a small CLIP on captioned images.")
    run_processes(lambda: run(lambda: train_clip(job, RetrievalMonitor(job.monitor))))


if __name__ == "__main__":
    main()

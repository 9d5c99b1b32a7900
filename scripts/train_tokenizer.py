"""Train a VQ tokenizer on one's own images.

accelerate launch scripts/train_tokenizer.py --config configs/mnist/tokenizer.yaml [key=value ...]
"""

from pathlib import Path

from distill.config import parse_arguments
from distill.jobs.command import run
from distill.jobs.tokenizer import TokenizerJob, train_tokenizer
from distill.loop.launch import run_processes
from eval.monitor import ReconstructionMonitor


def main() -> None:
    job = parse_arguments(TokenizerJob, "Train a VQ tokenizer.")
    run_processes(lambda: run(lambda: train_tokenizer(job, ReconstructionMonitor(Path(job.output), job.data))))


if __name__ == "__main__":
    main()

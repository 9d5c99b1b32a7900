"""What a table of marginals loses that keeps the K most probable tokens of each class and position and one rest.

    PYTHONPATH=. python tests/scale/marginals.py runs/digits/teacher/pipeline --kept 8 16 32

Total variation to the teacher's own marginals, the mean over classes and positions and the largest; beside it, what the
teacher's marginals are like with guidance: their entropy, in nats.
"""

import argparse

import torch

from students import marginals
from students.initialisation import teacher_marginals
from students.marginals import MarginalTable
from teachers import MaskedDiffusionPipeline
from teachers.pipeline import all_classes

NUM_LEVELS = 2**14


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher")
    parser.add_argument("--kept", type=int, nargs="+", default=[8, 16, 32])
    arguments = parser.parse_args()
    teacher = MaskedDiffusionPipeline.from_pretrained(arguments.teacher)
    exact = torch.cat(list(teacher_marginals(teacher, all_classes(teacher))))
    num_classes, length, codebook_size = exact.shape
    uniform = ((torch.arange(NUM_LEVELS) + 0.5) / NUM_LEVELS)[:, None].expand(-1, length)
    for kept in arguments.kept:
        marginals.MAX_TABLE = kept * num_classes * length
        table = MarginalTable(num_classes, length, codebook_size)
        table.fill(exact.split(64))
        distances = []
        for label in range(num_classes):
            tokens = table(torch.full((NUM_LEVELS,), label), uniform)
            found = torch.stack([row.bincount(minlength=codebook_size) for row in tokens.T]) / NUM_LEVELS
            distances.append(0.5 * (found - exact[label]).abs().sum(-1))
        mass = exact.topk(kept).values.sum(-1).mean()
        distance = torch.stack(distances)
        print(f"{kept} of {codebook_size} kept: {mass:.1%} of the mass; total variation {distance.mean():.4f}, "
              f"at most {distance.max():.4f}")  # fmt: skip
    masks = torch.full((num_classes, length), teacher.mask_token_id)
    for scale in (1.0, 1.25, 2.0):
        logits = teacher.denoise(masks, all_classes(teacher).condition(torch.arange(num_classes), "cpu"), scale)
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean()
        print(f"guidance {scale:g}: entropy {entropy:.3f}")


if __name__ == "__main__":
    main()

"""CLIP score: how well images go with their captions (arXiv 2104.08718). Shapes: N images, P width of the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPProcessor

from teachers.component import weights_digest
from teachers.conditions.prompts import clean_prompts, tokenize

NUM_CAPTIONS = 32
BATCH_SIZE = 256


class ClipFeatures:
    """A CLIP of transformers, by hub id or folder: embeddings of images, which are features too, and of captions.

    With captions (M) it judges embeddings of images made from them; those in use are embedded, each once.
    """

    distance_names = ("fd", "kd")

    def __init__(self, model: CLIPModel, processor: CLIPProcessor, name: str, captions: Sequence[str] | None = None):
        self.model, self.processor = model.eval(), processor
        self.name = f"image embeddings of the CLIP {name} (weights {weights_digest(model)[:12]})"
        self.captions = captions
        self._embedded: dict[str, torch.Tensor] = {}

    @classmethod
    def load(
        cls, name: str | Path, captions: Sequence[str] | None = None, device: torch.device | str = "cpu"
    ) -> ClipFeatures:
        """Raises FileNotFoundError if there is none."""
        try:
            model, processor = CLIPModel.from_pretrained(name).to(device), CLIPProcessor.from_pretrained(name)
        except OSError as error:
            raise FileNotFoundError(f"there is no CLIP at {name} (a folder, or a hub id): {error}") from error
        return cls(model, processor, str(name), captions)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) in [0, 1] -> embeddings (N, P), of any length."""
        embeddings = []
        for part in images.split(BATCH_SIZE):
            pixels = list((255 * part).round().byte().expand(-1, 3, -1, -1).cpu())
            pixels = self.processor.image_processor(pixels, return_tensors="pt").pixel_values
            vision = self.model.vision_model(pixels.to(self.model.device))
            embeddings.append(self.model.visual_projection(vision.pooler_output).float().cpu())
        return torch.cat(embeddings)

    @torch.no_grad()
    def embed_captions(self, captions: list[str]) -> torch.Tensor:
        """Captions -> embeddings (N, P) of length one."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._embedded]
        for start in range(0, len(new), BATCH_SIZE):
            part = new[start : start + BATCH_SIZE]
            tokens, _ = tokenize(self.processor.tokenizer, clean_prompts(part))
            text = self.model.text_model(tokens.to(self.model.device))
            embeddings = self.model.text_projection(text.pooler_output).float().cpu()
            self._embedded |= zip(part, F.normalize(embeddings, dim=-1), strict=True)
        return torch.stack([self._embedded[caption] for caption in captions])

    def num_cut(self) -> int:
        """How many of its captions are longer than what the CLIP sees of them."""
        captions = self.captions or []
        parts = (captions[start : start + BATCH_SIZE] for start in range(0, len(captions), BATCH_SIZE))
        return sum(tokenize(self.processor.tokenizer, clean_prompts(part))[1] for part in parts)

    def judge(self, features: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
        """CLIP score and retrieval accuracy of image embeddings (N, P) of the captions in `rows` (N,)."""
        if self.captions is None:
            return {}
        captions = [self.captions[row] for row in rows.tolist()]
        place = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
        distinct, own = self.embed_captions(list(place)), torch.tensor([place[caption] for caption in captions])
        accuracy = retrieval_accuracy(features, distinct, own)
        return clip_score(features, distinct[own]) | {"retrieval_accuracy": accuracy}


def clip_score(images: torch.Tensor, captions: torch.Tensor) -> dict[str, float]:
    """Mean cosine of image embeddings (N, P) and those of their captions (N, P), and its standard error.

    The CLIP score that others report is 100 times that (less what falls below zero of a single image).
    """
    cosine = F.cosine_similarity(images, captions)
    return {"clip_score": cosine.mean().item(), "clip_score_error": (cosine.std() / len(cosine) ** 0.5).item()}


def retrieval_accuracy(
    images: torch.Tensor, captions: torch.Tensor, rows: torch.Tensor, num_captions: int = NUM_CAPTIONS
) -> float:
    """How often an image embedding (N, P) is closest to its own caption, in `rows` (N,) of the captions (M, P), among
    that and `num_captions` - 1 different ones, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    others = draw_others(rows, len(captions), min(num_captions, len(captions)) - 1, generator)
    candidates = torch.cat([rows[:, None], others], dim=1)
    num_right = 0
    for part, drawn in zip(images.split(BATCH_SIZE), candidates.split(BATCH_SIZE), strict=True):
        similarity = torch.einsum("np,nkp->nk", part, captions[drawn])
        num_right += int((similarity.argmax(-1) == 0).sum())
    return num_right / len(images)


def draw_others(own: torch.Tensor, num_rows: int, num_drawn: int, generator: torch.Generator) -> torch.Tensor:
    """For each of the rows (N,) so many different other ones (N, num_drawn), all sets of them equally likely.

    By Floyd's algorithm, which never lists all rows.
    """
    drawn = torch.empty(len(own), num_drawn, dtype=torch.long)
    for place in range(num_drawn):
        last = num_rows - 1 - num_drawn + place
        number = torch.randint(last + 1, own.shape, generator=generator)
        is_there = (drawn[:, :place] == number[:, None]).any(1)
        drawn[:, place] = torch.where(is_there, last, number)
    return drawn + (drawn >= own[:, None])  # past one's own

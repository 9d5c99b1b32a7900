"""CLIP score: how well images go with their captions (arXiv 2104.08718). Shapes: N images, P width of the embedding."""

from __future__ import annotations

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

    With captions (M) it judges embeddings of images made from them.
    """

    distance_names = ("fd", "kd")

    def __init__(self, model: CLIPModel, processor: CLIPProcessor, name: str, captions: list[str] | None = None):
        self.model, self.processor = model.eval(), processor
        self.name = f"image embeddings of the CLIP {name} (weights {weights_digest(model)[:12]})"
        self.captions, self.num_cut = (None, 0) if captions is None else self.embed_captions(captions)

    @classmethod
    def load(
        cls, name: str | Path, captions: list[str] | None = None, device: torch.device | str = "cpu"
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
    def embed_captions(self, captions: list[str]) -> tuple[torch.Tensor, int]:
        """Captions -> embeddings (N, P) of length one, and how many of the captions were cut."""
        tokens, num_cut = tokenize(self.processor.tokenizer, clean_prompts(captions))
        embeddings = []
        for part in tokens.to(self.model.device).split(BATCH_SIZE):
            text = self.model.text_model(part)
            embeddings.append(self.model.text_projection(text.pooler_output).float().cpu())
        return F.normalize(torch.cat(embeddings), dim=-1), num_cut

    def judge(self, features: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
        """CLIP score and retrieval accuracy of image embeddings (N, P) of the captions in `rows` (N,)."""
        if self.captions is None:
            return {}
        accuracy = retrieval_accuracy(features, self.captions, rows)
        return clip_score(features, self.captions[rows]) | {"retrieval_accuracy": accuracy}


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
    num_captions = min(num_captions, len(captions))
    generator = torch.Generator().manual_seed(0)
    others = torch.rand(len(images), len(captions), generator=generator)
    others[torch.arange(len(images)), rows] = -1  # comes first
    candidates = others.argsort(-1)[:, :num_captions]
    similarity = torch.einsum("np,nkp->nk", F.normalize(images, dim=-1), captions[candidates])
    return (similarity.argmax(-1) == 0).double().mean().item()

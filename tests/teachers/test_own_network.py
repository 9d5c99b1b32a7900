"""A network of a user's own, conditioned on text, with the interface that docs/guide.md says."""

from typing import ClassVar

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from tiny_text import CODEBOOK_SIZE, tiny_text_encoder, tiny_vq
from torch import nn

from distill.config import load_config
from distill.jobs.student import StudentJob, load_student, train_student
from teachers import MaskedDiffusionPipeline, MaskGITSampler, VQTokenizer


class OwnNetwork(ModelMixin, ConfigMixin):
    condition_kind: ClassVar = "text"
    token_kind: ClassVar = "categorical"
    text_sizes = (16, 16)

    @register_to_config
    def __init__(self, codebook_size: int, token_grid: tuple[int, int]):
        super().__init__()
        self.mask_token_id = codebook_size
        self.embedding = nn.Embedding(codebook_size + 1, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16)])
        self.head = nn.Linear(16, codebook_size)

    def forward(self, tokens, condition, perturb=None, positions=None):
        hidden = tokens if tokens.is_floating_point() else self.embed(tokens)
        hidden = hidden if perturb is None else perturb(hidden)
        hidden = hidden + condition.pooled[:, None] + hidden.mean(1, keepdim=True)
        for layer in self.layers:
            hidden = layer(hidden).relu()
        return self.head(hidden if positions is None else hidden.flatten(0, 1)[positions])

    def embed(self, tokens):
        return self.embedding(tokens)

    def embedding_parameters(self):
        yield from self.embedding.parameters()


@pytest.fixture
def own():
    torch.manual_seed(0)
    tokenizer = VQTokenizer.wrap(tiny_vq(), (4, 4))
    return MaskedDiffusionPipeline(
        OwnNetwork(CODEBOOK_SIZE, (4, 4)).eval(), tokenizer.eval(), MaskGITSampler(4), *tiny_text_encoder()
    )


def pictures(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline(["house", "a red apple"], guidance_scale=2.0, generator=generator, output_type="pt").images


def test_it_takes_prompts_saves_opens_and_is_distilled(own, tmp_path):
    own.save_pretrained(tmp_path / "teacher")
    opened = MaskedDiffusionPipeline.from_pretrained(tmp_path / "teacher")
    assert torch.equal(pictures(own), pictures(opened))

    (tmp_path / "prompts.txt").write_text("house\na red apple\na green car\n")
    job = load_config(
        StudentJob,
        overrides=[
            f"teacher={tmp_path / 'teacher'}", f"output={tmp_path / 'run'}", f"prompts.name={tmp_path / 'prompts.txt'}",
            "training={num_steps: 2, batch_size: 4, tracker: none}", "method.guidance_scale=2",
            "initial.embedding_noise=0.1",
        ],
    )  # fmt: skip
    assert train_student(job)
    student, _, _ = load_student(tmp_path / "run")
    assert student("house").nfe == 1


def test_a_compiled_network_takes_prompts_all_the_same(own):
    expected = pictures(own)
    own.register_modules(denoiser=torch.compile(own.denoiser, backend="eager"))
    assert own.condition_kind == "text"
    torch.testing.assert_close(pictures(own), expected)


def test_a_network_that_does_not_say_what_it_is_is_refused_by_name(own, tmp_path, monkeypatch):
    own.save_pretrained(tmp_path / "teacher")
    monkeypatch.delattr(OwnNetwork, "condition_kind")
    with pytest.raises(ValueError, match="OwnNetwork is no denoiser: it lacks condition_kind"):
        MaskedDiffusionPipeline.from_pretrained(tmp_path / "teacher")

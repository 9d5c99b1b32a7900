"""What a teacher tells of its steps: progress bars, callbacks, and tokens that these put in the place of others."""

import pytest
import torch
from diffusers.callbacks import PipelineCallback

from teachers import FirstHittingSampler, HaltonSampler, MaskGITSampler
from teachers import pipeline as pipeline_module

MASK = 16


def test_a_callback_is_told_of_every_step(teacher):
    told = []

    def callback(pipe, step, left, tensors):
        assert pipe is teacher
        told.append((step, left, (tensors["latents"] == MASK).sum(-1).tolist()))
        return tensors

    tokens = teacher([3, 7], generator=torch.Generator().manual_seed(0), output_type="tokens").tokens
    again = teacher(
        [3, 7], generator=torch.Generator().manual_seed(0), output_type="tokens", callback_on_step_end=callback
    )
    assert torch.equal(again.tokens, tokens)
    assert [(step, left) for step, left, _ in told] == [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert again.nfe == len(told)
    masks = [row[0] for *_, row in told]
    assert masks == sorted(masks, reverse=True)
    assert masks[-1] == 0


def test_a_piece_of_a_large_batch_goes_through_all_steps(teacher, monkeypatch):
    monkeypatch.setattr(pipeline_module, "MAX_LOGITS", 2 * 16 * 16)
    told = []

    def callback(pipe, step, left, tensors):
        told.append((step, len(tensors["latents"])))
        return tensors

    teacher([0, 1, 2], callback_on_step_end=callback)
    assert told == [(step, size) for size in (2, 1) for step in range(4)]


def test_tokens_that_make_no_sense_are_refused(teacher):
    for returned, message in [
        (None, "has to return its callback_kwargs"),
        ({"latents": torch.zeros(1, 16)}, "whole numbers"),
        ({"latents": torch.zeros(2, 16, dtype=torch.long)}, r"must be \(1, 16\)"),
        ({"latents": torch.full((1, 16), 17)}, "got 17"),
        ({"latents": torch.full((1, 16), MASK)}, "got 16"),  # in the last step
    ]:
        with pytest.raises(ValueError, match=message):
            teacher([3], callback_on_step_end=lambda *arguments, returned=returned: returned)


def test_tensors_by_name(teacher):
    seen = []

    def callback(pipe, step, left, tensors):
        seen.append(list(tensors))
        return {}

    teacher([3], num_inference_steps=1, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
    assert seen == [[]]
    with pytest.raises(ValueError, match=r"prompt_embeds.*choose from latents"):
        teacher([3], callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_callback_of_diffusers_class_says_itself_what_it_needs(teacher):
    class Zeros(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    callback = Zeros(cutoff_step_ratio=1.0)
    found = teacher([3], callback_on_step_end=callback, callback_on_step_end_tensor_inputs=(), output_type="tokens")
    assert (found.tokens == 0).all()


@pytest.mark.parametrize("sampler", [MaskGITSampler(5), HaltonSampler((4, 4), 5), FirstHittingSampler()])
def test_progress_bars_end_where_they_should(teacher, sampler, capsys):
    teacher.sampler = sampler
    num_steps = sampler.num_steps(None, 16)
    few = torch.zeros(1, 16, dtype=torch.long)
    few[:, :3] = MASK  # fewer than there are steps
    for settings, expected in [({}, f"{num_steps}/{num_steps}"), ({"disable": True}, "")]:
        teacher.set_progress_bar_config(**settings)
        for latents in (None, few):
            teacher([3], latents=latents)
            assert capsys.readouterr().err.rpartition("| ")[2].partition(" ")[0] == expected


def test_what_is_soon_done_has_no_bar(teacher, capsys):
    teacher([3])
    assert capsys.readouterr().err == ""

import pytest
import torch

from teachers.guidance import GuidedDenoiser, guide


def test_guidance_is_u_plus_s_times_c_minus_u(teacher):
    tokens = torch.randint(0, 17, (2, 16))
    condition = teacher.encode_condition([3, 7])
    with torch.no_grad():
        c = teacher.denoiser(tokens, condition)
        u = teacher.denoiser(tokens, condition.null())
        for scale in (0.0, 0.5, 1.0, 3.0):
            torch.testing.assert_close(guide(teacher.denoiser, tokens, condition, scale), u + scale * (c - u))
        scales = torch.tensor([0.5, 3.0])
        expected = u + scales[:, None, None] * (c - u)
        torch.testing.assert_close(guide(teacher.denoiser, tokens, condition, scales), expected)
    assert not torch.allclose(c, u)


def test_guidance_is_worked_out_in_float32(teacher):
    """In half precision the difference that it multiplies would be lost in rounding."""
    tokens, condition = torch.randint(0, 17, (2, 16)), teacher.encode_condition([3, 7])

    def half(tokens, condition):
        return teacher.denoiser(tokens, condition).bfloat16()

    with torch.no_grad():
        c, u = half(tokens, condition).float(), half(tokens, condition.null()).float()
        guided = guide(half, tokens, condition, 3.0)
        assert guided.dtype == guide(half, tokens, condition, 1.0).dtype == torch.float32
        torch.testing.assert_close(guided, u + 3.0 * (c - u))
        assert not torch.equal(guided, guided.bfloat16().float())


@pytest.mark.parametrize(("scale", "ramp", "nfe"), [(1.0, "constant", 4), (2.0, "constant", 8), (2.0, "linear", 7)])
def test_guided_evaluations_count_twice(teacher, scale, ramp, nfe):
    """A linear ramp starts at scale 1, so that its first step needs no unconditional evaluation."""
    teacher.register_to_config(guidance_ramp=ramp)
    rows = []
    teacher.denoiser.register_forward_hook(lambda module, inputs, logits: rows.append(len(logits)))
    assert teacher([0, 1], guidance_scale=scale).nfe == nfe
    assert sum(rows) == 2 * nfe


def test_an_unknown_ramp_is_refused(teacher):
    teacher.register_to_config(guidance_ramp="lineer")
    with pytest.raises(ValueError, match="guidance_ramp='lineer' is not known; choose from constant, linear"):
        teacher([0])


def test_a_sampler_gets_the_logits_that_are_drawn_from_and_each_row_is_counted(teacher):
    tokens = torch.full((3, 16), 16)
    condition = teacher.encode_condition([3, 7, 9])
    denoise = GuidedDenoiser(teacher.denoiser, condition, 2.0, temperature=0.5, top_k=3)
    rows = torch.tensor([2, 0])
    with torch.no_grad():
        logits = denoise(tokens[rows], 0.0, rows)
        expected = guide(teacher.denoiser, tokens, condition, 2.0)[rows] / 0.5
    kept = logits > -torch.inf
    assert (kept.sum(-1) == 3).all()
    torch.testing.assert_close(logits[kept], expected[kept])
    assert denoise.nfe.tolist() == [2, 0, 2]


def test_logits_that_cannot_be_shaped_are_refused_at_once(teacher):
    for shape in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(shape))}="):
            GuidedDenoiser(teacher.denoiser, teacher.encode_condition([3]), **shape)

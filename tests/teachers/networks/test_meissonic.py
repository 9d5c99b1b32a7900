import pytest
import torch
from safetensors.torch import load_file
from tiny_published import MEISSONIC, meissonic_folder

from teachers import MaskedDiffusionPipeline
from teachers.conditions.condition import TextCondition
from teachers.networks.meissonic import MeissonicTransformer


@pytest.fixture
def golden(shared):
    return shared / "golden" / "meissonic"


@pytest.mark.parametrize("timestep", [0.0, 0.5])
@torch.no_grad()
def test_logits_equal_those_of_the_original_code(golden, timestep):
    expected = load_file(golden / "expected.safetensors")
    denoiser = MeissonicTransformer.from_pretrained(golden / "transformer", token_grid=(8, 8), timestep=timestep)
    condition = TextCondition(
        expected["encoder_hidden_states"], expected["pooled_projections"], expected["micro_conds"]
    )
    logits = denoiser(expected["tokens"], condition)
    torch.testing.assert_close(logits, expected[f"logits_timestep_{timestep}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("resampling", [True, False])
def test_a_published_folder_loads_as_it_is_on_the_grid_that_is_asked_for(tmp_path, resampling):
    folder = meissonic_folder(tmp_path / "meissonic", resampling)
    default = MaskedDiffusionPipeline.from_pretrained(folder)
    assert default.token_grid == ((64, 64) if resampling else (32, 32))
    assert default.mask_token_id == 31
    pipe = MaskedDiffusionPipeline.from_pretrained(folder, image_size=8)
    assert pipe.token_grid == (4, 4)
    assert pipe.config.guidance_scale == 9
    condition = pipe.encode_condition("a red apple")
    assert condition.micro_conditions.tolist() == [[8, 8, 0, 0, 6]]
    output = pipe("a red apple", num_inference_steps=4, output_type="pt")
    assert output.images.shape == (1, 3, 8, 8)
    assert output.nfe == 8
    pipe.save_pretrained(tmp_path / "ours")
    ours = MaskedDiffusionPipeline.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(ours.denoiser(output.tokens, condition), pipe.denoiser(output.tokens, condition))


@torch.no_grad()
def test_each_place_of_the_grid_has_its_own_position():
    """With every token the same, places differ by their positions alone; and those are of row and column."""
    torch.manual_seed(0)
    denoiser = MeissonicTransformer((4, 2), **MEISSONIC, downsample=False, upsample=False)
    condition = TextCondition(torch.randn(1, 5, 16), torch.randn(1, 16), torch.ones(1, 5))
    places = torch.tensor([
        [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 2, 0], [0, 2, 1], [0, 3, 0], [0, 3, 1],
    ])  # fmt: skip
    tables = denoiser._rotary(1, 4, torch.device("cpu"))
    for table, expected in zip(tables, denoiser.pos_embed(places), strict=True):
        assert torch.equal(table, expected)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    assert not torch.allclose(denoiser(tokens, condition), denoiser(tokens.flip(1), condition).flip(1))

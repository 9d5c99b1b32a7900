import pytest
import torch
from diffusers import AmusedPipeline
from tiny_published import LAYOUTS
from tiny_text import CODEBOOK_SIZE, amused_folder, tiny_transformer, tiny_vq

from teachers import MaskedDiffusionPipeline, VQTokenizer
from teachers.networks.amused import AmusedDenoiser


@pytest.mark.parametrize("resampling", [False, True])
@torch.no_grad()
def test_an_amused_folder_of_diffusers_gives_the_same_logits_images_and_conditions(tmp_path, resampling):
    folder = amused_folder(tmp_path / "amused", resampling)
    pipe = MaskedDiffusionPipeline.from_pretrained(folder)
    theirs = AmusedPipeline.from_pretrained(folder)
    assert (pipe.mask_token_id, pipe.codebook_size, pipe.token_grid) == (31, CODEBOOK_SIZE, (4, 4))

    prompts = ["a red car", ""]
    tokens = torch.randint(0, CODEBOOK_SIZE, (2, 16))
    tokens[:, ::3] = 31
    ids = theirs.tokenizer(prompts, padding="max_length", max_length=12, return_tensors="pt").input_ids
    encoded = theirs.text_encoder(ids, output_hidden_states=True)
    micro = torch.tensor([[8.0, 8, 0, 0, 6]] * 2)
    grid = tokens.view(2, 4, 4)
    expected = theirs.transformer(grid, encoded.hidden_states[-2], encoded.text_embeds, micro)
    logits = pipe.denoiser(tokens, pipe.encode_condition(prompts))
    torch.testing.assert_close(logits, expected.flatten(2).transpose(1, 2))
    doubled = pipe.denoiser(tokens, pipe.encode_condition(prompts), perturb=lambda embeddings: 2 * embeddings)
    assert not torch.allclose(logits, doubled)
    assert torch.equal(logits, pipe.denoiser(tokens, pipe.encode_condition(prompts)))  # the perturbation is gone

    codes = torch.randint(0, CODEBOOK_SIZE, (2, 16))
    images = theirs.vqvae.decode(codes.view(2, 4, 4), force_not_quantize=True, shape=(2, 4, 4, 4)).sample.clip(0, 1)
    torch.testing.assert_close(pipe.decode(codes), images)
    quantised = theirs.vqvae.quantize(theirs.vqvae.encode(images).latents)[2][2]
    assert torch.equal(pipe.encode(images).flatten(), quantised.flatten())


def test_half_precision_decodes_in_single(tmp_path):
    folder = amused_folder(tmp_path / "amused")
    loaded = MaskedDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    moved = MaskedDiffusionPipeline.from_pretrained(folder).to(torch.float16)
    for pipe in (loaded, moved):
        assert pipe.denoiser.dtype == torch.float16
        images = pipe("a red car", num_inference_steps=3, output_type="pt").images
        assert images.dtype == torch.float32
        assert images.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opening_draws_no_weights_that_others_take_the_place_of(layout, tmp_path):
    folder = LAYOUTS[layout](tmp_path / "teacher")
    before = torch.get_rng_state()
    pipe = MaskedDiffusionPipeline.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)
    for network in (pipe.denoiser, pipe.tokenizer, pipe.text_encoder):
        assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


def test_a_wrapped_network_is_the_one_that_was_given():
    transformer, vq = tiny_transformer(), tiny_vq()
    denoiser, tokenizer = AmusedDenoiser.wrap(transformer, (4, 4)), VQTokenizer.wrap(vq, (4, 4))
    for network, given in [(denoiser, transformer), (tokenizer, vq)]:
        assert {id(parameter) for parameter in network.parameters()} == {
            id(parameter) for parameter in given.parameters()
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_network_has_the_type_that_was_asked_for(layout, dtype, tmp_path):
    folder = LAYOUTS[layout](tmp_path / "teacher")
    whole, half = (
        MaskedDiffusionPipeline.from_pretrained(folder, image_size=8, torch_dtype=kind)
        for kind in (torch.float32, dtype)
    )
    for network in (half.denoiser, half.tokenizer, half.text_encoder):
        assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    assert torch.equal(half.tokenizer.codebook, whole.tokenizer.codebook.to(dtype))
    images = torch.rand(8, 3, 8, 8)
    same = half.encode(images) == whole.encode(images)
    assert same.float().mean() > 0.9
    assert half.decode(half.encode(images)).dtype == (torch.float32 if dtype == torch.float16 else dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_variant_opens_from_its_own_files(layout, tmp_path):
    folder = LAYOUTS[layout](tmp_path / "teacher")
    whole = MaskedDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    with pytest.raises(OSError, match="safetensors"):
        MaskedDiffusionPipeline.from_pretrained(folder)
    variant = MaskedDiffusionPipeline.from_pretrained(folder, variant="fp16", torch_dtype=torch.float16)
    for name in ("denoiser", "tokenizer", "text_encoder"):
        expected = getattr(whole, name).state_dict()
        for key, weights in getattr(variant, name).state_dict().items():
            assert torch.equal(weights, expected[key])


def test_a_pipeline_without_its_text_encoder_takes_encoded_prompts(tmp_path):
    folder = amused_folder(tmp_path / "amused")
    whole = MaskedDiffusionPipeline.from_pretrained(folder)
    bare = MaskedDiffusionPipeline.from_pretrained(folder, text_encoder=None, text_tokenizer=None)
    with torch.no_grad():
        condition = whole.encode_condition(["a red car", "house"])
    output = bare(condition=condition, num_inference_steps=3, output_type="pt")
    assert output.images.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="without its text encoder"):
        bare("a red car")
    bare.save_pretrained(tmp_path / "bare")
    assert MaskedDiffusionPipeline.from_pretrained(tmp_path / "bare").text_encoder is None

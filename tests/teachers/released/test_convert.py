"""Released checkpoints: exactness against the authors' numbers, and refusal of what is damaged or hostile."""

import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from students import OneStepPipeline
from students.initialisation import perturb_embeddings
from teachers import MaskedDiffusionPipeline
from teachers.conditions.condition import ClassCondition
from teachers.released import checkpoint
from teachers.released.checkpoint import find_file, read_checkpoint
from teachers.released.convert import convert_halton_maskgit, convert_maskgit
from teachers.released.convert_vq import convert_llamagen_vq, convert_taming_vq

NUM_TOKENS = {"maskgit": 32, "halton": 40}


@pytest.fixture(scope="module")
def golden(shared):
    return shared / "golden"


def expected_of(golden, kind):
    return load_file(golden / kind / "expected.safetensors")


def denoiser_of(golden, kind):
    if kind == "maskgit":
        return convert_maskgit(read_checkpoint(str(golden / kind / "MaskGIT.pth")), 4, NUM_TOKENS[kind])
    return convert_halton_maskgit(read_checkpoint(str(golden / kind / "HaltonMaskGIT.pth")), 4)


def tokenizer_of(golden, kind, image_size):
    grid = (image_size // 4, image_size // 4)
    if kind == "maskgit":
        checkpoint = read_checkpoint(str(golden / kind / "last.ckpt"))
        return convert_taming_vq(checkpoint, golden / kind / "model.yaml", grid)
    return convert_llamagen_vq(read_checkpoint(str(golden / kind / "vq_ds.pt")), grid)


@pytest.mark.parametrize("kind", NUM_TOKENS)
@torch.no_grad()
def test_logits_equal_those_of_the_original_code(golden, kind):
    denoiser, expected = denoiser_of(golden, kind), expected_of(golden, kind)
    condition = ClassCondition(expected["labels"])
    dropped = condition.null(where=expected["drop"].bool())
    for given, name in [(condition, "logits_conditional"), (dropped, "logits_drop")]:
        wanted = expected[name][..., : NUM_TOKENS[kind]]  # the last column is the mask's
        torch.testing.assert_close(denoiser(expected["tokens"], given), wanted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_embedding_noise_equals_that_of_the_original_code(golden):
    denoiser, expected = denoiser_of(golden, "maskgit"), expected_of(golden, "maskgit")
    noise = expected["embedding_noise"][:, :16]
    logits = denoiser(
        expected["tokens"],
        ClassCondition(expected["labels"]),
        perturb=lambda embeddings: perturb_embeddings(embeddings, noise, 0.1, "unit"),
    )
    wanted = expected["logits_embedding_noise_0.1"][..., : NUM_TOKENS["maskgit"]]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", NUM_TOKENS)
def test_images_and_tokens_equal_those_of_the_original_code(golden, kind):
    expected = expected_of(golden, kind)
    images = (expected["vq_images"] + 1) / 2
    tokenizer = tokenizer_of(golden, kind, images.shape[-1])
    tokens = tokenizer.encode(images)
    assert torch.equal(tokens, expected["vq_encoded"])
    for given, name in [(expected["vq_codes"], "vq_decoded"), (tokens, "vq_reconstruction")]:
        decoded = tokenizer.decode(given)
        torch.testing.assert_close(decoded, (expected[name].clamp(-1, 1) + 1) / 2, atol=1e-3, rtol=0)


def options(golden, kind, **changes):
    """The command line that converts the golden files of a kind."""
    folder = golden / kind.split("-")[0]
    given = {"num-attention-heads": 4}
    if kind == "halton-maskgit":
        given |= {"transformer": folder / "HaltonMaskGIT.pth", "vqvae": folder / "vq_ds.pt"}
    else:
        name = "MaskGIT.pth" if kind == "maskgit" else "student_pytorch_model.bin"
        given |= {"transformer": folder / name, "vqvae": folder / "last.ckpt", "vqvae-config": folder / "model.yaml"}
    given |= {key.replace("_", "-"): value for key, value in changes.items()}
    return [kind, *(part for key, value in given.items() for part in (f"--{key}", value)), "--output", "out"]


@pytest.mark.parametrize("kind", ["maskgit", "maskgit-student", "halton-maskgit"])
def test_a_converted_folder_is_a_pipeline_that_knows_its_source(command, golden, kind):
    arguments = options(golden, kind)
    status, _, errors = command("convert.py", *arguments)
    assert status == 0, errors
    pipeline_class = OneStepPipeline if kind == "maskgit-student" else MaskedDiffusionPipeline
    pipe = pipeline_class.from_pretrained("out")
    assert pipe(class_labels=[3, 7], output_type="pt").images.shape == (2, 3, 16, 16)

    expected = expected_of(golden, kind.split("-")[0])
    logits = pipe.denoiser(expected["tokens"], ClassCondition(expected["labels"]))
    wanted = expected["logits_conditional"][..., : pipe.codebook_size]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    for component, source in [("denoiser", arguments[4]), ("tokenizer", arguments[6])]:
        with safe_open(f"out/{component}/diffusion_pytorch_model.safetensors", "pt") as file:
            assert file.metadata()["source_sha256"] == read_checkpoint(str(source)).sha256

    status, _, errors = command("convert.py", *arguments)
    assert status == 2
    assert "not empty" in errors


def test_a_dry_run_writes_nothing(command, golden, tmp_path):
    status, _, errors = command("convert.py", *options(golden, "maskgit"), "--dry-run")
    assert status == 0, errors
    assert not any(tmp_path.iterdir())


def test_the_released_student_starts_as_the_authors_had_it(command, golden):
    command("convert.py", *options(golden, "maskgit-student"))
    settings = OneStepPipeline.from_pretrained("out").initialiser.config
    assert tuple(settings.mask_ratio) == (0.6, 0.6)
    assert (settings.random_tokens, settings.embedding_noise, settings.noise_scale) == ("uniform", 0.1, "unit")


def test_safetensors_and_prefixes_of_wrapped_models_are_read(golden, tmp_path):
    tensors = torch.load(golden / "maskgit" / "student_pytorch_model.bin", weights_only=True)
    save_file(
        {f"module._orig_mod.{key}": value.contiguous() for key, value in tensors.items()}, tmp_path / "a.safetensors"
    )
    assert read_checkpoint(str(tmp_path / "a.safetensors")).tensors.keys() == tensors.keys()


def test_all_that_is_wrong_with_the_tensors_is_one_error(golden, tmp_path):
    tensors = torch.load(golden / "maskgit" / "student_pytorch_model.bin", weights_only=True)
    del tensors["first_layer.2.bias"]
    tensors["surprise"] = torch.zeros(1)
    tensors["last_layer.2.weight"] = torch.zeros(3, 64)
    tensors["first_layer.6.bias"] = torch.full((64,), torch.nan)
    tensors["bias"] = tensors["bias"][:, :-1]  # no longer tokens, mask, classes and null class
    torch.save(tensors, tmp_path / "bad.bin")
    with pytest.raises(ValueError, match="does not fit") as error:
        convert_maskgit(read_checkpoint(str(tmp_path / "bad.bin")), 4, 32)
    listed = set(re.findall(r"(missing|unexpected|misshapen|not finite numbers): ([\w.]+)", str(error.value)))
    assert listed == {
        ("missing", "first_layer.2.bias"),
        ("unexpected", "surprise"),
        ("misshapen", "last_layer.2.weight"),
        ("misshapen", "bias"),
        ("not finite numbers", "first_layer.6.bias"),
    }


def test_only_the_loss_network_of_a_vqgan_is_ignored(golden, tmp_path):
    tensors = torch.load(golden / "maskgit" / "last.ckpt", weights_only=True)["state_dict"]
    for key, fits in [("loss.discriminator.main.0.weight", True), ("lossy", False)]:
        torch.save({"state_dict": tensors | {key: torch.zeros(1)}}, tmp_path / "last.ckpt")
        checkpoint = read_checkpoint(str(tmp_path / "last.ckpt"))
        if fits:
            convert_taming_vq(checkpoint, golden / "maskgit" / "model.yaml", (8, 8))
        else:
            with pytest.raises(ValueError, match="unexpected: lossy"):
                convert_taming_vq(checkpoint, golden / "maskgit" / "model.yaml", (8, 8))


class Attack:
    """Unpickled by a careless reader, this makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_hostile_damaged_and_wrong_files_get_one_error_each(command, golden, tmp_path):
    whole = (golden / "maskgit" / "MaskGIT.pth").read_bytes()
    torch.save({"model_state_dict": {"tok_emb.weight": Attack()}}, tmp_path / "hostile.pth")
    (tmp_path / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2, 3], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "number.pth")
    torch.save({"module.pos_emb": torch.zeros(1), "pos_emb": torch.zeros(1)}, tmp_path / "twice.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "text.yaml").write_text("model: [")
    other = (golden / "maskgit" / "model.yaml").read_text().replace("n_embed: 32", "n_embed: 64")
    (tmp_path / "other.yaml").write_text(other)
    for changes, message in [
        ({"transformer": "hostile.pth"}, "Nothing in it was run"),
        ({"transformer": "truncated.pth"}, "is it whole?"),
        ({"transformer": "text.pth"}, "no checkpoint at all"),
        ({"transformer": "empty.pth"}, "is it whole?"),
        ({"transformer": "list.pth"}, "not hold a dictionary of tensors"),
        ({"transformer": "number.pth"}, "not hold a dictionary of tensors"),
        ({"transformer": "twice.pth"}, "names differ by nothing but the prefixes"),
        ({"transformer": "broken.safetensors"}, "is it whole?"),
        ({"transformer": golden / "maskgit" / "last.ckpt"}, "has no tensor tok_emb.weight"),
        ({"transformer": golden / "halton" / "HaltonMaskGIT.pth"}, "error: "),
        ({"vqvae": golden / "halton" / "vq_ds.pt"}, "error: "),
        ({"transformer": "nowhere.pth"}, "no file nowhere.pth"),
        ({"num_attention_heads": 7}, "does not divide"),
        ({"vqvae_config": "nowhere.yaml"}, "no file nowhere.yaml"),
        ({"vqvae_config": "text.yaml"}, "does not describe a taming VQGAN"),
        ({"vqvae_config": "other.yaml"}, "codebook size: 64, but 32"),
    ]:
        status, _, errors = command("convert.py", *options(golden, "maskgit", **changes))
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert (status, len(lines)) == (2, 1), (changes, errors)
        assert message in errors, (changes, errors)
        assert not (tmp_path / "out").exists()
    assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "hostile.pth", weights_only=False)  # the attack is a real one
    assert (tmp_path / "owned").is_dir()


def test_a_hub_file_out_of_reach_is_a_clear_error(monkeypatch):
    def refuse(*arguments):
        raise OSError("offline")

    monkeypatch.setattr(checkpoint, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"weights\.pth could not be had from the hub's owner/model: offline"):
        find_file("owner/model:weights.pth")

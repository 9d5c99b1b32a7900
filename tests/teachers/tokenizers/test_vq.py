import pytest
import torch

from distill.jobs.tokenizer import VQNetworkConfig, make_tokenizer
from teachers import VQTokenizer
from teachers.objectives.vq import VQConfig, VQObjective
from teachers.tokenizers.token_cache import load_tokenizer
from teachers.tokenizers.vq import codebook_use


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    tokenizer = make_tokenizer(VQNetworkConfig(codebook_size=16, widths=(8, 16), num_groups=4), torch.Size([1, 8, 8]))
    with torch.no_grad():
        tokenizer.codebook.normal_()
    return tokenizer.eval()


def test_each_latent_gets_its_nearest_entry(tokenizer, digits):
    latents = tokenizer.latents(digits[:20])
    assert latents.shape == (20, 16, 8)  # a 4x4 grid of entries of 8 numbers
    brute_force = (latents[..., None, :] - tokenizer.codebook).square().sum(-1).argmin(-1)
    assert torch.equal(tokenizer.encode(digits[:20]), brute_force)


def test_a_local_token_is_of_its_patch_alone(digits):
    config = VQNetworkConfig(codebook_size=16, widths=(8, 16), num_groups=4, local=True)
    local = make_tokenizer(config, torch.Size([1, 8, 8])).eval()
    latents = local.latents(digits[:20])
    assert latents.shape == (20, 16, 8)
    changed = digits[:20].clone()
    changed[:, :, 2:4, 4:6] = torch.rand(20, 1, 2, 2)  # the patch in row 1, column 2
    moved = (local.latents(changed) != latents).any(-1)
    assert moved.sum() == 20
    assert moved[:, 1 * 4 + 2].all()


def test_decoding_sees_only_the_tokens(tokenizer, digits):
    reconstructed, _, _, tokens = tokenizer(digits[:5])
    assert tokenizer.decode(tokens).min() >= 0
    torch.testing.assert_close(tokenizer.decode(tokens), reconstructed.clamp(0, 1))


def test_the_gradient_passes_quantisation_as_if_it_were_the_identity(tokenizer, digits):
    _, latents, entries, tokens = tokenizer(digits[:3])
    passed = latents.detach().requires_grad_()
    output = tokenizer.render(passed + (tokenizer.codebook[tokens] - passed).detach())
    (through,) = torch.autograd.grad(output.square().sum(), passed)
    quantised = entries.detach().requires_grad_()
    (direct,) = torch.autograd.grad(tokenizer.render(quantised).square().sum(), quantised)
    torch.testing.assert_close(through, direct)


def test_use_and_perplexity():
    assert codebook_use(torch.tensor([[0, 1], [2, 3]]), 8) == (0.5, pytest.approx(4.0))
    used, perplexity = codebook_use(torch.tensor([0, 0, 0, 1]), 4)
    assert used == 0.5
    assert perplexity == pytest.approx(4 / 3**0.75)  # exp of the entropy of (3/4, 1/4)


def losses(tokenizer, digits, step, **settings):
    gather = settings.pop("gather", lambda tensor: tensor)
    objective = VQObjective(VQConfig(revival_share=0.5, **settings), tokenizer, num_steps=20, gather=gather)
    return objective.losses({"tokenizer": tokenizer}, ("tokenizer",), (digits, step), [])


def test_dead_entries_are_moved_to_latents_and_no_others(tokenizer, digits):
    before = tokenizer.codebook.detach().clone()
    latents, tokens = tokenizer.latents(digits).detach().flatten(0, 1), tokenizer.encode(digits)
    dead = tokens.flatten().bincount(minlength=16) == 0
    assert 0 < dead.sum() < 16
    losses(tokenizer, digits, step=10, revival_rate=1.0)
    assert torch.equal(tokenizer.codebook, before)  # not after the first half of the steps
    losses(tokenizer, digits, step=9, revival_rate=1.0)
    moved = (tokenizer.codebook != before).any(-1)
    assert torch.equal(moved, dead)
    assert torch.cdist(tokenizer.codebook[dead], latents).min(-1).values.max() < 1e-5


def test_the_same_entries_move_whoever_asks(tokenizer, digits):
    """Two processes see different halves, gather them, and have to do the same."""
    codebooks = []
    start = tokenizer.codebook.detach().clone()
    for half in (0, 1):
        tokenizer.codebook.data.copy_(start)
        parts = [(tokenizer.encode(part), tokenizer.latents(part).detach()) for part in (digits[:10], digits[10:20])]
        tokens, latents = (torch.cat(values) for values in zip(*parts, strict=True))
        share = digits[10 * half : 10 * half + 10]
        losses(
            tokenizer, share, 3, revival_rate=0.5, gather=lambda own, t=tokens, z=latents: t if own.dim() == 2 else z
        )
        codebooks.append(tokenizer.codebook.detach().clone())
    assert torch.equal(*codebooks)
    assert not torch.equal(codebooks[0], start)


def test_impossible_requests(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="cannot be halved 2 times"):
        VQTokenizer((10, 8), dict(tokenizer.config.settings) | {"block_out_channels": [8, 8, 16]})
    with pytest.raises(ValueError, match="this tokenizer is for"):
        tokenizer.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_tokenizer(tmp_path)

"""What every network does: gradient checkpointing, logits at some positions alone, adapters, compiled blocks."""

import copy

import pytest
import torch
from tiny_networks import NETWORKS, SIZES
from torch._dynamo.testing import CompileCounter

from distill.loop.state import trained_parameters
from students.adapters import make_learner, merged
from teachers import MaskGITTransformer
from teachers.conditions.condition import ClassCondition, TextCondition
from teachers.guidance import guide
from teachers.networks.halton import HaltonMaskGITTransformer
from teachers.networks.recompute import recompute_activations


@pytest.fixture(params=NETWORKS)
def network(request, tmp_path):
    torch.manual_seed(0)
    teacher, condition = NETWORKS[request.param](tmp_path)
    with torch.no_grad():  # some layers start as the identity, through which no gradient goes
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher.eval(), condition, torch.randint(0, 24, (2, 16))


def test_recomputed_activations_give_the_same_gradients(network):
    teacher, condition, tokens = network
    gradients, calls = [], []
    for gradient_checkpointing in (False, True):
        learner = make_learner(teacher, False)
        if gradient_checkpointing:
            recompute_activations(learner.layers)
        for layer in learner.layers:
            next(layer.children()).register_forward_hook(lambda *call: calls.append(call))
        learner(tokens, condition).square().sum().backward()
        gradients.append({key: parameter.grad for key, parameter in learner.named_parameters()})
    assert len(calls) == 3 * len(learner.layers)
    plain, recomputed = gradients
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in plain.values())
    for key, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[key], msg=key)


@torch.no_grad()
def test_logits_at_some_positions_are_those_of_all(network):
    denoiser, condition, tokens = network
    mask = torch.rand(2, 16) < 0.3
    tokens[mask] = denoiser.mask_token_id
    positions = mask.flatten().nonzero()[:, 0]
    whole = denoiser(tokens, condition)
    torch.testing.assert_close(denoiser(tokens, condition, positions=positions), whole[mask])
    assert denoiser(tokens, condition, positions=positions[:0]).shape == (0, whole.shape[-1])
    torch.testing.assert_close(denoiser(tokens, condition), whole)
    for guidance_scale in (1.0, 2.5):
        guided = guide(denoiser, tokens, condition, guidance_scale)
        torch.testing.assert_close(
            guide(denoiser, tokens, condition, guidance_scale, positions=positions), guided[mask]
        )


@torch.no_grad()
def test_the_last_product_is_in_float32_whatever_the_rest_is_in(network):
    denoiser, condition, tokens = network
    with torch.autocast("cpu", torch.bfloat16):
        logits = denoiser(tokens, condition)
        some = denoiser(tokens, condition, positions=torch.tensor([3, 20]))
    for values in (logits, some):
        assert values.dtype == torch.float32
        assert (values != values.bfloat16().float()).float().mean() > 0.9
    torch.testing.assert_close(logits, denoiser(tokens, condition), atol=0.1, rtol=0.1)


def test_adapters_start_as_the_network_learn_alone_and_merge(network):
    denoiser, condition, tokens = network
    before = {name: parameter.clone() for name, parameter in denoiser.named_parameters()}
    learner = make_learner(denoiser, True, adapter_rank=2)
    with torch.no_grad():
        torch.testing.assert_close(learner(tokens, condition), denoiser(tokens, condition))
    learner(tokens, condition).square().sum().backward()
    trained = trained_parameters(learner)
    assert all("lora" in name and parameter.grad is not None for name, parameter in trained.items())
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = learner(tokens, condition)
        assert not torch.allclose(expected, denoiser(tokens, condition), atol=1e-3)
        plain = merged(learner)
        torch.testing.assert_close(plain(tokens, condition), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(learner(tokens, condition), expected)
    assert plain.state_dict().keys() == denoiser.state_dict().keys()
    for name, parameter in denoiser.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=0, rtol=0)


@torch.no_grad()
def test_what_adapters_add_to_a_teacher_of_half_precision_is_not_rounded_away(network):
    denoiser, _, _ = network
    learner = make_learner(denoiser, True, adapter_rank=2)
    before = {name: parameter.bfloat16().float() for name, parameter in denoiser.named_parameters()}
    denoiser.bfloat16()
    for name, parameter in trained_parameters(learner).items():
        assert parameter.dtype == torch.float32, name
        parameter.normal_(std=0.01)
    changes = [(parameter - before[name]).abs() for name, parameter in merged(learner).named_parameters()]
    changed = torch.cat([change.flatten() for change in changes if change.any()])
    assert 0 < changed.mean() < 2**-9  # of weights near 1, half precision would keep nothing of it
    assert (changed > 0).float().mean() > 0.9


@pytest.mark.parametrize("adapter_rank", [0, 2])
def test_blocks_are_compiled_whole_and_seldom_again(network, adapter_rank):
    """How often, the compiler decides; but it is not once for each batch size, and nothing breaks a block."""
    denoiser, condition, tokens = network
    learner = make_learner(denoiser, True, adapter_rank=adapter_rank)
    compiled = copy.deepcopy(learner)
    counter = CompileCounter()
    compiled.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert compiled.state_dict().keys() == learner.state_dict().keys()

    def count(batch_size):
        rows = torch.arange(batch_size) % 2
        logits = compiled(tokens[rows], condition.select(rows))
        torch.testing.assert_close(logits, learner(tokens[rows], condition.select(rows)))
        return counter.frame_count

    torch.compiler.reset()
    with torch.no_grad():
        first = [count(batch_size) for batch_size in (2, 4, 1)]  # a size, other sizes, single samples
        assert first[0] > 0
        assert [count(batch_size) for batch_size in (3, 7, 6, 2, 1)] == [first[-1]] * 5
    torch.compiler.reset()
    first = count(2)  # in training
    assert count(2) == first


@pytest.mark.parametrize("make", [MaskGITTransformer, HaltonMaskGITTransformer])
def test_a_deeper_network_has_no_more_to_compile(make):
    """But for the first layer, whose input may be of another kind, one compiled block serves all."""

    def count(num_layers):
        denoiser = make(24, 10, (4, 4), **SIZES | {"num_layers": num_layers}).eval()
        counter = CompileCounter()
        denoiser.compile_repeated_blocks(backend=counter, fullgraph=True)
        torch.compiler.reset()
        with torch.no_grad():
            for batch_size in (2, 3, 1):
                denoiser(torch.zeros(batch_size, 16, dtype=torch.long), ClassCondition.none(batch_size))
        return counter.frame_count

    assert count(5) == count(2)


def test_embeddings_take_the_place_of_tokens_and_pass_gradients_on(network):
    denoiser, condition, tokens = network
    tokens[:, ::3] = denoiser.mask_token_id
    embeddings = denoiser.embed(tokens).detach().requires_grad_()
    logits = denoiser(embeddings, condition)
    torch.testing.assert_close(logits, denoiser(tokens, condition))
    logits.square().sum().backward()
    assert (embeddings.grad.abs().sum(-1) > 0).all()
    positions = torch.tensor([3, 20])
    some = denoiser(embeddings, condition, perturb=lambda given: 2 * given, positions=positions)
    torch.testing.assert_close(some, denoiser(2 * embeddings, condition).flatten(0, 1)[positions])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_says_what_it_is(name, tmp_path):
    denoiser, condition = NETWORKS[name](tmp_path)
    assert denoiser.token_kind == "categorical"
    assert denoiser.condition_kind == ("text" if isinstance(condition, TextCondition) else "classes")
    assert torch.compile(denoiser).condition_kind == denoiser.condition_kind

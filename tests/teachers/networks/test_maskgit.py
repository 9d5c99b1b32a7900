import pytest
import torch

from teachers import HaltonMaskGITTransformer, MaskGITTransformer
from teachers.conditions.condition import ClassCondition

NETWORKS = {
    "maskgit": lambda: MaskGITTransformer(8, 3, (2, 2), 15, 1, num_attention_heads=3, mlp_size=32),
    "halton": lambda: HaltonMaskGITTransformer(8, 3, (2, 2), 16, 1, num_attention_heads=3, mlp_size=32),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    network = NETWORKS[request.param]().eval()
    with torch.no_grad():  # away from where it starts, which may not see its input
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def test_frozen_parameters_leave_the_output_layer_as_the_teacher_s(network):
    """Every parameter outside the blocks that acts per token, class or position is frozen."""
    frozen = {id(parameter) for parameter in network.embedding_parameters()}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in frozen}
    expected = {"token_embedding.weight", "class_embedding.weight", "position_embedding", "output_bias"}
    assert names - {"registers"} == expected
    trained = [name for name, parameter in network.named_parameters() if id(parameter) not in frozen]
    assert all(name.startswith(("blocks.", "input_layer.", "output_")) for name in trained)


@torch.no_grad()
def test_every_token_position_and_class_is_seen(network):
    tokens, condition = torch.tensor([[0, 8, 8, 3]]), ClassCondition(torch.tensor([1]))
    logits = network(tokens, condition)
    assert logits.shape == (1, 4, 8)
    changed_token, swapped = tokens.clone(), tokens[:, [3, 1, 2, 0]]
    changed_token[0, 3] = 4
    for other in [
        network(changed_token, condition),
        network(swapped, condition)[:, [3, 1, 2, 0]],
        network(tokens, ClassCondition(torch.tensor([2]))),
        network(tokens, condition.null()),
        network(tokens, condition, perturb=lambda embeddings: 2 * embeddings),
    ]:
        assert (other - logits).abs().amax(-1).min() > 1e-4  # at every position


def test_a_halton_network_starts_with_blocks_that_are_the_identity():
    """Adaptive normalisation with zero gates: before training the tokens do not see each other."""
    torch.manual_seed(0)
    network = NETWORKS["halton"]()
    condition = ClassCondition(torch.tensor([1]))
    first, second = (network(torch.tensor([tokens]), condition) for tokens in ([0, 1, 2, 3], [0, 5, 6, 7]))
    assert torch.equal(first[:, 0], second[:, 0])

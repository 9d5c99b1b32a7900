import pytest
import torch
from safetensors.torch import load_file

from students.initialisation import perturb_embeddings
from teachers.condition import Condition
from teachers.network import MaskGITTransformer

CODEBOOK_SIZE, NUM_CLASSES, LENGTH = 32, 10, 16


def from_released_layout(weights: dict[str, torch.Tensor]) -> MaskGITTransformer:
    """The network of a checkpoint in the layout of the public PyTorch MaskGIT."""
    network = MaskGITTransformer(CODEBOOK_SIZE, NUM_CLASSES, (4, 4), 64, 2, num_attention_heads=4, mlp_size=128)
    state = {
        "token_embedding.weight": weights["tok_emb.weight"][: CODEBOOK_SIZE + 1],
        "class_embedding.weight": weights["tok_emb.weight"][CODEBOOK_SIZE + 1 :],
        "position_embedding": weights["pos_emb"][0],
        "output_bias": weights["bias"][:LENGTH, :CODEBOOK_SIZE],
    }
    renamed = [("first_layer.", "input_layer."), ("last_layer.", "output_layer.")]
    for layer in range(2):
        old, new = f"transformer.layers.{layer}.", f"blocks.{layer}."
        renamed += [
            (old + "0.norm.", new + "norm1."),
            (old + "1.norm.", new + "norm3."),
            (old + "0.fn.mha.out_proj.", new + "attn1.to_out.0."),
            (old + "1.fn.net.0.", new + "ff.net.0.proj."),
            (old + "1.fn.net.3.", new + "ff.net.2."),
        ]
        for kind in ("weight", "bias"):
            parts = weights[f"{old}0.fn.mha.in_proj_{kind}"].chunk(3)
            for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                state[f"{new}attn1.{name}.{kind}"] = part
    for old, new in renamed:
        state |= {new + key.removeprefix(old): value for key, value in weights.items() if key.startswith(old)}
    network.load_state_dict(state)
    return network.eval()


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "golden" / "maskgit"
    weights = torch.load(folder / "MaskGIT.pth", weights_only=True)["model_state_dict"]
    return from_released_layout(weights), load_file(folder / "expected.safetensors")


def close(logits, expected):
    torch.testing.assert_close(logits, expected[..., :CODEBOOK_SIZE], atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits_equal_those_of_the_original_code(golden):
    network, expected = golden
    close(network(expected["tokens"], Condition(expected["labels"])), expected["logits_conditional"])


@torch.no_grad()
def test_dropped_labels_equal_those_of_the_original_code(golden):
    network, expected = golden
    condition = Condition(expected["labels"]).null(where=expected["drop"].bool())
    close(network(expected["tokens"], condition), expected["logits_drop"])


@torch.no_grad()
def test_embedding_noise_equals_that_of_the_original_code(golden):
    network, expected = golden
    noise = expected["embedding_noise"][:, :LENGTH]
    logits = network(
        expected["tokens"],
        Condition(expected["labels"]),
        perturb=lambda embeddings: perturb_embeddings(embeddings, noise, 0.1, "unit"),
    )
    close(logits, expected["logits_embedding_noise_0.1"])


def test_frozen_parameters_leave_the_output_layer_as_the_teacher_s():
    network = MaskGITTransformer(8, 3, (2, 2), 16, 1, 2, 32)
    frozen = {id(parameter) for parameter in network.embedding_parameters()}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in frozen}
    assert names == {"token_embedding.weight", "class_embedding.weight", "position_embedding", "output_bias"}

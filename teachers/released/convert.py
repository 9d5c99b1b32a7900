"""Released class-conditional teachers as denoisers of this project.

All sizes but the number of attention heads are read from the shapes of the released tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from teachers.networks.halton import HaltonMaskGITTransformer
from teachers.networks.maskgit import MaskGITTransformer
from teachers.released.checkpoint import Checkpoint, Rule, load_by_rules


def convert_maskgit(checkpoint: Checkpoint, num_attention_heads: int, codebook_size: int) -> MaskGITTransformer:
    """The network of MaskGIT-pytorch v1.0: tokens, mask, classes and null class share one embedding.

    Only the tokenizer tells how many of its rows are tokens.
    """
    num_rows, hidden_size = checkpoint.shape("tok_emb.weight")
    num_classes = num_rows - codebook_size - 2
    if num_classes < 1:
        raise ValueError(
            f"{checkpoint.path} has {num_rows} embeddings, too few for the tokenizer's {codebook_size} tokens, a mask "
            "and classes; it belongs to another tokenizer"
        )
    if hidden_size % num_attention_heads:
        raise ValueError(f"--num-attention-heads {num_attention_heads} does not divide the hidden size {hidden_size}")
    length = checkpoint.shape("pos_emb")[1] - 1
    network = on_meta(
        MaskGITTransformer,
        codebook_size=codebook_size,
        num_classes=num_classes,
        token_grid=square_grid(length),
        hidden_size=hidden_size,
        num_layers=checkpoint.count(r"transformer\.layers\.(\d+)\."),
        num_attention_heads=num_attention_heads,
        mlp_size=checkpoint.shape("transformer.layers.0.1.fn.net.0.weight")[0],
    )
    rows = partial(part, sizes=(codebook_size + 1, num_classes + 1))
    block, layer = r"blocks\.(\d+)\.", r"transformer.layers.\1."
    rules = [
        Rule(r"token_embedding\.weight", "tok_emb.weight", partial(rows, index=0)),
        Rule(r"class_embedding\.weight", "tok_emb.weight", partial(rows, index=1)),
        Rule("position_embedding", "pos_emb", lambda tensor: tensor.squeeze(0)),
        Rule("output_bias", "bias", lambda tensor: rows(part(tensor, 0, (length, 1)), 0, dim=1)[:, :-1]),
        Rule(r"input_layer\.(.*)", r"first_layer.\1"),
        Rule(r"output_layer\.(.*)", r"last_layer.\1"),
        Rule(block + r"norm1\.(.*)", layer + r"0.norm.\2"),
        Rule(block + r"norm3\.(.*)", layer + r"1.norm.\2"),
        *(
            Rule(
                block + rf"attn1\.to_{name}\.(.*)",
                layer + r"0.fn.mha.in_proj_\2",
                partial(part, index=index, sizes=3 * (hidden_size,)),
            )
            for index, name in enumerate("qkv")
        ),
        Rule(block + r"attn1\.to_out\.0\.(.*)", layer + r"0.fn.mha.out_proj.\2"),
        Rule(block + r"ff\.net\.0\.proj\.(.*)", layer + r"1.fn.net.0.\2"),
        Rule(block + r"ff\.net\.2\.(.*)", layer + r"1.fn.net.3.\2"),
    ]
    load_by_rules(network, checkpoint, rules)
    return network.eval()


def convert_halton_maskgit(checkpoint: Checkpoint, num_attention_heads: int) -> HaltonMaskGITTransformer:
    """The network of the current Halton-MaskGIT. Its output layer is stored, and has to equal the embeddings."""
    num_rows, hidden_size = checkpoint.shape("tok_emb.weight")
    mlp_size = checkpoint.shape("transformer.layers.0.ff.w1.weight")[0]
    network = on_meta(
        HaltonMaskGITTransformer,
        codebook_size=num_rows - 1,
        num_classes=checkpoint.shape("cls_emb.weight")[0] - 1,
        token_grid=square_grid(checkpoint.shape("pos_emb.weight")[0]),
        hidden_size=hidden_size,
        num_layers=checkpoint.count(r"transformer\.layers\.(\d+)\."),
        num_attention_heads=num_attention_heads,
        mlp_size=mlp_size,
        num_registers=checkpoint.shape("reg_tokens.weight")[0],
    )
    inner_size = checkpoint.shape("transformer.layers.0.attn.wq.weight")[0]
    if hidden_size // num_attention_heads * num_attention_heads != inner_size:
        raise ValueError(
            f"--num-attention-heads {num_attention_heads} cannot be: {hidden_size} // {num_attention_heads} x "
            f"{num_attention_heads} is not the {inner_size} of the queries"
        )
    head = checkpoint.tensors.pop("head.weight", None)
    if head is not None and not torch.equal(head, checkpoint.tensors["tok_emb.weight"]):
        raise ValueError(f"{checkpoint.path}: head.weight is not tok_emb.weight, as it is in released checkpoints")

    block, layer = r"blocks\.(\d+)\.", r"transformer.layers.\1."
    rules = [
        Rule(r"token_embedding\.weight", "tok_emb.weight"),
        Rule(r"class_embedding\.weight", "cls_emb.weight"),
        Rule("position_embedding", "pos_emb.weight"),
        Rule("registers", "reg_tokens.weight"),
        Rule("output_bias", "head.bias", partial(part, index=0, sizes=(num_rows - 1, 1))),
        Rule(r"output_norm\.(.*)", r"last_norm.norm_final.\1"),
        Rule(r"output_modulation\.linear\.(.*)", r"last_norm.mlp.1.\1"),
        Rule(block + r"modulation\.linear\.(.*)", layer + r"mlp.1.\2"),
        Rule(block + r"attention_norm\.weight", layer + "ln1.weight"),
        Rule(block + r"mlp_norm\.weight", layer + "ln2.weight"),
        Rule(block + r"attention\.to_([qkv])\.weight", layer + r"attn.w\2.weight"),
        Rule(block + r"attention\.to_out\.weight", layer + "attn.wo.weight"),
        Rule(block + r"mlp\.net\.0\.proj\.weight", layer + "ff.w3+w1.weight"),
        Rule(block + r"mlp\.net\.2\.weight", layer + "ff.w2.weight"),
    ]
    load_by_rules(network, fuse_gates(checkpoint), rules)
    return network.eval()


def fuse_gates(checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors, with each value (w3) and gate (w1) as the one matrix that diffusers' SwiGLU has."""
    tensors = dict(checkpoint.tensors)
    for key in [key for key in tensors if key.endswith("ff.w1.weight")]:
        value = key.replace("w1", "w3")
        if value in tensors:
            tensors[key.replace("w1", "w3+w1")] = torch.cat([tensors.pop(value), tensors.pop(key)])
    return Checkpoint(checkpoint.path, checkpoint.sha256, tensors)


def on_meta(network: type[nn.Module], **settings) -> nn.Module:
    """A network without memory for its weights, which the checkpoint's take the place of."""
    with torch.device("meta"):
        return network(**settings)


def part(tensor: torch.Tensor, index: int, sizes: Sequence[int], dim: int = 0) -> torch.Tensor:
    """One of the parts of these sizes that the tensor consists of; RuntimeError if it does not."""
    return tensor.split(list(sizes), dim)[index]


def square_grid(length: int) -> tuple[int, int]:
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"the checkpoint is for {length} tokens, which is not a square grid")
    return side, side

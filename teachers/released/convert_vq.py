"""Released VQ tokenizers, mapped onto diffusers' `VQModel`. All sizes are read from the shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from teachers.released.checkpoint import Checkpoint, Rule, load_by_rules
from teachers.released.convert import on_meta
from teachers.tokenizers.vq import VQTokenizer


def convert_taming_vq(checkpoint: Checkpoint, settings: Path, token_grid: tuple[int, int]) -> VQTokenizer:
    """The VQGAN of taming-transformers; `settings` is its YAML file, which has to agree with the tensors."""
    tokenizer = _empty_tokenizer(checkpoint, token_grid, "encoder.down.", ".block.")
    _check_settings(settings, tokenizer)
    last = len(tokenizer.vq.config.block_out_channels) - 1
    rules = _rules(
        last + 1,
        down=lambda level: f"encoder.down.{level}.",
        up=lambda level: f"decoder.up.{last - level}.",  # numbered by resolution, not by order
        residual="block",
        middle=("block_1", "attn_1", "block_2"),
    )
    load_by_rules(tokenizer, checkpoint, rules, ignored=r"loss\.")
    return tokenizer.eval()


def convert_llamagen_vq(checkpoint: Checkpoint, token_grid: tuple[int, int]) -> VQTokenizer:
    """The VQ model of LlamaGen. It normalises its codebook at every look-up; here that is done once, for good.

    Latents then need no normalisation: among entries of one length, the nearest is that of the smallest angle.
    """
    tokenizer = _empty_tokenizer(checkpoint, token_grid, "encoder.conv_blocks.", ".res.")
    rules = _rules(
        len(tokenizer.vq.config.block_out_channels),
        down=lambda level: f"encoder.conv_blocks.{level}.",
        up=lambda level: f"decoder.conv_blocks.{level}.",
        residual="res",
        middle=("0", "1", "2"),
    )
    codebook = "quantize.embedding.weight"
    rules.insert(0, Rule(rf"vq\.{codebook}", codebook, partial(F.normalize, dim=-1)))
    load_by_rules(tokenizer, checkpoint, rules, ignored=r"quantize\.codebook_used")
    return tokenizer.eval()


def _empty_tokenizer(checkpoint: Checkpoint, token_grid: tuple[int, int], levels: str, blocks: str) -> VQTokenizer:
    """The tokenizer that the checkpoint's shapes describe, without weights."""
    num_levels = checkpoint.count(rf"{levels}(\d+)\.")
    widths = [checkpoint.shape(f"{levels}{level}{blocks}0.conv2.weight")[0] for level in range(num_levels)]
    attention = [f"{levels}{level}.attn.0.q.weight" in checkpoint.tensors for level in range(num_levels)]
    num_entries, entry_size = checkpoint.shape("quantize.embedding.weight")
    factor = 2 ** (num_levels - 1)
    settings = {
        "in_channels": checkpoint.shape("encoder.conv_in.weight")[1],
        "out_channels": checkpoint.shape("decoder.conv_out.weight")[0],
        "down_block_types": ["AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in reversed(attention)],
        "block_out_channels": widths,
        "layers_per_block": checkpoint.count(rf"{levels}0{blocks}(\d+)\."),
        "latent_channels": checkpoint.shape("encoder.conv_out.weight")[0],
        "num_vq_embeddings": num_entries,
        "vq_embed_dim": entry_size,
    }
    return on_meta(VQTokenizer, image_size=(token_grid[0] * factor, token_grid[1] * factor), settings=settings)


def _rules(
    num_levels: int,
    down: Callable[[int], str],
    up: Callable[[int], str],
    residual: str,
    middle: tuple[str, str, str],
) -> list[Rule]:
    """Both layouts are those of the same network; they differ in how they call its levels and blocks."""
    rules = []
    for level in range(num_levels):
        for ours, theirs in [("encoder.down_blocks", down(level)), ("decoder.up_blocks", up(level))]:
            ours = rf"vq\.{ours}\.{level}\."
            rules += _residual_rules(ours + r"resnets\.(\d+)", rf"{theirs}{residual}.\1")
            rules += _attention_rules(ours + r"attentions\.(\d+)", rf"{theirs}attn.\1")
            rules += [Rule(ours + r"(down|up)samplers\.0\.(.*)", rf"{theirs}\1sample.\2")]
    ours = r"vq\.(encoder|decoder)\.mid_block\."
    first, attention, second = (rf"\1.mid.{name}" for name in middle)
    rules += _residual_rules(ours + r"resnets\.0", first)
    rules += _attention_rules(ours + r"attentions\.0", attention)
    rules += _residual_rules(ours + r"resnets\.1", second)
    return [
        *rules,
        Rule(r"vq\.(encoder|decoder)\.conv_norm_out\.(.*)", r"\1.norm_out.\2"),
        Rule(r"vq\.(.*)", r"\1"),
    ]


def _residual_rules(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(ours + r"\.conv_shortcut\.(?P<rest>.*)", theirs + r".nin_shortcut.\g<rest>"),
        Rule(ours + r"\.(?P<rest>(norm|conv)[12]\..*)", theirs + r".\g<rest>"),
    ]


def _attention_rules(ours: str, theirs: str) -> list[Rule]:
    def as_linear(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(1) if tensor.dim() == 4 else tensor  # a 1x1 convolution

    return [
        Rule(ours + r"\.group_norm\.(?P<rest>.*)", theirs + r".norm.\g<rest>"),
        Rule(ours + r"\.to_(?P<name>[qkv])\.(?P<rest>.*)", theirs + r".\g<name>.\g<rest>", as_linear),
        Rule(ours + r"\.to_out\.0\.(?P<rest>.*)", theirs + r".proj_out.\g<rest>", as_linear),
    ]


def _check_settings(path: Path, tokenizer: VQTokenizer) -> None:
    """Raise ValueError unless the YAML file of a taming VQGAN describes this network."""
    try:
        params = yaml.safe_load(path.read_text())["model"]["params"]
        network = params["ddconfig"]
        stated = {
            "codebook size": params["n_embed"],
            "size of an entry": params["embed_dim"],
            "widths": [network["ch"] * factor for factor in network["ch_mult"]],
            "blocks per level": network["num_res_blocks"],
            "latent channels": network["z_channels"],
        }
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}; expected the YAML file of the VQGAN") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a taming VQGAN (model.params.ddconfig ...): {error}") from error
    vq = tokenizer.vq.config
    found = {
        "codebook size": vq.num_vq_embeddings,
        "size of an entry": vq.vq_embed_dim,
        "widths": list(vq.block_out_channels),
        "blocks per level": vq.layers_per_block,
        "latent channels": vq.latent_channels,
    }
    differences = [f"{name}: {stated[name]}, but {found[name]}" for name in found if stated[name] != found[name]]
    if differences:
        raise ValueError(f"{path} does not fit the tensors; it states " + "; ".join(differences))

"""Networks that start as the teacher and learn: copies of it, or LoRA adapters (arXiv 2106.09685) on its weights."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from teachers.denoiser import Denoiser


def make_learner(teacher: Denoiser, freeze_embeddings: bool, adapter_rank: int = 0) -> Denoiser:
    """A copy of the teacher that learns, without dropout; or adapters of a rank, on the teacher's own weights."""
    if adapter_rank:
        return with_adapters(teacher, adapter_rank).eval()
    learner = copy.deepcopy(teacher).requires_grad_(True).eval()
    if freeze_embeddings:
        for parameter in learner.embedding_parameters():
            parameter.requires_grad_(False)
    return learner


class AdaptedLinear(Linear):
    """peft's layer, with its product added in place: peft reads and writes each output three times more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W x + b + B A x, of hidden states (..., D)."""
        (name,) = self.active_adapters
        assert self.scaling[name] == 1
        result, low = self.base_layer(x), self.lora_A[name](x)
        up = self.lora_B[name].weight
        assert isinstance(up, torch.Tensor)
        result.flatten(0, -2).addmm_(low.flatten(0, -2), up.T.to(result.dtype))
        return result


def with_adapters(network: Denoiser, rank: int) -> Denoiser:
    """A network that computes what this one does, on the same parameters, until its adapters learn.

    They lie beside every linear layer of `network.layers`; nothing else of it learns.
    """
    network.requires_grad_(False)
    adapted = copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})
    layers = {id(module) for layer in adapted.layers for module in layer.modules()}
    linear = [
        name for name, module in adapted.named_modules() if isinstance(module, nn.Linear) and id(module) in layers
    ]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=linear)
    config._register_custom_module({nn.Linear: AdaptedLinear})
    inject_adapter_in_model(config, adapted)
    return adapted


def merged(network: Denoiser) -> Denoiser:
    """The network with its adapters added into copies of its weights, in float32; the network itself if it has none."""
    if not any(isinstance(module, LoraLayer) for module in network.modules()):
        return network
    plain = copy.deepcopy(network).float()  # half precision would round away most of what they add
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, module.get_base_layer())
    return plain

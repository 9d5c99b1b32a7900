"""Weights that every release of torch draws alike, which those of `torch.nn.init` are not."""

import torch


@torch.no_grad()
def redraw(network, scale, seed=0):
    """The network, its matrices drawn from N(0, scale^2)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network

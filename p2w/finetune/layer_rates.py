"""The optimizer of a trial: which weights have which share of the learning rate, and which decay.

A block is a child module of the encoder, and of a child that is a list of modules each of these; blocks without weights do
not count. With n blocks, block i (from 0 at the input) has encoder_lr x layer_decay ^ (n - i) of the rate, as in BEiT (Bao
et al. 2022) and MAE (He et al. 2022); what is behind the encoder has all of it.
"""

from typing import Any

import torch
from torch import nn

from p2w.finetune.recipe import FineTuneRecipe
from p2w.model import Encoder, Network
from p2w.model.conv import for_optimizer

MOMENTUM = 0.99  # of SGD: nnU-Net's


def encoder_blocks(encoder: Encoder) -> list[nn.Module]:
    """The blocks of an encoder, from the input to the coarsest features."""
    found: list[nn.Module] = []
    for child in encoder.children():
        found += list(child.children()) if isinstance(child, nn.Sequential | nn.ModuleList) else [child]
    return [block for block in found if next(block.parameters(), None) is not None]


def rate_shares(network: Network, recipe: FineTuneRecipe) -> dict[int, float]:
    """`id` of a weight of the encoder -> its share of the learning rate."""
    blocks = encoder_blocks(network.encoder)
    shares = {}
    first = recipe.encoder_lr * recipe.layer_decay ** len(blocks)
    for weight in network.encoder.parameters():  # such as position embeddings, which are added to the input
        shares[id(weight)] = first
    for number, block in enumerate(blocks):
        for weight in block.parameters():
            shares[id(weight)] = recipe.encoder_lr * recipe.layer_decay ** (len(blocks) - number)
    return shares


def parameter_groups(
    network: Network, beside: list[nn.Parameter], recipe: FineTuneRecipe
) -> list[dict[str, Any]]:
    """Groups of `params` with `lr_factor` and `weight_decay`, in the order of the network's weights; `beside` come last."""
    shares = rate_shares(network, recipe)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for weight in [*for_optimizer(network), *beside]:
        decay = recipe.weight_decay if weight.ndim > 1 else 0.0
        groups.setdefault((shares.get(id(weight), 1.0), decay), []).append(weight)
    return [
        {"params": weights, "lr_factor": factor, "weight_decay": decay, "lr": recipe.lr * factor}
        for (factor, decay), weights in groups.items()
    ]


def build_tuning_optimizer(
    network: Network, beside: list[nn.Parameter], recipe: FineTuneRecipe, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer for the trainable weights of a network and for those of `beside`, which are not part of it."""
    # On a CPU torch's fused Adam rounds differently, and published results are those of the other.
    fused = True if device.type == "cuda" else None
    weights: list[Any] = [*for_optimizer(network), *beside]
    if recipe.encoder_lr != 1 or recipe.layer_decay != 1 or recipe.weight_decay > 0:
        weights = parameter_groups(network, beside, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=recipe.lr, momentum=MOMENTUM, nesterov=True, fused=fused)
    if recipe.optimizer == "adamw":
        # torch's own default is 0.01; groups say theirs
        return torch.optim.AdamW(weights, lr=recipe.lr, eps=recipe.adam_eps, weight_decay=0.0, fused=fused)
    return torch.optim.Adam(weights, lr=recipe.lr, eps=recipe.adam_eps, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"] if "lr_factor" in group else rate

"""InfoNCE in slow NumPy, float64."""

import math

import numpy as np
import torch

from p2w.pretext.contrastive.losses import l2_normalise

T = 0.7


def vectors(*shape, seed=0):
    return l2_normalise(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def reference_nce(anchor, positive, others, allowed, temperature):
    """One whole at a time, one negative at a time."""
    losses = []
    for i in range(len(anchor)):
        right = math.exp(np.dot(anchor[i], positive[i]) / temperature)
        wrong = sum(
            math.exp(np.dot(anchor[i], others[j]) / temperature) for j in range(len(others)) if allowed[i, j]
        )
        losses.append(-math.log(right / (right + wrong)))
    return np.array(losses)


def wide(tensor):
    return tensor.detach().double().numpy()

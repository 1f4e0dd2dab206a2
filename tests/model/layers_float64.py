"""Layers of transformers written out plainly on NumPy arrays (N, C) in float64, for the tests of several networks."""

import numpy as np


class Layers:
    """A network's layers by their names in its state dict."""

    def __init__(self, state):
        self.weights = {name: value.double().numpy() for name, value in state.items()}

    def norm(self, x, name):
        """Layer norm over C."""
        centred = x - x.mean(1, keepdims=True)
        scaled = centred / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def linear(self, x, name):
        """Linear layer with bias: (N, C) to (N, C')."""
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

"""Writes tests/weights/recorded/models_genesis.npz: names and shapes of Models Genesis' own class, and what it computes.

    git clone https://github.com/MrGiovanni/ModelsGenesis
    python tests/weights/reference/models_genesis.py ModelsGenesis/pytorch

Weights and volume follow from names and shapes (tests/formula_weights.py). The volume's axes are x, y, z, as in its code.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[2]
SIZE = (32, 16, 8)  # x, y, z


def main() -> None:
    """Build the class, fill it, run it, write."""
    sys.path[:0] = [sys.argv[1], str(TESTS)]
    from formula_weights import formula_volume, formula_weights
    from unet3d import UNet3D

    network = UNet3D()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items() if value.ndim}
    network.load_state_dict(
        {name: torch.from_numpy(value) for name, value in formula_weights(shapes).items()}, strict=False
    )
    with torch.no_grad():
        output = network(torch.from_numpy(formula_volume((1, 1, *SIZE))))
    names = {name: list(value.shape) for name, value in network.state_dict().items()}
    out = TESTS / "weights" / "recorded" / "models_genesis.npz"
    out.parent.mkdir(exist_ok=True)
    np.savez_compressed(out, names=json.dumps(names), output=output.numpy())
    print(out, output.shape, float(output.min()), float(output.max()))


if __name__ == "__main__":
    main()

"""The autoencoder sees what it is asked for, and is Parts2Whole at a volume fraction of 1."""

import torch

from p2w.config import Config, PretextConfig
from p2w.pretext import build_pretext
from p2w.rng import SampleKeys


def test_input_is_target_is_the_resized_whole():
    wholes, keys = (
        torch.randint(-1000, 1001, (2, 16, 24, 32), dtype=torch.int16),
        SampleKeys(0, 0, torch.tensor([4, 9])),
    )
    config = PretextConfig(name="autoencoder", size=(8, 8, 16), antialias=False)
    views = build_pretext(Config(pretext=config)).sample(wholes, keys)
    unit = (wholes[:, None].double() + 1000) / 2000
    resized = torch.nn.functional.interpolate(unit, config.size, mode="trilinear", align_corners=False)
    assert torch.equal(views.input, views.target) and (views.target - resized).abs().max() < 1e-6
    whole = Config(pretext=PretextConfig(size=(8, 8, 16), antialias=False, volume_fraction=(1.0, 1.0)))
    assert torch.equal(build_pretext(whole).sample(wholes, keys).input, views.input)

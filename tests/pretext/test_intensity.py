"""Intensity transformations against slow float64 references: one function of intensity a part, drawn from its key."""

import dataclasses

import numpy as np
import pytest
import torch

from p2w import rng
from p2w.config import Config, PretextConfig, check_config
from p2w.errors import UserError
from p2w.pretext import build_pretext, volume_ops
from p2w.pretext.volume_ops import IntensityConfig
from p2w.rng import SampleKeys

FULL = IntensityConfig(strength=1.0)
QUIET = dataclasses.replace(FULL, noise=0.0)


def keys(ids, seed=3, epoch=1):
    return SampleKeys(seed, epoch, torch.as_tensor(ids))


def test_a_bezier_table_is_the_curve_found_by_bisection():
    u = torch.tensor(
        [[0.1, 0.9, 0.3, 0.2], [1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1 / 3, 1 / 3, 2 / 3, 2 / 3]]
    )
    tables = volume_ops.bezier(u).double().numpy()

    def curve(t, a, b):
        return 3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3

    for row, (x1, y1, x2, y2) in enumerate(u.double().numpy()):
        for knot in range(volume_ops.KNOTS):
            low, high = 0.0, 1.0
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (
                    (middle, high) if curve(middle, x1, x2) < knot / (volume_ops.KNOTS - 1) else (low, middle)
                )
            # A curve that stands upright, as the second does, is as exact as its steps are fine.
            assert tables[row, knot] == pytest.approx(curve(low, y1, y2), abs=0.05 if row == 1 else 2e-3)
    np.testing.assert_allclose(tables[3], np.linspace(0, 1, volume_ops.KNOTS), atol=1e-5)
    assert (
        (np.diff(tables) >= -1e-6).all()
        and abs(tables[:, 0]).max() < 1e-6
        and abs(tables[:, -1] - 1).max() < 1e-6
    )


def test_look_up_is_linear_interpolation():
    torch.manual_seed(0)
    tables, volumes = torch.rand(3, 9), torch.rand(3, 1, 4, 5, 6)
    volumes[:, 0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    found = volume_ops.apply_tables(volumes, tables)
    for table, volume, got in zip(tables, volumes, found, strict=True):
        np.testing.assert_allclose(
            got.numpy(), np.interp(volume.numpy(), np.linspace(0, 1, 9), table.numpy()), atol=1e-6
        )


def test_without_noise_a_part_goes_through_one_function_of_its_own_that_never_falls():
    ramp = torch.linspace(0, 1, 4 * 8 * 8).view(1, 1, 4, 8, 8).expand(40, 1, 4, 8, 8)
    made = volume_ops.intensity_transform(ramp, keys(range(40)), 0, QUIET).flatten(1)
    assert (made.diff(dim=1) >= -1e-6).all() and made.min() >= 0 and made.max() <= 1
    assert len(torch.unique(made, dim=0)) == 40
    shuffled = torch.randperm(4 * 8 * 8, generator=torch.Generator().manual_seed(0))
    again = volume_ops.intensity_transform(
        ramp.flatten(1)[:, shuffled].view_as(ramp), keys(range(40)), 0, QUIET
    ).flatten(1)
    assert torch.equal(again, made[:, shuffled])


def test_gamma_contrast_and_brightness_against_float64():
    """Curve off: ((x^g - 1/2) c + 1/2 + b), clipped, at the knots."""
    config = dataclasses.replace(QUIET, curve=0.0, strength=0.7)
    x = torch.linspace(0, 1, volume_ops.KNOTS).view(1, 1, 1, 1, -1).expand(6, 1, 1, 1, volume_ops.KNOTS)
    made = volume_ops.intensity_transform(x, keys(range(6)), 2, config)
    u = rng.uniforms(keys(range(6)), volume_ops.STREAM + 2, 8).numpy()
    for row in range(6):
        g, c, b = 2 ** (0.7 * (2 * u[row, 4] - 1)), 1 + 0.35 * (2 * u[row, 5] - 1), 0.14 * (2 * u[row, 6] - 1)
        expected = np.clip((np.linspace(0, 1, volume_ops.KNOTS) ** g - 0.5) * c + 0.5 + b, 0, 1)
        np.testing.assert_allclose(made[row].flatten().numpy(), expected, atol=1e-5)


def test_noise_has_the_deviation_that_was_drawn():
    config = IntensityConfig(strength=1.0, curve=0.0, gamma=1.0, contrast=0.0, brightness=0.0, noise=0.1)
    grey = torch.full((5, 1, 16, 32, 32), 0.5)
    noise = volume_ops.intensity_transform(grey, keys(range(5)), 0, config) - 0.5
    wanted = 0.1 * rng.uniforms(keys(range(5)), volume_ops.STREAM, 8)[:, 7]
    np.testing.assert_allclose(noise.flatten(1).std(1).numpy(), wanted.numpy(), rtol=0.05)
    assert noise.flatten(1).mean(1).abs().max() < 0.005
    draws = rng.standard_normals(keys([1]), 9, 200_000)[0]
    assert abs(float((draws**4).mean()) - 3) < 0.1 and draws.isfinite().all()


def test_off_is_the_part_itself_and_on_depends_on_seed_epoch_id_and_part_alone():
    parts = torch.rand(6, 1, 4, 8, 8)
    assert volume_ops.intensity_transform(parts, keys(range(6)), 0, IntensityConfig()) is parts
    together = volume_ops.intensity_transform(parts, keys(range(6)), 0, FULL)
    torch.manual_seed(99)
    for batch in ([0, 1, 2], [4], [5, 0]):
        assert torch.equal(
            volume_ops.intensity_transform(parts[batch], keys(batch), 0, FULL), together[batch]
        )
    for other in ((keys(range(6), seed=4), 0), (keys(range(6), epoch=2), 0), (keys(range(6)), 1)):
        assert not torch.equal(volume_ops.intensity_transform(parts, *other, FULL), together)


@pytest.mark.parametrize("name", ["parts2whole", "autoencoder"])
def test_the_input_is_changed_and_the_target_is_not(name):
    wholes = torch.randint(-1000, 1001, (3, 16, 16, 16), dtype=torch.int16)
    plain = Config(pretext=PretextConfig(name=name, size=(8, 8, 8)))
    before = build_pretext(plain).sample(wholes, keys([1, 2, 3]))
    after = build_pretext(dataclasses.replace(plain, intensity=FULL)).sample(wholes, keys([1, 2, 3]))
    assert torch.equal(before.target, after.target) and not torch.equal(before.input, after.input)
    assert torch.equal(after.input, volume_ops.intensity_transform(before.input, keys([1, 2, 3]), 0, FULL))


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"intensity\.strength=1\.5: must be from 0 to 1"):
        check_config(Config(intensity=IntensityConfig(strength=1.5)))
    with pytest.raises(UserError, match=r"intensity\.gamma=0\.5: must be from 1 to 10"):
        check_config(Config(intensity=IntensityConfig(gamma=0.5)))

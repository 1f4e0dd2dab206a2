"""Parts2Whole with known answers: what the network sees is where the part lies, and nothing else."""

import numpy as np
import pytest
import torch

from p2w import geometry
from p2w.config import Config, PretextConfig
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.model.unet3d import UNet3dEncoder
from p2w.pretext import build_pretext
from p2w.pretext.parts2whole import Parts2Whole
from p2w.pretext.protocol import Views
from p2w.rng import SampleKeys

SHAPE = (16, 32, 40)
CONFIG = PretextConfig(size=(8, 16, 24), antialias=False)


def keys(ids, seed=3, epoch=1):
    return SampleKeys(seed, epoch, torch.as_tensor(ids))


def ramp(axis: int) -> torch.Tensor:
    """Whole (1, D, H, W) int16 whose HU is 50 times the voxel's index on the axis, minus 1000."""
    steps = torch.arange(SHAPE[axis], dtype=torch.int16) * 50 - 1000
    return steps.view([-1 if k == axis else 1 for k in range(3)]).expand(SHAPE)[None].contiguous()


def test_a_constant_whole_has_constant_views():
    wholes = torch.stack([torch.full(SHAPE, hu, dtype=torch.int16) for hu in (-1000, -500, 0, 1000)])
    views = Parts2Whole(CONFIG).sample(wholes, keys([5, 6, 7, 8]))
    assert views.input.shape == views.target.shape == (4, 1, *CONFIG.size)
    for row, level in enumerate((0.0, 0.25, 0.5, 1.0)):
        assert torch.allclose(views.input[row], torch.tensor(level), atol=1e-6)
        assert torch.allclose(views.target[row], torch.tensor(level), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ramp_shows_the_box_and_the_target_the_whole(axis):
    """Linear interpolation of a ramp is the coordinate itself, so the part tells where it was cut."""
    k = keys([11])
    views = Parts2Whole(CONFIG).sample(ramp(axis), k)
    box = geometry.sample_boxes(k, 0, SHAPE, CONFIG.volume_fraction, CONFIG.max_aspect)[0].double().numpy()

    def expected(start, end, first, last):
        count = CONFIG.size[axis]
        centres = start + (np.arange(count) + 0.5) * (end - start) / count - 0.5
        return (np.clip(centres, first, last) * 50) / 2000  # -1000 HU is 0, the window 2000 HU wide

    start, end = box[axis], box[axis + 3]
    part = expected(start, end, np.floor(start), np.ceil(end) - 1)
    whole = expected(0, SHAPE[axis], 0, SHAPE[axis] - 1)
    line = tuple(slice(None) if k == axis else 3 for k in range(3))
    np.testing.assert_allclose(views.input[0, 0][line].numpy(), part, atol=1e-5)
    np.testing.assert_allclose(views.target[0, 0][line].numpy(), whole, atol=1e-5)
    spread = views.input[0, 0].std(dim=[d for d in range(3) if d != axis])
    assert spread.max() < 1e-6  # constant across the other two axes


def test_target_is_the_resized_whole_as_torch_resizes_it():
    whole = torch.randint(-1000, 1001, (2, *SHAPE), dtype=torch.int16)
    views = Parts2Whole(CONFIG).sample(whole, keys([1, 2]))
    unit = (whole[:, None].double() + 1000) / 2000
    resized = torch.nn.functional.interpolate(unit, CONFIG.size, mode="trilinear", align_corners=False)
    assert (views.target - resized).abs().max() < 1e-6


def test_a_part_is_a_sixteenth_to_a_quarter_and_no_whole():
    boxes = geometry.sample_boxes(keys(range(500)), 0, SHAPE, CONFIG.volume_fraction, CONFIG.max_aspect)
    volume = (boxes[:, 3:] - boxes[:, :3]).double().prod(1) / np.prod(SHAPE)
    assert volume.min() > 1 / 16 - 1e-6 and volume.max() < 1 / 4 + 1e-6


def test_views_depend_on_seed_epoch_and_id_alone():
    whole = torch.randint(-1000, 1001, (6, *SHAPE), dtype=torch.int16)
    pretext = Parts2Whole(PretextConfig(size=(8, 16, 24)))
    together = pretext.sample(whole, keys(range(6)))
    torch.manual_seed(99)  # torch's own random numbers play no part
    for batch in ([0, 1, 2], [3, 4, 5], [4], [5, 0]):
        again = pretext.sample(whole[batch], keys(batch))
        assert torch.equal(again.input, together.input[batch])
        assert torch.equal(again.target, together.target[batch])
    for other in (keys(range(6), seed=4), keys(range(6), epoch=2), keys(range(1, 7))):
        assert not torch.equal(pretext.sample(whole, other).input, together.input)


def test_loss_against_numpy_in_float64():
    torch.manual_seed(0)
    output, target = torch.rand(3, 1, 4, 5, 6), torch.rand(3, 1, 4, 5, 6)
    loss, extras = Parts2Whole(CONFIG).loss(output, Views(target, target))
    expected = np.mean((output.double().numpy() - target.double().numpy()) ** 2)
    assert float(loss) == pytest.approx(expected, rel=1e-6) and extras == {}


def test_half_precision_output_is_compared_in_float32():
    target = torch.full((1, 1, 8, 8, 8), 0.5)
    loss, _ = Parts2Whole(CONFIG).loss((target + 2**-7).bfloat16(), Views(target, target))
    assert loss.dtype == torch.float32 and float(loss) == 2**-14


@pytest.mark.parametrize("skips", [False, True])
def test_build_puts_a_decoder_with_or_without_skips_behind_the_encoder(skips):
    encoder = UNet3dEncoder(2)
    network = build_pretext(Config(pretext=PretextConfig(skips=skips))).build(encoder)
    assert network.encoder is encoder and network.decoder.skips is skips


def test_sizes_and_names_there_are_not_are_refused():
    with pytest.raises(UserError, match=r"pretext\.size=\(8, 12, 8\): each edge must be a multiple of 8"):
        Parts2Whole(PretextConfig(size=(8, 12, 8))).build(build_encoder("unet3d", 2))
    with pytest.raises(UserError, match=r"pretext\.name=whole2parts: unknown; one of amdim, autoencoder, "):
        build_pretext(Config(pretext=PretextConfig(name="whole2parts")))

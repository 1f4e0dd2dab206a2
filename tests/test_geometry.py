import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from p2w import geometry, rng
from p2w.errors import UserError
from p2w.geometry import crop_resize, part_and_whole, sample_boxes
from p2w.rng import SampleKeys, uniforms

SHAPE, SIZE, N = (64, 128, 128), (32, 64, 64), 100_000


def fractions(boxes, shape=SHAPE):
    """Edge factors (B, 3) and starts (B, 3), both relative to the whole, float64."""
    relative = boxes.double().numpy() / np.tile(shape, 2)
    return relative[:, 3:] - relative[:, :3], relative[:, :3]


@pytest.fixture(scope="module")
def drawn():
    return fractions(sample_boxes(SampleKeys(7, 0, torch.arange(N)), 0, SHAPE))


def splitmix64(word):
    """SplitMix64's finaliser in Python's own integers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def test_mixer_is_splitmix64():
    """The generator's published first outputs for seed 1234567."""
    states = [(1234567 + (k + 1) * rng._GOLDEN) % 2**64 for k in range(3)]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(state) for state in states] == published
    tensor = rng.splitmix64(torch.tensor([rng._signed(state) for state in states]))
    assert [int(x) % 2**64 for x in tensor] == published


def test_uniforms_are_53_bits_of_a_splitmix64_stream():
    seed, epoch, part, row = 5, -3, 2**40, 10**12
    state = 0
    for word in (seed, epoch, part):
        state = splitmix64(((state ^ word % 2**64) + rng._GOLDEN) % 2**64)
    stream = splitmix64(((state ^ row) + rng._GOLDEN) % 2**64)
    expected = [(splitmix64((stream + (k + 1) * rng._GOLDEN) % 2**64) >> 11) / 2**53 for k in range(5)]
    assert uniforms(SampleKeys(seed, epoch, torch.tensor([row])), part, 5)[0].tolist() == expected


def test_a_box_depends_on_its_own_key_alone():
    ids = torch.arange(1000)
    boxes = sample_boxes(SampleKeys(1, 2, ids), 3, SHAPE)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:300]
    assert torch.equal(sample_boxes(SampleKeys(1, 2, ids[shuffled]), 3, SHAPE), boxes[shuffled])
    assert torch.equal(sample_boxes(SampleKeys(1, 2, torch.tensor([77])), 3, SHAPE)[0], boxes[77])
    for keys, part in (
        (SampleKeys(2, 2, ids), 3),
        (SampleKeys(1, 1, ids), 3),
        (SampleKeys(1, 2, ids), 0),
        (SampleKeys(2, 1, ids), 3),
    ):
        assert not (sample_boxes(keys, part, SHAPE) == boxes).all(1).any()


@pytest.mark.parametrize(("n", "most"), [(1, 48), (48, 48), (49, 48), (3000, 48), (3000, 24)])
def test_stratified_ids_are_one_of_each_range(n, most):
    ids = np.arange(n) * 3
    some = rng.stratified_ids(ids, most)
    assert len(some) == min(n, most)
    assert all(np.isin(part, some).sum() == 1 for part in np.array_split(ids, min(n, most)))


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_stratified_ids_do_not_meet_the_period_of_the_tiling(tiles):
    """Every `tiles`-th of these ids is the same tile of its scan; a stride took one tile alone, or two."""
    tile = rng.stratified_ids(np.arange(64 * tiles), 64) % tiles
    counts = np.bincount(tile, minlength=tiles)
    assert stats.chisquare(counts).pvalue > 0.001


def test_volume_fraction_is_uniform(drawn):
    edge, _ = drawn
    volume = edge.prod(1)
    assert volume.min() > 1 / 16 - 1e-6 and volume.max() < 1 / 4 + 1e-6
    assert stats.kstest(volume, stats.uniform(1 / 16, 3 / 16).cdf).pvalue > 1e-3


def test_position_is_uniform_over_all_placements(drawn):
    edge, start = drawn
    place = start / (1 - edge)
    for axis in range(3):
        assert stats.kstest(place[:, axis], "uniform").pvalue > 1e-3


def test_aspect_is_symmetric_in_the_axes_and_as_stated(drawn):
    edge, _ = drawn
    log_volume = np.log(edge.prod(1, keepdims=True))
    # Undo the stated narrowing: what is left is three uniforms less their mean, whatever the fraction.
    factor = (np.log(edge) - log_volume / 3) / np.minimum(math.log(4), -log_volume / 2)
    draws = np.random.default_rng(0).random((N, 3))
    stated = (draws - draws.mean(1, keepdims=True))[:, 0]
    for axis in range(3):
        assert stats.ks_2samp(factor[:, axis], stated).pvalue > 1e-3
        assert abs(factor[:, axis].mean()) < 5 * factor[:, axis].std() / math.sqrt(N)
        assert stats.ks_2samp(factor[:, axis], -factor[:, axis]).pvalue > 1e-3
    elongation = edge.max(1) / edge.min(1)
    assert 3.5 < elongation.max() <= 4 + 1e-4
    assert edge.max() <= 1


def test_draws_are_independent_of_one_another(drawn):
    edge, start = drawn
    place = start / (1 - edge)
    volume = edge.prod(1)
    for one, other in [(volume, place[:, 0]), (place[:, 0], place[:, 1]), (place[:, 1], place[:, 2])]:
        independent(one, other)
    independent(volume, np.log(edge[:, 0]) - np.log(volume) / 3, cells=False)


@pytest.mark.parametrize("change", ["id", "far id", "epoch", "part", "seed"])
def test_neighbouring_keys_are_independent(change):
    keys, part = [7, 0, torch.arange(N)], 0
    if change == "part":
        part = 1
    elif change in ("id", "far id"):
        keys[2] = keys[2] + (1 if change == "id" else 2**32)
    else:
        keys[["seed", "epoch"].index(change)] += 1
    here, there = (
        uniforms(SampleKeys(7, 0, torch.arange(N)), 0, 7).numpy(),
        uniforms(SampleKeys(*keys), part, 7).numpy(),
    )
    for k in range(7):
        assert stats.kstest(there[:, k], "uniform").pvalue > 1e-4
        independent(here[:, k], there[:, k])
    independent(here[:, 0], there[:, 6])


def independent(one, other, cells=True):
    """No correlation (5 sigma), and ranks fill an 8 x 8 table evenly (chi-square)."""
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(len(one))
    if cells:
        rank = [np.minimum(x.argsort().argsort() * 8 // len(x), 7) for x in (one, other)]
        table = np.bincount(rank[0] * 8 + rank[1], minlength=64)
        assert stats.chisquare(table).pvalue > 1e-4


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 600)] * 3),
    ends=st.tuples(*[st.floats(1e-4, 1)] * 2).map(sorted),
    aspect=st.floats(1, 10_000),
    seed=st.integers(-(2**63), 2**64),
)
def test_box_is_always_inside_with_its_volume(shape, ends, aspect, seed):
    boxes = sample_boxes(SampleKeys(seed, 5, torch.arange(64) * 2**50), 1, shape, tuple(ends), aspect)
    edge, start = fractions(boxes, shape)
    assert boxes.dtype == torch.float32 and (start >= 0).all() and (edge > 0).all()
    assert (boxes[:, 3:] <= torch.tensor(shape)).all()
    # A box thinner than float32 can place it (1e-7 of the whole) has a volume as coarse as that.
    slack = 1 + 4e-7 / edge.min(1)
    assert (edge.prod(1) <= ends[1] * slack**3).all() and (edge.prod(1) >= ends[0] / slack**3).all()


def test_fraction_1_is_the_whole_and_equal_aspects_are_cubic():
    keys = SampleKeys(0, 0, torch.arange(100))
    assert torch.equal(
        sample_boxes(keys, 0, SHAPE, (1, 1)), torch.tensor([[0.0, 0, 0, *SHAPE]]).expand(100, 6)
    )
    edge, _ = fractions(sample_boxes(keys, 0, SHAPE, (1 / 8, 1 / 8), 1))
    np.testing.assert_allclose(edge, 0.5, atol=1e-6)


@pytest.mark.parametrize("options, words", [
    ({"volume_fraction": (0, 0.5)}, "volume_fraction: must be .* 0 < low <= high <= 1, got"),
    ({"volume_fraction": (0.5, 0.2)}, "volume_fraction"),
    ({"volume_fraction": (0.5, 1.5)}, "volume_fraction"),
    ({"volume_fraction": (float("nan"), 0.5)}, "volume_fraction"),
    ({"max_aspect": 0.5}, "max_aspect: must be at least 1"),
    ({"max_aspect": math.nan}, "max_aspect"),
    ({"max_aspect": math.inf}, "max_aspect"),
    ({"shape_dhw": (0, 4, 4)}, "shape: must be"),
    ({"shape_dhw": (4, 4)}, "shape: must be"),
    ({"keys": SampleKeys(0, 0, torch.zeros(3))}, "keys: ids must be"),
])  # fmt: skip
def test_bad_ranges_are_named(options, words):
    arguments = {"keys": SampleKeys(0, 0, torch.arange(2)), "part": 0, "shape_dhw": SHAPE} | options
    with pytest.raises(UserError, match=words) as error:
        sample_boxes(**arguments)
    assert "\n" not in str(error.value)


WHOLE, BOX = torch.zeros(1, 8, 8, 8, dtype=torch.int16), torch.tensor([[0.0, 0, 0, 4, 4, 4]])


@pytest.mark.parametrize("options, words", [
    ({"whole": WHOLE[0]}, "whole: must be"),
    ({"whole": WHOLE.double()}, "whole: must be"),
    ({"whole": WHOLE[:0], "boxes": BOX[:0]}, "whole: must be"),
    ({"boxes": BOX[:, :3]}, "boxes: must be"),
    ({"boxes": BOX.double()}, "boxes: must be"),
    ({"boxes": BOX.expand(2, 6)}, "boxes: must be"),
    ({"boxes": BOX + 5}, "boxes: row 0 is .* the rule is"),
    ({"boxes": BOX * 0}, "boxes: row 0"),
    ({"boxes": BOX * math.nan}, "boxes: row 0"),
    ({"size_dhw": (4, 0, 4)}, "size: must be"),
    ({"window_hu": (5, 5)}, "window_hu: must be"),
    ({"dtype": torch.int16}, "dtype: must be"),
    ({"out": torch.empty(1, 1, 4, 4, 5)}, "out: must be"),
    ({"out": torch.empty(1, 1, 4, 4, 8)[..., ::2]}, "out: must be"),
])  # fmt: skip
def test_bad_arguments_are_named(options, words):
    with pytest.raises(UserError, match=words) as error:
        crop_resize(**({"whole": WHOLE, "boxes": BOX, "size_dhw": (4, 4, 4)} | options))
    assert "\n" not in str(error.value)


def test_outputs_are_reused_and_carry_no_gradient():
    whole = torch.randint(-1000, 1000, (2, 16, 32, 32), dtype=torch.int16)
    boxes = sample_boxes(SampleKeys(0, 0, torch.arange(2)), 0, whole.shape[1:])
    for dtype in (torch.float32, torch.bfloat16):
        expected = part_and_whole(whole, boxes, (8, 16, 16), dtype=dtype)
        out = torch.full((2, 1, 8, 16, 16), 9, dtype=dtype), torch.full((2, 1, 8, 16, 16), 9, dtype=dtype)
        got = part_and_whole(whole, boxes, (8, 16, 16), dtype=dtype, out=out)
        for mine, given_out, fresh in zip(got, out, expected, strict=True):
            assert mine is given_out and torch.equal(mine, fresh) and not mine.requires_grad
            assert mine.is_contiguous(memory_format=torch.channels_last_3d)
    assert not crop_resize(whole.float().requires_grad_(), boxes, (8, 16, 16)).requires_grad


def test_backend_says_what_and_why():
    name, reason = rng.backend("cpu")
    assert name == "torch" and "cpu" in reason
    assert rng.backend(torch.device("cuda"))[0] in ("torch", "triton")


def test_sizes_that_triton_refuses_are_computed_by_torch_with_one_warning(monkeypatch):
    """A card whose shared memory is too small for one size: no traceback in the middle of a run."""
    errors = pytest.importorskip("triton.runtime.errors")
    from p2w.kernels import crop_resize_triton

    calls = []

    def gives_up(*args, **kwargs):
        calls.append(args)
        raise errors.OutOfResources(101_376, 49_152, "shared memory")

    wholes = torch.randint(-1000, 1000, (2, 8, 12, 12), dtype=torch.int16)
    boxes = sample_boxes(SampleKeys(0, 0, torch.arange(2)), 0, (8, 12, 12))
    expected = part_and_whole(wholes, boxes, (4, 6, 6))
    monkeypatch.setattr(rng, "backend", lambda device: ("triton", "as on a GPU"))
    monkeypatch.setattr(geometry, "_REFUSED_BY_TRITON", set())
    monkeypatch.setattr(crop_resize_triton, "run", gives_up)
    with pytest.warns(
        UserWarning, match=r"\(8, 12, 12\) to \(4, 6, 6\) voxels is computed by torch.*OutOfResources"
    ):
        found = part_and_whole(wholes, boxes, (4, 6, 6))
    again = part_and_whole(wholes, boxes, (4, 6, 6))
    assert len(calls) == 1
    for one, two, right in zip(found, again, expected, strict=True):
        assert torch.equal(one, right) and torch.equal(two, right)

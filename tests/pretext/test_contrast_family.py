"""The contrastive family against slow NumPy in float64, and with known answers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from p2w import config as settings
from p2w import geometry
from p2w.config import Config, DataConfig, ModelConfig, OptimConfig, PretextConfig
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.pretext import build_pretext
from p2w.pretext.contrastive import InBatch, InstanceClasses, MemoryBank, MocoQueue
from p2w.pretext.contrastive.losses import info_nce, l2_normalise, local_global, negative_mask, sinkhorn
from p2w.pretext.contrastive.objectives import ContrastConfig
from p2w.pretext.volume_ops import IntensityConfig
from p2w.rng import SampleKeys
from tests.pretext.contrast_ranks import NAMES, build, views
from tests.pretext.contrast_reference import T, reference_nce, vectors, wide


def test_info_nce_against_numpy():
    anchor, positive, others = vectors(5, 6), vectors(5, 6, seed=1), vectors(9, 6, seed=2)
    allowed = torch.rand(5, 9, generator=torch.Generator().manual_seed(3)) > 0.4
    allowed[2] = False  # nothing to differ from
    losses, cosine, told = info_nce(anchor, positive, others, allowed, T)
    np.testing.assert_allclose(
        wide(losses), reference_nce(wide(anchor), wide(positive), wide(others), allowed, T), rtol=2e-6
    )
    np.testing.assert_allclose(wide(cosine), (wide(anchor) * wide(positive)).sum(1), atol=1e-6)
    for i in range(5):
        best = max((wide(anchor)[i] @ wide(others)[j] for j in range(9) if allowed[i, j]), default=-2)
        assert bool(told[i]) == bool(cosine[i] > best)
    assert losses[2] == 0 and told[2] == 1


def test_a_known_answer():
    """Positive alike, two negatives opposite and orthogonal: log(1 + (exp(-1/t) + 1) / exp(1/t))."""
    anchor = torch.tensor([[1.0, 0.0]])
    others = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    loss, *_ = info_nce(anchor, anchor, others, torch.tensor([[True, True, False]]), T)
    assert float(loss.detach()) == pytest.approx(
        math.log(1 + (math.exp(-1 / T) + 1) / math.exp(1 / T)), rel=1e-6
    )


def test_parts_of_the_same_whole_are_no_negatives_and_a_whole_that_comes_twice_counts_once():
    ids = torch.tensor([4, 5, 4, 6])
    assert negative_mask(ids, ids).tolist() == [[False, True, False, True], [True, False, False, True],
                                            [False, True, False, True], [True, True, False, False]]  # fmt: skip


@pytest.mark.parametrize("name", ["simclr", "parts2whole_contrast"])
def test_the_batch_against_numpy(name):
    """Each part of a whole against the other and all parts of the other wholes, with a whole that stands there twice."""
    _, pretext, network = build(name)
    given = views(1)
    output = network(given.input, *given.extra_inputs)
    loss, extras = pretext.loss(output, given)
    one, two = (
        wide(network.head(network.encoder.pooled(part))) for part in (given.input, given.extra_inputs[0])
    )
    ids, keep, losses = given.extra_inputs[1].tolist(), [0, 1, 2, 4, 5, 6, 7], []
    for a, b in ((one, two), (two, one)):
        others = np.concatenate((one[keep], two[keep]))
        allowed = np.array([[ids[j] != i for j in keep * 2] for i in ids])
        losses.append(reference_nce(a, b, others, allowed, T))
    infonce = np.mean(losses)
    if name == "simclr":
        assert float(loss.detach()) == pytest.approx(infonce, rel=1e-5)
        return
    volumes = [wide(network(part)) for part in (given.input, given.extra_inputs[0])]
    mse = np.mean([np.mean((volume - wide(given.target)) ** 2) for volume in volumes])
    assert float(extras["mse"]) == pytest.approx(mse, rel=1e-5)
    assert float(extras["infonce"]) == pytest.approx(infonce, rel=1e-5)
    assert float(loss.detach()) == pytest.approx(mse + 0.01 * infonce, rel=1e-5)


def test_without_weight_and_second_reconstruction_it_is_parts2whole():
    _, pretext, network = build("parts2whole_contrast", weight=0.0, both=False)
    given = views(0)
    loss, _ = pretext.loss(network(given.input, *given.extra_inputs), given)
    alone = torch.nn.functional.mse_loss(network(given.input), given.target)
    assert float(loss.detach()) == pytest.approx(float(alone.detach()), rel=1e-6)


def test_no_hidden_layer_is_the_bottleneck_itself():
    _, _, network = build("parts2whole_contrast", hidden=0)
    assert not list(network.head.parameters()) and network.head.channels == 6
    features = network.encoder.pooled(views(0).input)
    assert torch.equal(network.head(features), l2_normalise(features))


@pytest.mark.parametrize("counts", [[True] * 6, [True, False, True, True, False, True]])
def test_sinkhorn_against_numpy(counts):
    scores, counts = (
        torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        torch.tensor(counts),
    )
    found = sinkhorn(scores, counts, 3, 0.05)
    q = np.exp(wide(scores) / 0.05)
    for _ in range(3):
        q = q / q[counts].sum(0) / 4
        q = q / q.sum(1, keepdims=True) / int(counts.sum())
    np.testing.assert_allclose(wide(found), q * int(counts.sum()), rtol=1e-4, atol=1e-7)
    even = sinkhorn(scores, counts, 500, 0.5)[counts]
    assert torch.allclose(even.sum(0), counts.sum() / 4 * torch.ones(4), atol=1e-3)
    assert torch.allclose(even.sum(1), torch.ones(len(even)), atol=1e-5)
    assert sinkhorn(scores, counts, 3, 1e-3).isfinite().all()


def test_swav_against_numpy():
    _, pretext, network = build("swav")
    given = views(0)
    loss, extras = pretext.loss(network(given.input, *given.extra_inputs), given)
    prototypes = wide(l2_normalise(network.negatives.prototypes))
    scores = [wide(network(part)) @ prototypes.T for part in (given.input, given.extra_inputs[0])]
    codes = [wide(sinkhorn(torch.tensor(s), torch.ones(8, dtype=torch.bool), 3, 0.05)) for s in scores]
    logs = [s / T - np.log(np.exp(s / T).sum(1, keepdims=True)) for s in scores]
    expected = -0.5 * ((codes[0] * logs[1]).sum(1) + (codes[1] * logs[0]).sum(1)).mean()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(extras["accuracy"]) == pytest.approx(np.mean(codes[0].argmax(1) == codes[1].argmax(1)))


def test_local_against_global_against_numpy():
    anchor, cells = vectors(3, 6), vectors(3, 5, 6, seed=1)
    allowed = ~torch.eye(3, dtype=torch.bool)
    allowed[2] = False
    losses, cosine, _ = local_global(anchor, cells, cells, allowed, T)
    g, c, expected = wide(anchor), wide(cells), []
    for i in range(3):
        wrong = sum(math.exp(g[i] @ c[j, m] / T) for j in range(3) for m in range(5) if allowed[i, j])
        right = [math.exp(g[i] @ c[i, m] / T) for m in range(5)]
        expected.append(np.mean([-math.log(r / (r + wrong)) for r in right]))
    np.testing.assert_allclose(wide(losses), expected, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(wide(cosine), np.einsum("bc,blc->bl", g, c).mean(1), atol=1e-6)


def test_a_single_whole_has_a_finite_gradient_everywhere():
    for name in NAMES:
        _, pretext, network = build(name)
        given = views(0).rows(slice(0, 1))
        pretext.loss(network(given.input, *given.extra_inputs), given)[0].backward()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad), name


@pytest.mark.parametrize("name", NAMES)
def test_validation_changes_nothing_and_does_not_depend_on_what_is_remembered(name):
    _, pretext, network = build(name)
    network.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        first = network(views(0).input, *views(0).extra_inputs)
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
        for source in network.negatives.buffers() if hasattr(network, "negatives") else ():
            source.copy_(torch.ones_like(source))
        again = network(views(0).input, *views(0).extra_inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    whole, _ = pretext.loss(first, views(0))
    each = [
        pretext.loss(tuple(t[i : i + 1] for t in first), views(0).rows(slice(i, i + 1)))[0] for i in range(8)
    ]
    assert float(whole) == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)


def config_of(name, **groups):
    pretext = PretextConfig(name=name, size=(8, 16, 16))
    return Config(data=DataConfig(batch=4), pretext=pretext, model=ModelConfig(width=2), **groups)


@pytest.mark.parametrize("name", NAMES)
def test_views_are_keyed_parts_and_the_network_runs_alone_anywhere(name):
    pretext = build_pretext(config_of(name))
    voxels = torch.randint(-1000, 1001, (4, 16, 32, 40), dtype=torch.int16)
    keys = SampleKeys(3, 1, torch.arange(4))
    given = pretext.sample(voxels, keys)
    assert given.extra_inputs[1].tolist() == [0, 1, 2, 3] and given.input.shape == given.extra_inputs[
        0
    ].shape == (
        4,
        1,
        8,
        16,
        16,
    )
    for number, part in enumerate((given.input, given.extra_inputs[0])):
        boxes = geometry.sample_boxes(keys, number, (16, 32, 40))
        cut = geometry.crop_resize(voxels, boxes, (8, 16, 16))
        same = [
            any(
                torch.equal(whole.flip(axes), own)
                for axes in ([], [1], [2], [3], [1, 2], [1, 3], [2, 3], [1, 2, 3])
            )
            for whole, own in zip(cut, part, strict=True)
        ]  # PIRL's second part is mirrored
        assert all(same) and (torch.equal(cut, part) or (name, number) == ("pirl", 1))
    some = pretext.sample(voxels[2:], SampleKeys(3, 1, torch.arange(2, 4)))
    assert torch.equal(some.input, given.input[2:]) and torch.equal(
        some.extra_inputs[0], given.extra_inputs[0][2:]
    )
    changed = build_pretext(config_of(name, intensity=IntensityConfig(strength=1.0))).sample(voxels, keys)
    assert not torch.equal(changed.input, given.input) and not torch.equal(
        changed.extra_inputs[0], given.extra_inputs[0]
    )
    assert pretext.image_columns(given).keys() == (
        {"part", "whole"} if pretext.reconstructs else {"part", "another part"}
    )
    with torch.device("meta"):
        network = pretext.build(build_encoder("unet3d", 2))
        for rows in (1, 3):
            assert len(network(torch.zeros(rows, 1, 8, 16, 16))) == rows
    network = pretext.build(build_encoder("unet3d", 2))
    network.eval()
    assert len(network(given.input[:1])) == 1


def test_encoders_are_named_so_that_only_one_is_exported():
    for name in NAMES:
        _, _, network = build(name)
        exported = {key for key in network.state_dict() if key.startswith("encoder.")}
        assert exported == {f"encoder.{key}" for key in network.encoder.state_dict()}


def test_what_does_not_go_together_is_one_line():
    small = replace(config_of("simclr"), optim=OptimConfig(accumulate=4))
    with pytest.raises(
        UserError, match=r"data\.batch=4 in optim\.accumulate=4 passes: simclr needs two wholes a pass"
    ):
        build_pretext(small)
    with pytest.raises(
        UserError, match=r"contrast\.queue=3: must hold a batch, 4; pass --contrast\.queue 4096"
    ):
        build_pretext(config_of("moco", contrast=ContrastConfig(queue=3)))
    for name, value in (("temperature", 0.0), ("momentum", 1.5), ("bank", 1), ("sinkhorn_iterations", 0)):
        with pytest.raises(UserError, match=rf"contrast\.{name}={value}: must be from"):
            settings.check_config(config_of("swav", contrast=ContrastConfig(**{name: value})))
    with pytest.raises(UserError, match=r"pretext\.size"):
        build_pretext(replace(config_of("moco"), pretext=PretextConfig(size=(8, 8, 12)))).build(
            build_encoder("unet3d", 2)
        )
    assert {MemoryBank.remembers, MocoQueue.remembers, InstanceClasses.remembers} == {
        True
    } and not InBatch.remembers

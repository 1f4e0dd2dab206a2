"""What the contrastive methods take from their papers: temperatures, queues, other views, statistics that do not leak."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from p2w.config import Config, DataConfig, ModelConfig, PretextConfig, config_to_json, read_config
from p2w.model import build_encoder
from p2w.pretext import build_pretext
from p2w.pretext.contrastive.contrastive_pretext import half_size
from p2w.pretext.contrastive.losses import l2_normalise, sinkhorn
from p2w.pretext.contrastive.objectives import ContrastConfig, InBatch, Prototypes
from p2w.rng import SampleKeys
from tests.pretext.contrast_ranks import BATCH, build, views
from tests.pretext.contrast_reference import T, reference_nce, wide

OWN = {
    "simclr": 0.1,
    "moco": 0.07,
    "instdisc": 0.07,
    "pirl": 0.07,
    "exemplar": 0.07,
    "swav": 0.1,
    "amdim": 0.1,
}
NEW = {
    "momentum_schedule": "constant",
    "teacher_norm": "batch",
    "jigsaw": False,
    "swav_queue": 0,
    "small_parts": 0,
}


def config_of(name, **contrast):
    return Config(
        data=DataConfig(batch=4), pretext=PretextConfig(name=name, size=(8, 16, 16)), model=ModelConfig(width=2),
        contrast=ContrastConfig(**contrast),
    )  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_each_method_has_its_own_temperature_and_takes_another(name):
    for asked, used in ((None, OWN[name]), (0.5, 0.5)):
        network = build_pretext(config_of(name, temperature=asked)).build(build_encoder("unet3d", 2))
        assert network.negatives.temperature == network.in_batch.temperature == used


def test_parts2whole_contrast_has_a_temperature_too():
    for asked, used in ((None, 0.1), (0.7, 0.7)):
        network = build_pretext(config_of("parts2whole_contrast", temperature=asked)).build(
            build_encoder("unet3d", 2)
        )
        assert network.temperature == used


@pytest.mark.parametrize("name", ["pirl", "swav", "moco"])
def test_a_run_from_before_means_what_it_meant_and_one_of_now_keeps_its_settings(tmp_path, name):
    path, tree = tmp_path / "config.json", json.loads(config_to_json(config_of(name, temperature=0.7)))
    path.write_text(json.dumps(tree))
    assert read_config(path).contrast == ContrastConfig(temperature=0.7)
    for setting in NEW:
        del tree["contrast"][setting]
    path.write_text(json.dumps(tree))
    old = read_config(path)
    assert {setting: asdict(old.contrast)[setting] for setting in NEW} == NEW
    assert old.contrast.temperature == 0.7
    pretext = build_pretext(old)
    given = pretext.sample(torch.zeros(4, 16, 32, 32, dtype=torch.int16), SampleKeys(0, 0, torch.arange(4)))
    assert len(given.extra_inputs) == 2
    keys = set(pretext.build(build_encoder("unet3d", 2)).state_dict())
    assert not [key for key in keys if "of_cube" in key or key in ("negatives.entries",)]
    assert ("negatives.other_head.layers.0.weight" in keys) == (name == "pirl")
    path.write_text(json.dumps({"pretext": {"name": name}, "contrast": {"temperature": None}}))
    assert read_config(path).contrast == ContrastConfig()  # written by hand: what is left out has its default


def test_the_momentum_rises_to_one_as_half_a_cosine():
    _, _, network = build("moco", momentum=0.9, momentum_schedule="cosine")
    found = [network.negatives.momentum(step, 8) for step in (0, 2, 4, 8, 9)]
    assert found == pytest.approx([0.9, 1 - 0.1 * (1 + math.cos(math.pi / 4)) / 2, 0.95, 1, 1])
    _, _, network = build("moco", momentum=0.9)
    assert network.negatives.momentum(5, 8) == 0.9


def moco(teacher_norm):
    config = config_of("moco", teacher_norm=teacher_norm, momentum=0.9)
    torch.manual_seed(0)
    pretext = build_pretext(config)
    return pretext, pretext.build(build_encoder("unet3d", 2))


@pytest.mark.parametrize(("teacher_norm", "leaks"), [("running", False), ("batch", True)])
def test_what_the_queue_gets_of_a_whole_does_not_depend_on_the_other_wholes_of_the_batch(teacher_norm, leaks):
    _, network = moco(teacher_norm)
    assert network.negatives.slow_encoder.training is leaks  # before anybody says train()
    batch = torch.rand(4, 1, 8, 16, 16)
    other = batch.clone()
    other[1:] = torch.rand(3, 1, 8, 16, 16) ** 3
    ids, kept = torch.arange(4), []
    for second in (batch, other):
        state = {name: value.clone() for name, value in network.state_dict().items()}
        network(batch, second, ids)
        kept.append(network.negatives.queue[0].clone())
        network.load_state_dict(state)
    assert torch.allclose(*kept, atol=1e-6) is not leaks
    assert network.negatives.slow_encoder.training is leaks


def test_running_statistics_of_the_momentum_encoder_follow_those_of_the_encoder():
    """After the first step they are the encoder's; later they move as the weights do."""
    pretext, network = moco("running")
    name = "down_tr64.ops.0.bn1.running_mean"
    fast, slow = (dict(part.named_buffers()) for part in (network.encoder, network.negatives.slow_encoder))
    name = next(key for key in fast if key.endswith("running_mean"))
    fast[name].fill_(3.0)
    pretext.after_step(network, 0)
    assert torch.allclose(slow[name], torch.tensor(3.0))
    fast[name].fill_(5.0)
    pretext.after_step(network, 1)
    assert torch.allclose(slow[name], torch.tensor(4.0))  # the mean of the first two
    fast[name].fill_(0.0)
    pretext.after_step(network, 99)
    rate = 1 - network.negatives.momentum(99, 1000)
    assert torch.allclose(slow[name], torch.tensor(4.0 * (1 - rate)))


def reference_swav(network, given, queue, small):
    """Loss of SwAV with earlier embeddings (2, Q, C) and small parts (B, V, d, h, w), in NumPy."""
    prototypes = wide(l2_normalise(network.negatives.prototypes))
    scores = [wide(network(part)) @ prototypes.T for part in (given.input, given.extra_inputs[0])]
    codes = []
    for own, earlier in zip(scores, queue, strict=True):
        every = np.concatenate((own, earlier @ prototypes.T))
        codes.append(
            wide(sinkhorn(torch.tensor(every), torch.ones(len(every), dtype=torch.bool), 3, 0.05))[: len(own)]
        )
    crops = [*scores, *(wide(network(small[:, [v]])) @ prototypes.T for v in range(small.shape[1]))]
    logs = [crop / T - np.log(np.exp(crop / T).sum(1, keepdims=True)) for crop in crops]
    terms = [-(codes[i] * logs[v]).sum(1) for i in (0, 1) for v in range(len(crops)) if v != i]
    return np.mean(terms)


def test_swav_with_queue_and_small_parts_against_numpy():
    """Three batches with a queue of 12: the oldest four of the first batch are gone; fewer wholes than prototypes."""
    _, pretext, network = build("swav", prototypes=9, swav_queue=12, small_parts=2)
    network.train()
    small, kept = torch.rand(BATCH, 2, 2, 2, 2), [np.zeros((0, 5))] * 2
    for step in (0, 1, 2):
        given = views(0)
        given = replace(
            given,
            input=given.input + step,
            extra_inputs=(given.extra_inputs[0] * (1 + step), torch.arange(8)),
        )
        output = network(given.input, *given.extra_inputs, small)
        expected = reference_swav(network, given, kept, small)
        assert float(pretext.loss(output, given)[0].detach()) == pytest.approx(expected, rel=1e-5)
        own = [wide(network(part)) for part in (given.input, given.extra_inputs[0])]
        kept = [np.concatenate((old, new))[-12:] for old, new in zip(kept, own, strict=True)]
    assert int(network.negatives.entries) == 24
    held = [np.sort(wide(queue).sum(1)) for queue in network.negatives.queue]
    np.testing.assert_allclose(held, [np.sort(one.sum(1)) for one in kept], atol=1e-5)


def test_the_queue_is_for_passes_of_fewer_wholes_than_prototypes():
    for prototypes, held in ((5, True), (4, False)):
        network = build_pretext(config_of("swav", prototypes=prototypes)).build(build_encoder("unet3d", 2))
        assert ("negatives.queue" in network.state_dict()) is held


def test_pirl_compares_a_jigsaw_with_the_bank_against_numpy():
    _, _, network = build("pirl", jigsaw=True)
    source, first, second = network.negatives, views(0), views(2)
    cubes = [torch.rand(BATCH, 8, 2, 2, 2, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    network(first.input, *first.extra_inputs, cubes[0])
    bank, seen = wide(source.bank), source.seen.numpy().copy()
    losses, *_ = network(second.input, *second.extra_inputs, cubes[1])
    f, rows = wide(network.head(network.encoder.pooled(second.input))), []
    for whole in cubes[1]:
        each = [
            wide(network.encoder.pooled(cube[None, None]))[0] @ wide(source.of_cube.weight).T
            + wide(source.of_cube.bias)
            for cube in whole
        ]
        row = np.concatenate(each) @ wide(source.of_cubes.weight).T + wide(source.of_cubes.bias)
        rows.append(row / np.linalg.norm(row))
    slots = [one % 24 for one in second.extra_inputs[1].tolist()]
    entry = np.array([bank[s] if seen[s] else f[i] for i, s in enumerate(slots)])
    allowed = np.array([[seen[j] and j != s for j in range(24)] for s in slots])
    expected = (
        reference_nce(np.array(rows), entry, bank, allowed, T) + reference_nce(f, entry, bank, allowed, T)
    ) / 2
    np.testing.assert_allclose(wide(losses), expected, rtol=1e-5)


def gradient_wholes():
    """Wholes whose voxels say where they lie: z + 40 y + 1600 x, but for a constant."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in (16, 32, 32)), indexing="ij")
    return torch.tensor(np.stack([z * 60, y * 30, x * 30]) - 480, dtype=torch.int16)


def test_a_jigsaw_is_eight_cubes_of_a_part_one_of_each_octant_in_an_order_of_its_own():
    pretext = build_pretext(config_of("pirl"))
    orders, wholes = set(), gradient_wholes()
    for number in range(12):
        given = pretext.sample(
            wholes, SampleKeys(0, number, torch.full((3,), 7))
        )  # one key: one box, one order
        part, _, cubes = given.extra_inputs
        assert cubes.shape == (3, 8, *half_size(config_of("pirl")))
        low, high = (getattr(part.flatten(1), end)(1).values for end in ("min", "max"))
        means = ((cubes.mean((2, 3, 4)) - low[:, None]) / (high - low)[:, None] > 0.5).int()  # (axis, cube)
        octants = (4 * means[0] + 2 * means[1] + means[2]).tolist()
        assert sorted(octants) == list(range(8))
        orders.add(tuple(octants))
    assert len(orders) > 8


def test_small_parts_are_smaller_and_functions_of_their_keys():
    config = config_of("swav", small_parts=3)
    pretext, wholes = build_pretext(config), gradient_wholes()[[1, 1, 1, 1]]
    given = pretext.sample(wholes, SampleKeys(0, 0, torch.arange(4)))
    small, part = given.extra_inputs[2], given.input
    assert small.shape == (4, 3, *half_size(config)) and half_size(config) == (8, 8, 8)
    extent = small.amax((2, 3, 4)) - small.amin((2, 3, 4))
    assert (extent < (part.amax((1, 2, 3, 4)) - part.amin((1, 2, 3, 4)))[:, None] * 1.2).float().mean() > 0.9
    assert len(torch.unique(small.mean((2, 3, 4)))) == 12
    some = pretext.sample(wholes[1:2], SampleKeys(0, 0, torch.tensor([1])))
    assert torch.equal(some.extra_inputs[2], small[1:2])
    assert half_size(replace(config, pretext=PretextConfig(size=(32, 64, 64)))) == (16, 32, 32)


def test_the_family_trains_on_what_it_samples():
    for name in OWN:
        config = config_of(name)
        pretext = build_pretext(config)
        network = pretext.build(build_encoder("unet3d", 2)).train()
        given = pretext.sample(gradient_wholes()[[0, 1, 2, 0]], SampleKeys(0, 0, torch.arange(4)))
        pretext.loss(network(given.input, *given.extra_inputs), given)[0].backward()
        lacking = [key for key, p in network.named_parameters() if p.requires_grad and p.grad is None]
        assert not lacking, name
        network.eval()
        assert network(given.input, *given.extra_inputs)[0].isfinite().all()
        for one in given.split(2):
            assert len(one.extra_inputs) == len(given.extra_inputs) and len(one.extra_inputs[-1]) == 2


def test_objectives_without_settings_have_a_temperature():
    head = build("simclr")[2].head
    assert InBatch(ContrastConfig(), build("simclr")[2].encoder, head).temperature == 0.1
    assert Prototypes.views(ContrastConfig(small_parts=0)) is None

"""What is remembered between steps, against slow NumPy in float64: bank, classes, queue and the encoder that follows."""

import numpy as np
import torch

from p2w.pretext.contrastive import MocoQueue
from p2w.pretext.contrastive.losses import l2_normalise
from p2w.pretext.contrastive.objectives import ContrastConfig, ProjectionHead
from tests.pretext.contrast_ranks import Plain, build, views
from tests.pretext.contrast_reference import T, reference_nce, wide


def test_the_bank_against_numpy():
    """Two visits: entries, which of them are negatives, and the loss; ids that share a place are one whole."""
    _, _, network = build("instdisc", bank=6, bank_momentum=0.25)
    bank, seen = np.zeros((6, 5)), np.zeros(6, bool)
    for step, ids in ((0, [0, 1, 8, 3]), (1, [1, 5, 3, 2])):
        given = views(step).rows(slice(0, 4))
        losses, *_ = network(given.input, given.extra_inputs[0], torch.tensor(ids))
        f, slots = wide(network(given.input)), [one % 6 for one in ids]
        entry = np.array([bank[s] if seen[s] else f[i] for i, s in enumerate(slots)])
        allowed = np.array([[seen[j] and j != s for j in range(6)] for s in slots])
        np.testing.assert_allclose(
            wide(losses), reference_nce(f, entry, bank, allowed, T), rtol=1e-5, atol=1e-7
        )
        for i, s in enumerate(slots):
            mixed = 0.25 * bank[s] + 0.75 * f[i]
            bank[s], seen[s] = mixed / np.linalg.norm(mixed), True
        np.testing.assert_allclose(wide(network.negatives.bank), bank, atol=1e-6)
        assert network.negatives.seen.tolist() == seen.tolist()


def test_pirl_is_the_mean_of_both_parts_against_the_entry_and_only_the_first_goes_in():
    _, _, network = build("pirl")
    first, second = views(0), views(2)
    network(first.input, *first.extra_inputs)
    bank, seen = wide(network.negatives.bank), network.negatives.seen.numpy().copy()
    losses, *_ = network(second.input, *second.extra_inputs)
    pooled = [network.encoder.pooled(part) for part in (second.input, second.extra_inputs[0])]
    f, g = wide(network.head(pooled[0])), wide(network.negatives.other_head(pooled[1]))
    slots = [one % 24 for one in second.extra_inputs[1].tolist()]
    entry = np.array([bank[s] if seen[s] else f[i] for i, s in enumerate(slots)])
    allowed = np.array([[seen[j] and j != s for j in range(24)] for s in slots])
    expected = (reference_nce(g, entry, bank, allowed, T) + reference_nce(f, entry, bank, allowed, T)) / 2
    np.testing.assert_allclose(wide(losses), expected, rtol=1e-5)


def test_exemplar_is_a_softmax_over_the_wholes_met_before():
    _, _, network = build("exemplar")
    for step in (0, 1):
        given, before = views(step), network.negatives.seen.numpy().copy()
        losses, *_ = network(given.input, *given.extra_inputs)
        classes, slots = wide(l2_normalise(network.negatives.vectors)), given.extra_inputs[1].numpy() % 24
        allowed = np.array([[before[j] and j != s for j in range(24)] for s in slots])
        expected = reference_nce(wide(network(given.input)), classes[slots], classes, allowed, T)
        np.testing.assert_allclose(wide(losses), expected, rtol=1e-5, atol=1e-7)
    assert network.negatives.seen.sum() == 15


def test_the_queue_against_numpy_and_its_encoder_follows():
    _, _, network = build("moco", momentum=0.9)
    source = network.negatives
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            parameter.add_(0.5)
    slow = [p.clone() for p in source.slow_encoder.parameters()]
    queue, given = wide(source.queue), views(0)
    losses, *_ = network(given.input, *given.extra_inputs)
    for now, before, fast in zip(
        source.slow_encoder.parameters(), slow, network.encoder.parameters(), strict=True
    ):
        assert torch.allclose(now, 0.9 * before + 0.1 * fast, atol=1e-6) and not now.requires_grad
    keys = wide(source.slow_head(source.slow_encoder.pooled(given.extra_inputs[0])))
    expected = reference_nce(wide(network(given.input)), keys, queue, np.ones((8, 20), bool), T)
    np.testing.assert_allclose(wide(losses), expected, rtol=1e-5)
    np.testing.assert_allclose(wide(source.queue[:8]), keys, atol=1e-6)
    assert source.ids.tolist() == [*range(8), *[-1] * 12] and source.next == 8
    allowed = np.array([[one != other for other in source.ids.tolist()] for one in range(8)])
    queue = wide(source.queue)
    losses, *_ = network(
        given.input, *given.extra_inputs
    )  # the same wholes: the queue has them, but not as negatives
    keys = wide(source.slow_head(source.slow_encoder.pooled(given.extra_inputs[0])))
    expected = reference_nce(wide(network(given.input)), keys, queue, allowed, T)
    np.testing.assert_allclose(wide(losses), expected, rtol=1e-5)


def test_following_is_spread_over_the_passes_of_a_step():
    encoder = Plain()
    head, config = ProjectionHead(6, ContrastConfig()), ContrastConfig(momentum=0.9, queue=16)
    one, many = MocoQueue(config, encoder, head, 1), MocoQueue(config, encoder, head, 4)
    moved = Plain()
    one._follow(moved, head)
    for _ in range(4):
        many._follow(moved, head)
    for a, b in zip(one.slow_encoder.parameters(), many.slow_encoder.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)

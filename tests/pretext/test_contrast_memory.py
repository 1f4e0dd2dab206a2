"""What is remembered between steps, against slow NumPy in float64: bank, classes, queue and the encoder that follows."""

import numpy as np
import torch

from p2w.pretext.contrastive import Moco
from p2w.pretext.contrastive.losses import l2_normalise
from p2w.train.optim import Precision, Schedule
from p2w.train.step import Stepper
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
    _, pretext, network = build("moco", momentum=0.9)
    source = network.negatives
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            parameter.add_(0.5)
    slow = [p.clone() for p in source.slow_encoder.parameters()]
    queue, given = wide(source.queue), views(0)
    pretext.after_step(network, 0)
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


class UpdatedInTheForwardPass(Moco):
    """MoCo as earlier versions computed it: the momentum encoder moves as a step begins."""

    def build(self, encoder):
        network = super().build(encoder)

        def move(queue, inputs):
            if queue.training:
                queue.update(*inputs[:2])

        network.negatives.register_forward_pre_hook(move)
        return network

    def after_step(self, network, step):
        """Nothing is left to do."""


def moco(kind):
    config, *_ = build("moco", momentum=0.9)
    torch.manual_seed(0)
    pretext = kind.from_config(config)
    network = pretext.build(Plain())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    precision = Precision("fp32", None, "test")
    return network, Stepper(
        config, pretext, network, optimizer, Schedule(config.optim, 3), precision, torch.device("cpu")
    )


def earlier(state):
    """The state as an earlier version saved it."""
    return {key: value.clone() for key, value in state.items() if not key.endswith("updates")}


def test_losses_and_weights_are_those_of_earlier_versions_bit_for_bit():
    (now, stepper), (before, reference) = moco(Moco), moco(UpdatedInTheForwardPass)
    for step, number in enumerate((0, 1, None, 2)):
        given = views(number or 0)
        if number is None:  # a step that is skipped
            given.input[0] = float("nan")
        results = [one.step(given, step) for one in (stepper, reference)]
        assert results[0].applied == results[1].applied == (number is not None)
        if number is not None:
            assert torch.equal(results[0].loss, results[1].loss)
        state = earlier(before.state_dict())
        for key, value in earlier(now.state_dict()).items():
            assert torch.equal(value, state[key]) == (not key.startswith("negatives.slow")), key
    assert now.negatives.updates == 3


def test_a_checkpoint_of_an_earlier_version_goes_on_with_the_same_bits():
    (now, stepper), (before, reference) = moco(Moco), moco(UpdatedInTheForwardPass)
    for step in (0, 1):
        reference.step(views(step), step)
    now.load_state_dict(earlier(before.state_dict()))
    assert torch.equal(stepper.step(views(2), 2).loss, reference.step(views(2), 2).loss)
    assert all(
        torch.equal(a, b) for a, b in zip(now.encoder.parameters(), before.encoder.parameters(), strict=True)
    )
    again, _ = moco(Moco)
    again.load_state_dict(now.state_dict())
    state = now.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_the_momentum_encoder_moves_once_a_step_of_several_passes():
    config, _, network = build("moco", momentum=0.9)
    pretext = Moco.from_config(config)
    given = views(0)
    before = [parameter.clone() for parameter in network.negatives.slow_encoder.parameters()]
    for one in given.split(4):
        network(one.input, *one.extra_inputs)
    unmoved = network.negatives.slow_encoder.parameters()
    assert all(torch.equal(a, b) for a, b in zip(unmoved, before, strict=True))
    pretext.after_step(network, 0)
    assert network.negatives.updates == 1

"""DINO against its definition in float64: what the teacher assigns, what is predicted, the centre, and who follows whom."""

import numpy as np
import pytest
import torch

from tests.pretext.contrast_ranks import BATCH, build, views


def softmax(rows):
    shifted = np.exp(rows - rows.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def built(**contrast):
    _, pretext, network = build("dino", momentum=0.9, temperature=0.2, teacher_temperature=0.05, **contrast)
    with torch.no_grad():  # a teacher that differs from the network
        for weight in (
            *network.negatives.slow_encoder.parameters(),
            *network.negatives.slow_head.parameters(),
        ):
            weight.add_(0.3 * torch.randn_like(weight, requires_grad=False))
        network.negatives.centre.uniform_(-0.2, 0.2)
    return pretext, network


def with_small_parts(given, count):
    small = torch.rand(BATCH, count, 2, 2, 2, generator=torch.Generator().manual_seed(9))
    return (*given.extra_inputs, small)


@pytest.mark.parametrize("count", [0, 3])
def test_loss_is_the_cross_entropy_of_its_definition(count):
    _, network = built(small_parts=count)
    given = views(0)
    extra = with_small_parts(given, count) if count else given.extra_inputs
    teacher = network.negatives

    def embedded(encoder, head, x):
        with torch.no_grad():
            return unit(head.layers(encoder.pooled(x)).double().numpy())

    def vectors(weight):
        return unit(weight.detach().double().numpy())

    parts = (given.input, given.extra_inputs[0])
    slow, fast = vectors(teacher.slow_prototypes), vectors(teacher.prototypes)
    centre = teacher.centre.double().numpy()
    assigned = [
        softmax((embedded(teacher.slow_encoder, teacher.slow_head, x) @ slow.T - centre) / 0.05)
        for x in parts
    ]
    seen = list(parts) + [extra[2][:, i][:, None] for i in range(count)]
    predicted = [np.log(softmax(embedded(network.encoder, network.head, x) @ fast.T / 0.2)) for x in seen]
    pairs = [(t, s) for t in range(2) for s in range(len(seen)) if t != s]
    expected = np.mean([-(assigned[t] * predicted[s]).sum(1) for t, s in pairs], 0)
    losses, cosine, nearest = network(given.input, *extra)
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(nearest.numpy(), assigned[0].argmax(1) == assigned[1].argmax(1))
    assert cosine.shape == (BATCH,)
    cosines = np.concatenate([embedded(teacher.slow_encoder, teacher.slow_head, x) @ slow.T for x in parts])
    np.testing.assert_allclose(teacher.centre.numpy(), 0.9 * centre + 0.1 * cosines.mean(0), atol=1e-6)


def test_the_teacher_takes_no_gradient_and_follows_after_the_step():
    pretext, network = built(small_parts=0)
    given, teacher = views(0), network.negatives
    pretext.loss(network(given.input, *given.extra_inputs), given)[0].backward()
    slow = [*teacher.slow_encoder.parameters(), *teacher.slow_head.parameters(), teacher.slow_prototypes]
    fast = [*network.encoder.parameters(), *network.head.parameters(), teacher.prototypes]
    assert all(weight.grad is None for weight in slow) and all(weight.grad is not None for weight in fast)
    before = [weight.clone() for weight in slow]
    pretext.after_step(network, 0)
    for weight, old, target in zip(slow, before, fast, strict=True):
        assert torch.allclose(weight, 0.9 * old + 0.1 * target.detach(), atol=1e-6)


def test_without_a_centre_or_a_sharp_teacher_there_are_the_solutions_that_they_rule_out():
    """A teacher that assigns all to one vector has, centred, the assignments of chance; an even one is sharpened."""
    _, network = built(small_parts=0)
    teacher, given = network.negatives, views(0)
    one = torch.zeros(2 * BATCH, 7)
    one[:, 3] = 1.0
    for _ in range(200):
        teacher._follow(one)
    assert torch.allclose(
        ((one - teacher.centre) / 0.05).softmax(1), torch.full((2 * BATCH, 7), 1 / 7), atol=1e-5
    )
    network(given.input, *given.extra_inputs)


def test_validation_does_not_touch_the_centre():
    _, network = built(small_parts=0)
    given = views(0)
    before = network.negatives.centre.clone()
    network.eval()
    with torch.no_grad():
        network(given.input, *given.extra_inputs)
    assert torch.equal(network.negatives.centre, before)

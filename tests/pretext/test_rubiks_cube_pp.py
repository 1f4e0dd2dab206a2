"""Rubik's cube++: the puzzle is the whole in other order, and one backward pass trains both sides of the adversary."""

import dataclasses

import pytest
import torch

from p2w.config import Config, PretextConfig
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.pretext import build_pretext
from p2w.pretext.rubiks_cube import Discriminator, RubikConfig, discriminate, reverse_gradient
from p2w.pretext.volume_ops import split_cubes, turn_cubes
from p2w.rng import SampleKeys

CONFIG = Config(
    pretext=PretextConfig(name="rubiks_cube_pp", size=(8, 16, 16)),
    rubik=RubikConfig(critic_width=2, adversary=0.3),
)


def sample(pretext, ids=(0, 1, 2)):
    wholes = torch.randint(
        -1000, 1001, (4, 16, 16, 16), dtype=torch.int16, generator=torch.Generator().manual_seed(0)
    )
    return pretext.sample(wholes[list(ids)], SampleKeys(0, 0, torch.tensor(ids)))


def test_every_cube_of_the_puzzle_is_one_of_the_whole_in_one_of_four_orientations():
    views = sample(build_pretext(CONFIG))
    moved = 0
    for puzzle, whole in zip(
        split_cubes(views.input, (2, 2, 2)), split_cubes(views.target, (2, 2, 2)), strict=True
    ):
        found = []
        for place, cube in enumerate(puzzle):
            ways = [
                turn_cubes(whole[None], torch.tensor([a, b]).expand(1, 8, 2))[0]
                for a in (False, True)
                for b in (False, True)
            ]
            match = [
                (n, way) for way, cubes in enumerate(ways) for n in range(8) if torch.equal(cubes[n], cube)
            ]
            assert len(match) == 1
            found.append(match[0][0])
            moved += match[0] != (place, 0)
        assert sorted(found) == list(range(8))
    assert moved > 12
    assert torch.equal(sample(build_pretext(CONFIG), (2, 0)).input, views.input[[2, 0]])


def test_one_backward_pass_teaches_the_critic_and_the_network_against_it():
    pretext = build_pretext(CONFIG)
    torch.manual_seed(0)
    network = pretext.build(build_encoder("unet3d", 2))
    views = sample(pretext)
    volume, real, made = network(views.input, *views.extra_inputs)
    loss, extras = pretext.loss((volume, real, made), views)
    assert float(loss.detach()) == pytest.approx(float(extras["mse"] + 0.3 * extras["critic"]), rel=1e-6)
    loss.backward()
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    got = {name: weight.grad.clone() for name, weight in trained.items()}  # all of them: DDP waits for each
    # By hand: the critic descends on its loss, the others on the error minus the same loss. Batch norm repeats in training.
    for sign, names in ((1, "critic."), (-1, ("encoder.", "decoder."))):
        network.zero_grad()
        volume = network(views.input)
        critic = discriminate(network.critic(views.target), network.critic(volume))
        (torch.nn.functional.mse_loss(volume, views.target) + sign * 0.3 * critic).backward()
        for name, weight in trained.items():
            if name.startswith(names):
                assert torch.allclose(weight.grad, got[name], atol=1e-6), name


def test_a_reversed_gradient_and_a_critic_of_one_volume_at_a_time():
    x = torch.rand(3, requires_grad=True)
    (reverse_gradient(x) ** 2).sum().backward()
    assert torch.equal(x.grad, -2 * x.detach())
    critic, volumes = Discriminator(2), torch.rand(3, 1, 8, 16, 16)
    assert torch.allclose(critic(volumes)[1:2], critic(volumes[1:2]), atol=1e-6)


def test_validation_and_pictures_get_the_volume_alone():
    pretext = build_pretext(CONFIG)
    network, views = pretext.build(build_encoder("unet3d", 2)), sample(pretext)
    assert network(views.input).shape == views.target.shape
    network.eval()
    output = network(views.input, *views.extra_inputs)
    loss, extras = pretext.loss(output.detach(), views)
    expected = (output.detach() - views.target).pow(2).mean()
    assert not extras and float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_without_weight_there_is_no_critic_and_grids_must_fit():
    plain = build_pretext(dataclasses.replace(CONFIG, rubik=RubikConfig(adversary=0.0)))
    assert not hasattr(plain.build(build_encoder("unet3d", 2)), "critic") and not sample(plain).extra_inputs
    with pytest.raises(UserError, match=r"rubik\.grid=\(3, 2, 2\): must divide pretext\.size"):
        build_pretext(dataclasses.replace(CONFIG, rubik=RubikConfig(grid=(3, 2, 2))))

"""What a pretext may do beside a loss: a teacher that follows after each step, rates of its own, schedules."""

import copy
import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import nn

from p2w.config import Config, DataConfig, ModelConfig, OptimConfig, PretextConfig, TrainConfig
from p2w.errors import UserError
from p2w.log import Log
from p2w.model import build_encoder
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.pretext.parts2whole import Parts2Whole
from p2w.pretext.protocol import ParameterGroup, Views, has_after_step
from p2w.stream.stream import Stream, open_set
from p2w.train.checkpoint import Checkpoints
from p2w.train.loop import Trainer
from p2w.train.optim import Precision, Schedule, build_optimizer, load_optimizer, optimizer_state
from p2w.train.step import Stepper
from p2w.world import World

FP32 = Precision("fp32", None, "test")


class Distilling(EncoderDecoder):
    """Encoder and decoder, and a copy of the encoder that follows it: the teacher."""

    def __init__(self, encoder, decoder):
        super().__init__(encoder, decoder)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, x, scale=None):
        volume = super().forward(x)
        if scale is None or not self.training:
            return volume
        with torch.no_grad():
            wanted = self.teacher(x)[-1].mean((2, 3, 4))
        missed = self.encoder(x)[-1].mean((2, 3, 4)) - wanted
        return volume, missed.square().mean(1) * scale


class SelfDistillation(Parts2Whole):
    """Parts2Whole, and features like those of a moving average of the encoder; its rate and weight depend on the step."""

    def sample(self, batch_BDHW, keys, step=0):
        views = super().sample(batch_BDHW, keys, step)
        return replace(views, extra_inputs=(torch.full((len(views),), step / 10),))

    def build(self, encoder):
        return Distilling(encoder, build_decoder(encoder, False))

    def loss(self, output, views):
        volume, *misses = output if isinstance(output, tuple) else (output,)
        error = (volume - views.target).square().mean()
        return error + sum(miss.mean() for miss in misses), {}

    def parameter_groups(self, network):
        return [
            ParameterGroup(list(network.encoder.parameters()), lr_factor=0.5),
            ParameterGroup(list(network.decoder.parameters()), weight_decay=0.25),
        ]

    def after_step(self, network, step):
        for slow, fast in zip(network.teacher.parameters(), network.encoder.parameters(), strict=True):
            slow.lerp_(fast, 0.5 / (1 + step))
        network.updates += 1


CONFIG = Config(
    data=DataConfig(batch=4, reader_threads=0),
    pretext=PretextConfig(size=(8, 16, 16)),
    model=ModelConfig(width=2),
    optim=OptimConfig(schedule="constant", lr=0.01),
)


def stepper(passes=1, **optim):
    config = replace(CONFIG, optim=replace(CONFIG.optim, accumulate=passes, **optim))
    torch.manual_seed(0)
    pretext = SelfDistillation(config.pretext)
    model = pretext.build(build_encoder("unet3d", 2))
    optimizer, _ = build_optimizer(config.optim, model, pretext.parameter_groups(model))
    schedule = Schedule(config.optim, 10)
    return Stepper(
        config, pretext, nn.Sequential(model), optimizer, schedule, FP32, torch.device("cpu"), model
    )


def views(seed=0, bad=False):
    part, whole = torch.rand(2, 4, 1, 8, 16, 16, generator=torch.Generator().manual_seed(seed))
    part[0, 0, 0, 0, 0] = float("nan") if bad else 0.5
    return Views(part, whole)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("fused", ["torch", "none"])
def test_a_teacher_follows_once_a_step_and_a_skipped_step_leaves_no_trace(fused, passes):
    """Fused, whether a step is skipped is decided on the device, where the update has happened by then."""
    run = stepper(passes, fused=fused)
    assert run.skips_on_device == (fused == "torch")
    teacher = [slow.double() for slow in run.model.teacher.parameters()]
    for step in range(3):
        assert run.step(views(step), step).applied
        encoder = [fast.detach().double() for fast in run.model.encoder.parameters()]
        teacher = [
            slow + (fast - slow) * 0.5 / (1 + step) for slow, fast in zip(teacher, encoder, strict=True)
        ]
    for slow, expected in zip(run.model.teacher.parameters(), teacher, strict=True):
        assert (slow - expected).abs().max() < 1e-6 and slow.grad is None
    assert run.model.updates == 3

    before = copy.deepcopy(run.model.state_dict())
    assert not run.step(views(3, bad=True), 3).applied
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())
    assert run.step(views(4), 4).applied and run.model.updates == 4


def test_groups_have_a_rate_and_a_weight_decay_of_their_own():
    run = stepper(name="sgd", sgd_momentum=0.0, fused="none")
    before = copy.deepcopy(run.model)
    run.step(views(), 0)
    for (name, new), old in zip(run.model.named_parameters(), before.parameters(), strict=True):
        if new.grad is None:
            continue
        rate, decay = (0.005, 0) if name.startswith("encoder.") else (0.01, 0.25)
        expected = old - rate * (new.grad + decay * old)
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-7)
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.005, 0.01]


def test_one_group_is_the_optimizer_of_before_and_takes_its_checkpoints():
    model = nn.Linear(2, 2)
    pretext = Parts2Whole(PretextConfig())
    one, _ = build_optimizer(OptimConfig(), model)
    two, _ = build_optimizer(OptimConfig(), model, pretext.parameter_groups(model))
    model(torch.ones(1, 2)).sum().backward()
    one.step()
    state = optimizer_state(one)
    assert state["param_groups"] == optimizer_state(two)["param_groups"]
    load_optimizer(two, copy.deepcopy(state))
    assert all(torch.equal(two.state[p]["exp_avg"], one.state[p]["exp_avg"]) for p in model.parameters())
    other, _ = build_optimizer(OptimConfig(), model, [ParameterGroup([p]) for p in model.parameters()])
    with pytest.raises(UserError, match=r"hold \[2\] parameters, those of this run's pretext \[1, 1\]"):
        load_optimizer(other, state)


@pytest.mark.parametrize("times", [0, 2])
def test_a_parameter_in_no_group_or_in_two_is_named(times):
    model = nn.Linear(2, 2)
    groups = [ParameterGroup([model.bias]), *[ParameterGroup([model.weight])] * times]
    with pytest.raises(ValueError, match=f"weight is in {times} parameter groups"):
        build_optimizer(OptimConfig(), model, groups)


@pytest.fixture
def trainer(tiny_set, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("P2W_DEVICE", "cpu")

    def make(folder, steps):
        config = replace(CONFIG, train=TrainConfig(steps=steps, validate_every=100, checkpoint_every=2))
        torch.manual_seed(0)
        pretext = SelfDistillation(config.pretext)
        stream = Stream(open_set(str(tiny_set)), batch=4, readers=0)
        (tmp_path / folder).mkdir(exist_ok=True)
        checkpoints = Checkpoints(tmp_path / folder / "checkpoints", 3)
        log = Log(tmp_path / folder, True, steps)
        model = pretext.build(build_encoder("unet3d", 2))
        return Trainer(config, World.start(), pretext, model, stream, checkpoints, log, FP32)

    return make


@pytest.mark.slow
def test_a_stopped_run_continues_with_its_teacher_bit_for_bit(trainer):
    whole, steps = trainer("whole", 4), []
    sample = whole.pretext.sample
    whole.pretext.sample = lambda batch, keys, step: steps.append(step) or sample(batch, keys, step)
    whole.fit(lambda step: [])
    assert steps == [0, 1, 2, 3] and whole.model.updates == 4
    trainer("stopped", 2).fit(lambda step: [])
    again = trainer("stopped", 4)
    assert again.resume()
    again.fit(lambda step: [])
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.model.state_dict().items())
    assert not torch.equal(next(again.model.teacher.parameters()), next(again.model.encoder.parameters()))


def test_a_step_with_work_after_it_is_not_captured(trainer):
    run = trainer("graph", 4)
    assert has_after_step(run.pretext) and not has_after_step(Parts2Whole(PretextConfig()))
    run.world = dataclasses.replace(run.world, device=torch.device("cuda"))
    run._plan_graph()
    assert run.stepper.graph is None
    run.config = replace(run.config, train=replace(run.config.train, cuda_graph="on"))
    with pytest.raises(UserError, match="pretext parts2whole has work to do after each step"):
        run._plan_graph()

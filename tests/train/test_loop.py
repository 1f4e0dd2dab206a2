"""The training loop in one process: which evaluation is a validation, which checkpoints are kept, when a run ends."""

import contextlib
import time
from dataclasses import replace

import pytest
import torch

from p2w.config import Config, DataConfig, ModelConfig, OptimConfig, PretextConfig, TrainConfig
from p2w.errors import UserError
from p2w.log import Log, read_metrics
from p2w.model import build_encoder
from p2w.pretext.parts2whole import Parts2Whole
from p2w.stream.stream import Stream, open_set
from p2w.train.checkpoint import Checkpoints
from p2w.train.loop import Trainer
from p2w.train.optim import Precision
from p2w.train.watchdog import EvaluationInterrupted
from p2w.world import World


class Hopeless(Parts2Whole):
    """Its loss is never finite."""

    def loss(self, output, views):
        loss, extras = super().loss(output, views)
        return loss * float("nan"), extras


@pytest.fixture
def trainer(tiny_set, tmp_path, monkeypatch):
    """Make a trainer on the small set; `train` are its settings."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("P2W_DEVICE", "cpu")

    def make(task=Parts2Whole, precision="fp32", **train):
        config = Config(
            data=DataConfig(batch=4, reader_threads=0),
            pretext=PretextConfig(size=(8, 16, 16)),
            model=ModelConfig(width=2),
            optim=OptimConfig(schedule="plateau", plateau_patience=0),
            train=TrainConfig(**train),
        )
        torch.manual_seed(0)
        pretext = task(config.pretext)
        stream = Stream(open_set(str(tiny_set)), batch=4, readers=0)
        checkpoints = Checkpoints(tmp_path / "checkpoints", config.train.keep)
        log = Log(tmp_path, True, config.train.steps)
        model = pretext.build(build_encoder("unet3d", 2))
        precision = Precision(precision, None, "test")
        return Trainer(config, World.start(), pretext, model, stream, checkpoints, log, precision)

    return make


def scripted(losses):
    """Validation losses by step, so that the bookkeeping has a known answer."""
    return lambda step: [("val/loss", losses[step])] if step in losses else []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_whose_gradients_stay_bad_is_given_up(trainer, precision):
    """With fp16 too: a loss scale that has been halved for this long is not the reason."""
    run = trainer(Hopeless, precision, steps=50, max_nonfinite=4)
    before = [value.clone() for value in run.model.state_dict().values()]
    with pytest.raises(UserError, match="step 4, rank 0: 4 steps in a row without a finite gradient"):
        run.fit(scripted({}))
    assert all(map(torch.equal, before, run.model.state_dict().values()))
    if precision == "fp16":
        assert run.stepper.scaler.get_scale() == 2.0**16 / 2**4


@pytest.mark.slow
def test_a_step_that_is_read_late_changes_no_bit_and_no_verdict(trainer):
    """As on a GPU: whether a step was skipped is decided where it is computed, and read when the next has been asked for."""
    runs = []
    for lag in (0, 1):
        run = trainer(steps=6, validate_every=3, checkpoint_every=100)
        run.checkpoints.folder = run.checkpoints.folder.with_name(f"checkpoints-{lag}")
        run.skips.lag = lag
        assert run.fit(scripted({0: 0.9, 3: 0.8, 6: 0.7})).step == 6
        runs.append(run.model.state_dict())
    assert all(map(torch.equal, runs[0].values(), runs[1].values()))
    bad = trainer(Hopeless, steps=50, max_nonfinite=4)
    bad.skips.lag = 1
    with pytest.raises(UserError, match="step 4, rank 0: 4 steps in a row without a finite gradient"):
        bad.fit(scripted({}))
    assert bad.step == 5


def test_a_resumed_run_asks_for_stop_requests_by_the_pace_of_its_own_steps(trainer, monkeypatch):
    """It once took the steps before the resume for its own, seemed fast, and heard a stop request 100 steps late."""
    run = trainer(steps=1000, validate_every=1000, checkpoint_every=1000, checkpoint_minutes=0.0)
    run.step, run.evaluation_pending = 400, False  # as `resume` leaves it
    monkeypatch.setattr(World, "sum", lambda world, values: values)
    run.world = replace(run.world, size=2)
    intervals, poll = [], run._poll_stop_request

    def slow():
        time.sleep(0.3)
        stopping = poll()
        intervals.append(run._steps_to_poll)
        return stopping or len(intervals) == 3

    run._poll_stop_request = slow
    assert run._train(scripted({}), scripted({})).state == "told to stop"
    assert intervals == [1, 1, 1]


def test_a_cuda_graph_that_is_asked_for_in_vain_is_refused(trainer):
    with pytest.raises(
        UserError, match=r"train\.cuda_graph=on: the device is no GPU; pass --train\.cuda-graph auto"
    ):
        trainer(cuda_graph="on")


def test_the_best_validation_is_kept_between_regular_checkpoints(trainer):
    run = trainer(steps=8, validate_every=1, checkpoint_every=8, keep=1)
    run.fit(scripted({0: 0.9, 1: 0.8, 2: 0.5, 3: 0.7, 4: 0.6, 5: 0.5, 6: 0.6, 7: 0.6, 8: 0.6}))
    assert run.checkpoints.best() == 2 and run.checkpoints.steps() == [2, 8]
    assert run.checkpoints.load(2).validation == 0.5


def test_a_run_made_longer_counts_the_validations_of_one_that_was_long(trainer):
    """Its first end was no multiple of validate_every: the extra look there neither halves the rate nor stops early."""
    losses = dict.fromkeys(range(11), 0.5)
    settings = {"validate_every": 4, "checkpoint_every": 100}
    first = trainer(steps=6, **settings)
    first.fit(scripted(losses))
    assert [record["step"] for record in read_metrics(first.log.run) if "val/loss" in record] == [0, 4, 6]
    longer = trainer(steps=10, **settings)
    assert longer.resume()
    longer.fit(scripted(losses))
    assert longer.stepper.schedule.state_dict() == {"factor": 0.5, "best": 0.5, "bad": 1}  # of steps 4 and 8


def test_a_damaged_last_checkpoint_is_written_again(trainer, tmp_path):
    settings = {"steps": 5, "validate_every": 100, "checkpoint_every": 2}
    trainer(**settings).fit(scripted({}))
    last = tmp_path / "checkpoints" / "step-00000005" / "model.safetensors"
    sound = last.read_bytes()
    last.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    again = trainer(**settings)
    assert again.resume() and again.step == 4
    again.fit(scripted({}))
    assert last.read_bytes() == sound


def test_an_interrupted_evaluation_is_repeated_once(trainer):
    """Killed after the look that was owed and before the next checkpoint: it is done and logged again, not twice."""
    losses = {0: 0.9, 2: 0.5, 4: 0.6, 6: 0.7, 8: 0.4}
    settings = {"steps": 8, "validate_every": 2, "checkpoint_every": 100}

    def broken_off(step):
        if step == 4:
            raise EvaluationInterrupted
        return scripted(losses)(step)

    def killed(step):
        if step == 6:
            raise KeyboardInterrupt
        return scripted(losses)(step)

    first = trainer(**settings)
    outcome = first.fit(broken_off)
    assert (outcome.state, outcome.step) == ("told to stop", 4)
    for how in (killed, killed, scripted(losses)):
        run = trainer(**settings)
        assert run.resume() and run.step == 4 and run.evaluation_pending
        with contextlib.suppress(KeyboardInterrupt):
            run.fit(how)
    looks = [(one["step"], one["val/loss"]) for one in read_metrics(run.log.run) if "val/loss" in one]
    assert looks == list(losses.items())
    assert run.stepper.schedule.state_dict() == {"factor": 0.25, "best": 0.4, "bad": 0}
    assert run.checkpoints.best() == 8 and run.checkpoints.steps() == [2, 4, 8]

"""Asynchronous checkpoints: a copy is of its own step, one save at a time, failures are reported and the run goes on."""

import threading
import time

import pytest
import torch
from test_checkpoint import same, snapshot
from test_loop import scripted, trainer  # noqa: F401  a fixture

from p2w.config import TrainConfig
from p2w.errors import UserError
from p2w.log import read_metrics
from p2w.train.checkpoint import AsyncCheckpointer, Checkpoints, Snapshot


class Slow(Checkpoints):
    """Begins to write only when `go` is set, and notes how many write at a time."""

    def __init__(self, folder):
        super().__init__(folder, keep=100)
        self.go, self.at_once, self.most = threading.Event(), 0, 0

    def save(self, snapshot):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        assert self.go.wait(30)
        path = super().save(snapshot)
        self.at_once -= 1
        return path


def evaluated(snapshot):
    snapshot.state["owed"] = False
    return snapshot


def test_the_copy_is_of_its_step_whatever_the_steps_after_do(tmp_path):
    """Weights, batch statistics and Adam's averages of a network that trains on while its checkpoint waits."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv3d(2, 2, 3), torch.nn.BatchNorm3d(2))
    model.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step():
        optimizer.zero_grad()
        (model(torch.randn(2, 2, 4, 4, 4)) ** 2).sum().backward()
        optimizer.step()

    def now(at):
        state = {"optimizer": optimizer.state_dict(), "owed": False, "schedule": {"bad": at}}
        return Snapshot(at, model.state_dict(), state, None)

    slow, at_once = Slow(tmp_path / "slow"), Checkpoints(tmp_path / "at_once", keep=100)
    checkpointer = AsyncCheckpointer(slow, TrainConfig(), pytest.fail)
    for at in (1, 2, 3):  # the second and third copies go to the memory of the one before
        step()
        at_once.save(now(at))
        checkpointer.save(now(at))
        step()
        slow.go.set()
        checkpointer.wait()
        slow.go.clear()
    for at in (1, 2, 3):
        one, other = slow.load(at), at_once.load(at)
        assert same(one.model, other.model) and same(one.state, other.state)
    assert not same(slow.load(1).model, slow.load(2).model)
    assert checkpointer.durable == (3, False)


def test_one_at_a_time_and_the_wait_is_counted(tmp_path):
    slow = Slow(tmp_path)
    checkpointer = AsyncCheckpointer(slow, TrainConfig(), pytest.fail)
    checkpointer.save(evaluated(snapshot(1)))
    assert checkpointer.stall_s < 0.2 and checkpointer.durable == (-1, False) and slow.steps() == []
    threading.Timer(0.3, slow.go.set).start()
    checkpointer.save(evaluated(snapshot(2)))  # waits for the first
    assert checkpointer.stall_s > 0.2 and checkpointer.durable == (1, False)
    checkpointer.wait()
    assert checkpointer.durable == (2, False) and slow.steps() == [1, 2] and slow.most == 1


def test_a_failure_is_reported_at_the_next_step_and_the_next_save_works(tmp_path):
    said = []
    blocked = tmp_path / "file"
    blocked.write_text("where a folder should be")
    checkpointer = AsyncCheckpointer(Checkpoints(blocked / "checkpoints"), TrainConfig(), said.append)
    checkpointer.save(evaluated(snapshot(1)))
    deadline = time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        checkpointer.poll()
    assert (
        len(said) == 1 and "not saved" in said[0] and said[0].endswith("goes on with the checkpoints it has")
    )
    assert checkpointer.durable == (-1, False)
    blocked.unlink()
    checkpointer.save(evaluated(snapshot(2)))
    checkpointer.wait()
    assert checkpointer.durable == (2, False) and len(said) == 1


def test_what_is_no_full_disk_is_raised_where_the_loop_sees_it(tmp_path):
    class Broken(Checkpoints):
        def save(self, snapshot):
            raise ZeroDivisionError

    checkpointer = AsyncCheckpointer(Broken(tmp_path), TrainConfig(), pytest.fail)
    checkpointer.save(evaluated(snapshot(1)))
    with pytest.raises(ZeroDivisionError):
        checkpointer.wait()


def test_the_clock_saves_too(tmp_path):
    checkpointer = AsyncCheckpointer(
        Checkpoints(tmp_path), TrainConfig(checkpoint_every=10, checkpoint_minutes=0.2 / 60), print
    )
    assert (
        not checkpointer.should_save(3, None)
        and checkpointer.should_save(10, None)
        and not checkpointer.should_save(0, None)
    )
    time.sleep(0.25)
    assert checkpointer.should_save(3, None) and not checkpointer.should_save(0, None)
    checkpointer.save(evaluated(snapshot(3)))
    assert not checkpointer.should_save(4, None)
    checkpointer.wait()
    never = AsyncCheckpointer(Checkpoints(tmp_path), TrainConfig(checkpoint_minutes=0), print)
    never._last_save -= 1e9
    assert not never.should_save(3, None)


def test_the_best_so_far_may_still_be_on_its_way(tmp_path):
    slow = Slow(tmp_path)
    checkpointer = AsyncCheckpointer(slow, TrainConfig(checkpoint_every=100), pytest.fail)
    assert checkpointer.should_save(1, 0.5)
    checkpointer.save(evaluated(snapshot(1, validation=0.5)))
    assert not checkpointer.should_save(2, 0.6) and checkpointer.should_save(2, 0.4)
    slow.go.set()
    checkpointer.wait()
    assert not checkpointer.should_save(2, 0.6) and checkpointer.should_save(2, 0.4)


@pytest.mark.slow
def test_a_run_saves_by_the_clock_and_what_it_keeps_for_good(trainer):  # noqa: F811
    """And says for how many seconds it stood still."""
    run = trainer(
        steps=9, validate_every=100, checkpoint_every=100, checkpoint_minutes=1e-9, keep=1, keep_every=4
    )
    run.checkpoints.keep_every = 4
    run.fit(scripted({}))
    assert run.checkpoints.steps() == [4, 8, 9]
    stalls = [one["speed/checkpoint_stall_s"] for one in read_metrics(run.log.run) if "train/loss" in one]
    assert stalls and sum(stalls) > 0
    plain = trainer(steps=9, validate_every=100, checkpoint_every=100)
    plain.fit(scripted({}))
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name])


def test_an_error_in_the_loop_lets_the_save_under_way_finish(trainer):  # noqa: F811
    run = trainer(steps=9, validate_every=100, checkpoint_every=2)
    log_step = run._log_step

    def failing(result, samples):
        log_step(result, samples)
        if run.step == 3:
            raise UserError("bad sample")

    run._log_step = failing
    with pytest.raises(UserError, match="bad sample"):
        run.fit(scripted({}))
    assert run.checkpoints.load_latest().step == 2 and not list(run.checkpoints.folder.glob(".*"))

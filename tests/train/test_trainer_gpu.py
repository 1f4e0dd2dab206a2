"""The loop on the CPU and on a GPU: resuming, the set held on the device, checkpoints' copies, a process group of one."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import processes
import pytest
import torch
from devices import CPU_AND_GPU, NEEDS_GPU, on_gpu, settle
from processes import REPO

from p2w.config import Config, DataConfig, ModelConfig, OptimConfig, PretextConfig, TrainConfig
from p2w.log import Log
from p2w.pretext import build_pretext_and_network
from p2w.stream.prefetch import DeviceCache
from p2w.stream.stream import Stream, open_set
from p2w.train.checkpoint import AsyncCheckpointer, Checkpoints, Snapshot
from p2w.train.loop import Trainer
from p2w.train.optim import choose_precision, optimizer_state
from p2w.world import World

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BATCH = 4


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """No rank's environment, and torch's switches as they were."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "P2W_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    cudnn, deterministic = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    before = cudnn.benchmark, cudnn.deterministic
    yield
    cudnn.benchmark, cudnn.deterministic = before
    torch.use_deterministic_algorithms(deterministic)


class Steps:
    """A trainer on a device, and its batches."""

    def __init__(self, where, folder, device, graph="off", deterministic=True, held=False):
        config = Config(
            data=DataConfig(batch=BATCH, reader_threads=1),
            pretext=PretextConfig(size=(8, 16, 16)),
            model=ModelConfig(width=2),
            optim=OptimConfig(schedule="constant"),
            train=TrainConfig(steps=100, log_every=10**6, cuda_graph=graph, deterministic=deterministic),
        )
        world = replace(World.start(deterministic=deterministic), device=device)
        precision = choose_precision("auto" if device.type == "cuda" else "fp32", device).apply()
        torch.manual_seed(0)
        pretext, model = build_pretext_and_network(config)
        model.to(device).to(memory_format=torch.channels_last_3d)
        shards = open_set(str(where))
        self.held = DeviceCache(shards, "train", device) if held else None
        self.stream = Stream(shards, "train", BATCH, readers=1, device=device, cache=self.held)
        log = Log(folder, False, config.train.steps)
        checkpoints = Checkpoints(folder / "checkpoints", 2, pytest.fail)
        self.trainer = Trainer(config, world, pretext, model, self.stream, checkpoints, log, precision)
        self.device = device

    def take(self, count):
        """Take steps; the weights after them, by name, on the CPU."""
        trainer = self.trainer
        with self.stream:
            batches = self.stream.batches(*divmod(trainer.step, self.stream.steps_per_epoch))
            for _ in range(count):
                trainer.train_step(next(batches))
            settle(self.device)
        return {name: value.detach().cpu().clone() for name, value in trainer.model.state_dict().items()}

    def save(self):
        self.trainer.save()
        self.trainer.checkpointer.wait()
        return self


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("device", "graph"), [(CPU, "off"), on_gpu(CUDA, "off"), on_gpu(CUDA, "auto")])
def test_a_resumed_run_is_bit_equal_to_one_that_was_not_stopped(tiny_set, tmp_path, device, graph):
    """With train.deterministic. Where a CUDA graph is used, steps from the fourth of each start on are replays of it."""
    whole = Steps(tiny_set, tmp_path / "whole", device, graph).take(10)
    first = Steps(tiny_set, tmp_path / "stopped", device, graph)
    halfway = first.take(5)
    first.save()
    second = Steps(tiny_set, tmp_path / "stopped", device, graph)
    assert second.trainer.resume() and second.trainer.step == 5
    resumed = second.take(5)
    assert same(whole, resumed)
    assert not same(halfway, resumed)


@CPU_AND_GPU
def test_without_deterministic_kernels_a_resumed_run_differs_by_rounding(tiny_set, tmp_path, device):
    runs = [Steps(tiny_set, tmp_path / str(at), device, deterministic=False).take(6) for at in range(2)]
    first = Steps(tiny_set, tmp_path / "stopped", device, deterministic=False)
    first.take(3)
    first.save()
    second = Steps(tiny_set, tmp_path / "stopped", device, deterministic=False)
    assert second.trainer.resume()
    resumed = second.take(3)
    names = [name for name, value in resumed.items() if value.is_floating_point()]
    for name in names:  # six of Adam's steps move a weight by 0.006 at most
        torch.testing.assert_close(resumed[name], runs[0][name], rtol=0.02, atol=2e-3)
        torch.testing.assert_close(runs[1][name], runs[0][name], rtol=0.02, atol=2e-3)


@CPU_AND_GPU
def test_a_set_held_on_the_device_trains_the_same_weights(tiny_set, tmp_path, device):
    streamed = Steps(tiny_set, tmp_path / "streamed", device).take(9)  # an epoch has 6 steps
    run = Steps(tiny_set, tmp_path / "held", device, held=True)
    held = run.take(9)
    assert same(streamed, held)
    assert run.held.voxels.device.type == device.type and run.held.filled.all()


class Waits(Checkpoints):
    """Begins to write when `go` is set."""

    def __init__(self, folder):
        super().__init__(folder, 5, pytest.fail)
        self.go = threading.Event()

    def save(self, snapshot):
        assert self.go.wait(30)
        return super().save(snapshot)


@CPU_AND_GPU
def test_a_checkpoint_is_of_its_step_though_training_goes_on_while_it_is_written(tiny_set, tmp_path, device):
    """Copies of a GPU's tensors are in page-locked memory, made once, and complete when `save` returns."""
    run = Steps(tiny_set, tmp_path / "run", device)
    run.take(2)
    checkpoints = Waits(tmp_path / "slow")
    checkpointer = AsyncCheckpointer(checkpoints, TrainConfig(), pytest.fail)
    places: set[int] = set()
    for at in (2, 4):
        checkpoints.go.clear()
        optimizer = optimizer_state(run.trainer.stepper.optimizer)
        expected = {
            name: value.detach().cpu().clone() for name, value in run.trainer.model.state_dict().items()
        }
        averages = [
            {k: torch.as_tensor(v).cpu().clone() for k, v in one.items()}
            for one in optimizer["state"].values()
        ]
        state = {"optimizer": optimizer, "owed": False}
        checkpointer.save(Snapshot(at, run.trainer.model.state_dict(), state, None))
        copies = [tensor for _, tensor in checkpointer._memory.values()]
        memory = {tensor.data_ptr() for tensor in copies}
        assert memory == (places or memory)
        places = memory
        if device.type == "cuda":
            assert sum(tensor.is_pinned() for tensor in copies) >= len(expected)
        run.take(2)  # the run goes on
        checkpoints.go.set()
        checkpointer.wait()
        found = checkpoints.load(at)
        assert same(found.model, expected)
        kept = found.state["optimizer"]["state"].values()
        for one, other in zip(kept, averages, strict=True):
            assert all(torch.equal(torch.as_tensor(one[key]).cpu(), value) for key, value in other.items())


GROUP_OF_ONE = """
import json, os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from p2w.rng import SampleKeys as Keys
from p2w.model.norm import sum_over_ranks
from p2w.pretext import build_pretext_and_network as build
from p2w.train.optim import Schedule, build_optimizer, choose_precision
from p2w.train.step import Stepper
from p2w.config import Config, ModelConfig, OptimConfig, PretextConfig

cuda = sys.argv[1] == "cuda"
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None)
config = Config(pretext=PretextConfig(size=(8, 16, 16)), model=ModelConfig(width=2), optim=OptimConfig(schedule="constant"))
found = []
for wrapped in (False, True):
    torch.manual_seed(0)
    pretext, model = build(config)
    model.to(device).to(memory_format=torch.channels_last_3d)
    network = model
    if wrapped:
        network = DistributedDataParallel(model, device_ids=[device] if cuda else None, broadcast_buffers=False)
    optimizer, _ = build_optimizer(config.optim, model)
    precision = choose_precision("auto" if cuda else "fp32", device).apply()
    stepper = Stepper(config, pretext, network, optimizer, Schedule(config.optim, 10), precision, device)
    torch.manual_seed(1)
    voxels = torch.randint(-1000, 1000, (4, 16, 32, 32), dtype=torch.int16).to(device)
    losses = []
    for step in range(3):
        views = pretext.sample(voxels, Keys(0, step, torch.arange(4, device=device)))
        if wrapped and step == 0:
            stepper.warm_up_ddp(views)
        losses.append(stepper.step(views, step).loss)
    found.append([float(loss) for loss in losses])
summed = sum_over_ranks(torch.ones(3, device=device)).tolist()
flag = torch.ones(1)
dist.all_reduce(flag)
dist.barrier()
print(json.dumps({"losses": found, "sum": summed, "flag": flag.item(), "backend": dist.get_backend()}), flush=True)
del stepper, network, model, optimizer
import gc; gc.collect()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
@CPU_AND_GPU
def test_a_process_group_of_one_trains_as_a_process_without_a_group(tmp_path, device):
    """NCCL for a GPU's tensors beside gloo for the host's, as `World.start` sets them up, under torchrun."""
    script = tmp_path / "group_of_one.py"
    script.write_text(GROUP_OF_ONE)
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    run = processes.run if device.type == "cpu" else subprocess.run
    done = run(
        [*agent, str(script), device.type], cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["sum"] == [1, 1, 1] and found["flag"] == 1
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-5 if device.type == "cpu" else 1e-2)


@pytest.mark.slow
@NEEDS_GPU
def test_a_run_by_the_launcher_says_what_it_chose(tiny_set, tmp_path):
    """launch/train.py under torchrun with every choice left to it: it finishes, and continues from its checkpoint."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "launch/train.py", "demo",
        "--shards", str(tiny_set), "--run-dir", str(tmp_path / "run"), "--data.batch", "4", "--model.width", "8",
        "--pretext.size", "16", "32", "32", "--data.cache-on-device",
    ]  # fmt: skip
    for steps in ("8", "12"):
        done = subprocess.run(
            [*command, "--train.steps", steps], cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)},
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"finished at step {steps}" in done.stderr
        assert "CUDA graph: o" in done.stderr  # on, or off with its reason
    assert "continues after step 8 of 12" in done.stderr

"""A training run in this process, as launch/train.py builds one, for the stages of the GPU day.

Everything of p2w that the stages lean on (configuration, trainer, stream, precision, the forms of layers) is met here
and nowhere else in this folder.
"""

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import CUDA, DAY, DEVICE
from torch import Tensor, nn

from p2w.config import Config
from p2w.log import Log
from p2w.model.forms import FOLDED, PLAIN, Formed, formed_modules, set_forms
from p2w.model.norm import FLAT, FUSED
from p2w.pretext import build_pretext_and_network
from p2w.recipes import named
from p2w.shards.manifest import manifest_bytes
from p2w.shards.manifest_schema import MANIFEST_NAME, MANIFEST_VERSION
from p2w.shards.writer import open_shard
from p2w.stream.local import ShardSet
from p2w.stream.prefetch import DeviceCache
from p2w.stream.stream import Batch, Stream, open_set
from p2w.train.checkpoint import Checkpoints
from p2w.train.form_choice import choose_run_forms
from p2w.train.loop import Trainer
from p2w.train.optim import Precision, choose_precision
from p2w.train.step import WARM_UP_STEPS
from p2w.world import World

RECIPE = "paper" if CUDA else "demo"
BATCH = 16 if CUDA else 4
PRECISIONS = ("fp32", "tf32", "bf16", "fp16") if CUDA else ("fp32", "bf16")
PLAIN_FORMS = {"norm": PLAIN, "upsampling": PLAIN}
FLAT_FORMS = {"norm": FLAT, "upsampling": PLAIN}
FUSED_FORMS = {"norm": FUSED, "upsampling": PLAIN}
FOLDED_FORMS = {"norm": PLAIN, "upsampling": FOLDED}
BOTH = {"norm": FUSED, "upsampling": FOLDED}
WHOLE = (64, 128, 128)  # voxels of a sub-scan, z y x
SCANS, EACH = (16, 10) if CUDA else (8, 4)  # of the set that stages train on, and sub-scans of each


@dataclass(frozen=True)
class Setup:
    """What differs from a recipe. `forms` are those of layers, by kind; None: chosen as in a run, by measuring on a GPU."""

    precision: str = "auto"
    batch: int = BATCH
    recipe: str = RECIPE
    compiled: bool = False
    graph: str = "off"
    deterministic: bool = False
    forms: dict[str, str] | None = field(default_factory=lambda: dict(PLAIN_FORMS))


def recipe_of(name: str) -> Config:
    """A recipe's configuration, with a smaller network in a rehearsal."""
    config = named(name)
    if CUDA:
        return config
    return replace(
        config, model=replace(config.model, width=4), pretext=replace(config.pretext, size=(16, 16, 16))
    )


def config_of(setup: Setup) -> Config:
    """The configuration of a set-up."""
    config = recipe_of(setup.recipe)
    train = {
        "precision": setup.precision,
        "compile": setup.compiled,
        "cuda_graph": setup.graph,
        "log_every": 10**6,
    }
    return replace(
        config,
        data=replace(config.data, batch=setup.batch, reader_threads=4 if CUDA else 1),
        train=replace(config.train, **train, deterministic=setup.deterministic),
    )


def world_of(setup: Setup) -> World:
    """Start this process as a run with this set-up does, after a reset of torch's switches from an earlier set-up."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    return World.start(deterministic=setup.deterministic)


class Unavailable(Exception):
    """No layer of the network has the form on this device."""


def take_forms(model: nn.Module, forms: dict[str, str], precision: Precision, samples: int) -> None:
    """Put the layers into `forms`, {"norm": form, "upsampling": form}; those that do not have a form stay plain.

    Raises Unavailable where no layer has one that is asked for.
    """
    taken: dict[str, str] = {}
    for name, module in formed_modules(model):
        assert isinstance(module, Formed)
        form = forms["upsampling" if FOLDED in module.possible_forms() else "norm"]
        if form in module.forms(DEVICE, precision.dtype, samples):
            taken[name] = form
    for form in forms.values():
        if form != PLAIN and form not in taken.values():
            raise Unavailable(f"no layer has the form {form} on {DEVICE}")
    set_forms(model, taken)


class CollectingLog(Log):
    """A log that collects its lines in `said` and writes none of them."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(folder, False, steps)
        self.said: list[str] = []

    def line(self, text: str, style: str | None = None) -> None:
        """Keep the line."""
        self.said.append(text)


class Run:
    """A trainer and its data. `log.said` has the lines of its log. It must be closed, because its readers are threads."""

    def __init__(
        self, setup: Setup, shards: ShardSet, *, held: bool = False, folder: Path | None = None
    ) -> None:
        self.setup, self.config, world = setup, config_of(setup), world_of(setup)
        precision = choose_precision(setup.precision, DEVICE).apply()
        torch.manual_seed(self.config.train.seed)
        self.pretext, self.model = build_pretext_and_network(self.config)
        self.model.to(DEVICE).to(memory_format=torch.channels_last_3d)
        self.folder = folder or Path(tempfile.mkdtemp(dir=DAY))
        self.log = CollectingLog(self.folder, self.config.train.steps)
        if setup.forms is None:
            choose_run_forms(self.config, self.model, self.folder, world, precision, self.log)
        else:
            take_forms(self.model, setup.forms, precision, setup.batch)
        self.stream = Stream(
            shards, "train", setup.batch, seed=self.config.data.seed, readers=self.config.data.reader_threads,
            device=DEVICE, cache=DeviceCache(shards, "train", DEVICE) if held else None,
        )  # fmt: skip
        checkpoints = Checkpoints(self.folder / "checkpoints", 2, print)
        self.trainer = Trainer(
            self.config, world, self.pretext, self.model, self.stream, checkpoints, self.log, precision
        )
        self.batches: Any = None

    def steps(self, count: int) -> list[Tensor]:
        """Take `count` steps through the loop's own code; the loss of each, () on the device: nothing is waited for."""
        if self.batches is None:
            self.batches = self.stream.batches(*divmod(self.trainer.step, self.stream.steps_per_epoch))
        losses = []
        for _ in range(count):
            before = self.trainer.window.loss.clone()
            self.trainer.train_step(next(self.batches))
            after = self.trainer.window.loss
            losses.append(after.clone() - before.to(after.device))
        return losses

    def weights(self) -> Tensor:
        """Every number of the network's state, (N,) float32 on the CPU."""
        return torch.cat(
            [value.detach().float().flatten().cpu() for value in self.model.state_dict().values()]
        )

    def save(self) -> None:
        """Write a checkpoint of this moment and wait until it is on the disk."""
        self.trainer.save()
        self.trainer.checkpointer.wait()

    def close(self) -> None:
        """End the readers."""
        self.stream.close()
        self.batches = None


def rate(run: Run, steps: int, rounds: int = 3 if CUDA else 1) -> dict[str, Any]:
    """Samples a second in rounds of `steps` steps, after some steps of warm-up."""
    began = time.perf_counter()
    run.steps(WARM_UP_STEPS + 3 if CUDA else 1)  # a CUDA graph is captured meanwhile
    _wait()
    warm = time.perf_counter() - began
    waited, seconds = run.stream.wait_seconds, []
    for _ in range(rounds):
        began = time.perf_counter()
        run.steps(steps)
        _wait()
        seconds.append((time.perf_counter() - began) / steps)
    middle = sorted(seconds)[rounds // 2]
    return {
        "ms": 1e3 * middle,
        "samples_s": run.setup.batch / middle,
        "spread_samples_s": [run.setup.batch / max(seconds), run.setup.batch / min(seconds)],
        "warm_up_s": warm,
        "said": run.log.said,
        "waited_share": (run.stream.wait_seconds - waited) / (steps * sum(seconds)),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if CUDA else None,
    }


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def network_of(recipe: str = RECIPE) -> tuple[Config, nn.Module]:
    """The network of a recipe on the device, in the memory format of a run."""
    config = recipe_of(recipe)
    _, model = build_pretext_and_network(config)
    return config, model.to(DEVICE).to(memory_format=torch.channels_last_3d)


def structured_set() -> ShardSet:
    """A data set with structure, in DAY/structured: ramps, balls and noise; written at the first use.

    Stages need one before the phantoms are made. SCANS scans of EACH sub-scans of WHOLE voxels, one scan in eight set
    aside; torch, NumPy, pyarrow and the shard writer alone.
    """
    folder = DAY / "structured"
    if not (folder / MANIFEST_NAME).exists():
        _write(folder, SCANS, EACH)
    return open_set(str(folder))


def _write(folder: Path, scans: int, each: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows, shards = [], []
    for scan in range(scans):
        uid = f"1.2.826.0.{scan:04d}"
        shard = open_shard(str(folder / f"{uid}.tar"), WHOLE)
        for tile in range(each):
            voxels = _volume(scan * each + tile)
            row = {
                "key": f"{uid}/z{tile * WHOLE[0]:04d}_y0000_x0000", "scan_uid": uid, "subset": -1,
                "z": tile * WHOLE[0], "y": 0, "x": 0, "spacing_z": 2.5, "spacing_y": 0.7, "spacing_x": 0.7,
                "mean_hu": float(voxels.mean()), "std_hu": float(voxels.std()), "shard": f"{uid}.tar",
            }  # fmt: skip
            rows.append(shard.add({**row, "split": "train" if scan % 8 else "val"}, voxels))
        done = shard.close()
        shards.append({"name": f"{uid}.tar", "nbytes": done.nbytes, "crc32c": done.crc32c})
    meta: dict[str, Any] = {
        "schema": MANIFEST_VERSION, "format": "tar", "shape": list(WHOLE), "dtype": "int16", "shards": shards,
        "window_hu": [-1000, 1000], "axis_order": "zyx",
        "split": {"rule": "scan", "val_scans": sum(scan % 8 == 0 for scan in range(scans))},
    }  # fmt: skip
    beside = folder / f".{MANIFEST_NAME}"
    beside.write_bytes(manifest_bytes(rows, meta))
    beside.rename(folder / MANIFEST_NAME)


def _volume(seed: int) -> Any:
    """int16 HU (D, H, W) in [-1000, 1000]: a ramp, three balls and noise of 30 HU."""
    rng = np.random.default_rng(seed)
    z, y, x = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in WHOLE)]
    direction = rng.normal(size=3)
    a, b, c = 500 * direction / np.linalg.norm(direction)
    volume = (a * z + b * y + c * x - 300).astype(np.float32)
    for _ in range(3):
        centre, radius = rng.uniform(-0.6, 0.6, 3), rng.uniform(0.15, 0.5)
        squares = [np.square(axis - at, dtype=np.float32) for axis, at in zip((z, y, x), centre, strict=True)]
        volume += 500 * (squares[0] + squares[1] + squares[2] < radius**2)
    volume += 30 * rng.standard_normal(WHOLE, np.float32)
    return volume.clip(-1000, 1000).astype("<i2")


def batches_of(stream: Stream, count: int) -> list[Batch]:
    """Copies of the next `count` batches, made by a GPU that is behind the host, for which the stream must wait."""
    found = []
    for batch in stream.batches():
        if CUDA:
            torch.cuda._sleep(10_000_000)
        found.append(replace(batch, voxels=batch.voxels.clone()))
        if len(found) == count:
            break
    stream.close()
    return found

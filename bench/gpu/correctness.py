"""Are the results on this GPU correct? Tests, self-check, precisions, resuming, the data set in device memory.

    python3 bench/gpu/correctness.py tests selfcheck precisions resume held

Each writes rows (rows.py). On a CPU the same code runs at toy size, with the precisions that a CPU has.
"""

import importlib.util
import re
import subprocess
import sys
import time

import torch
from harness import BATCH, BOTH, FOLDED_FORMS, PRECISIONS, Run, Setup, batches_of, network_of, structured_set
from rows import CUDA, DAY, DEVICE, REPO, attempt, failures, needs_card, say, seconds_left, stages

from p2w import rng
from p2w.stream.local import ShardSet
from p2w.stream.prefetch import DeviceCache
from p2w.stream.stream import Stream
from p2w.train.optim import choose_precision
from p2w.train.preflight import convolution_error, crop_resize_error

STEPS = 20 if CUDA else 4  # of each precision
HALF = 6 if CUDA else 2  # steps before a resume, and after it
MORE_THAN_NOISE = 3.0  # a resumed run may differ by so many times what two equal runs differ by


def tests() -> None:
    """`pytest -m gpu` on the files that have such tests: others need packages that a bare GPU machine lacks."""
    files = sorted(
        str(path.relative_to(REPO))
        for path in (REPO / "tests").rglob("test_*.py")
        if re.search(r"mark\.gpu|^from devices import", path.read_text(), re.MULTILINE)
    )
    # Named as they end (-vv over the -q of pyproject.toml), so that a run that is too slow has said what went through.
    options = [
        "-vv",
        "-rfE",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "--continue-on-collection-errors",
    ]
    if CUDA and importlib.util.find_spec("xdist"):
        options += ["--numprocesses", "6"]  # most of their time is compiling and starting
    command = [sys.executable, "-m", "pytest", *options, *files]
    log = DAY / "pytest.log"
    with open(log, "wb") as output:
        try:
            limit = None if seconds_left() == float("inf") else max(5.0, seconds_left() - 6)
            code = subprocess.run(
                command, cwd=REPO, stdout=output, stderr=output, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    said = log.read_text(errors="replace")
    print(said, flush=True)
    found: dict[str, list[str]] = {}
    for kind, words in {"passed": "PASSED", "left_out": "SKIPPED", "failed": "FAILED|ERROR"}.items():
        after = re.findall(rf"^(tests/\S+) (?:{words})\b", said, re.MULTILINE)
        before = re.findall(rf"^\[gw\d+\] \[ *\d+%\] (?:{words}) (tests/\S+)", said, re.MULTILINE)
        found[kind] = list(dict.fromkeys([*after, *before]))
    if "No module named pytest" in said:
        raise RuntimeError("pytest is not installed")
    counts = {kind: len(names) for kind, names in found.items()}
    too_slow = "not all of them ended in time" if code == -1 else ""
    say(
        "tests marked gpu",
        **counts,
        files=len(files),
        exit_code=code,
        names_failed=found["failed"],
        note=too_slow,
    )
    if found["failed"] or code not in (0, 5):
        failures.append("tests")


def selfcheck() -> None:
    """The check that every run makes at its start, in both 16-bit precisions, at the size of a run."""
    config, model = network_of()
    say("crop-resize runs by", backend=rng.backend(DEVICE))
    shape = (BATCH if CUDA else 1, 1, *config.pretext.size)
    for amp in ("bf16", "fp16"):
        if amp == "fp16" and not CUDA:
            needs_card("convolutions in fp16")
            continue

        def convolutions(amp: str = amp) -> None:
            began = time.perf_counter()
            wrong = convolution_error(model, choose_precision(amp, DEVICE), shape, DEVICE)
            say(f"convolutions in {amp}", found=wrong or "sound", seconds=time.perf_counter() - began)
            if wrong:
                failures.append(amp)

        attempt(f"convolutions in {amp}", convolutions)
    began = time.perf_counter()
    wrong = crop_resize_error(config.pretext, DEVICE)
    say("crop-resize", found=wrong or "sound", seconds=time.perf_counter() - began)
    if wrong:
        failures.append("crop-resize")


def precisions() -> None:
    """Losses of the first steps in each precision, compared with float32."""
    shards = structured_set()
    reference: list[float] = []
    for amp in PRECISIONS:

        def one(amp: str = amp) -> None:
            run = Run(Setup(precision=amp), shards)
            try:
                losses = [float(loss) for loss in run.steps(STEPS)]
            finally:
                run.close()
            reference.extend(losses if amp == "fp32" else [])
            differs = [abs(a / b - 1) for a, b in zip(losses, reference, strict=True)]
            say(
                f"losses in {amp}", amp=amp, losses=losses, steps=STEPS, first_differs=differs[0],
                worst_differs=max(differs),
            )  # fmt: skip

        attempt(f"losses in {amp}", one)


def _trained(setup: Setup, shards: ShardSet, steps: int) -> torch.Tensor:
    run = Run(setup, shards)
    try:
        run.steps(steps)
        return run.weights()
    finally:
        run.close()


RESUMES = {
    "resume, deterministic": Setup(deterministic=True),
    "resume, deterministic, other forms and CUDA graph": Setup(
        deterministic=True, graph="on" if CUDA else "off", forms=BOTH if CUDA else FOLDED_FORMS
    ),
    "resume": Setup(),
}


def resume() -> None:
    """A run that was saved and resumed by another trainer, compared with two uninterrupted ones."""
    shards = structured_set()
    for name, setup in RESUMES.items():

        def one(name: str = name, setup: Setup = setup) -> None:
            whole, again = (_trained(setup, shards, 2 * HALF) for _ in range(2))
            first = Run(setup, shards)
            try:
                first.steps(HALF)
                first.save()
            finally:
                first.close()
            second = Run(setup, shards, folder=first.folder)
            try:
                if not second.trainer.resume() or second.trainer.step != HALF:
                    raise RuntimeError(f"resumed at step {second.trainer.step}, not at {HALF}")
                second.steps(HALF)
                resumed = second.weights()
            finally:
                second.close()
            noise, found = float((whole - again).abs().max()), float((whole - resumed).abs().max())
            bound = 0.0 if setup.deterministic or not CUDA else MORE_THAN_NOISE * noise
            say("resume", name=name, two_runs_differ=noise, resumed_differs=found, bound=bound, holds=found <= bound,
                largest_weight=float(whole.abs().max()), said=second.log.said)  # fmt: skip
            if not found <= bound:
                failures.append(name)

        attempt(name, one)


def held() -> None:
    """Two epochs from device memory equal the streamed ones, bit for bit, while the GPU is behind the host."""
    shards = structured_set()
    place = DeviceCache(shards, "train", DEVICE)
    streams = [
        Stream(shards, "train", BATCH, seed=3, readers=2, device=DEVICE, cache=held) for held in (None, place)
    ]
    count = 2 * streams[0].steps_per_epoch
    one, two = (batches_of(stream, count) for stream in streams)
    equal = [
        torch.equal(a.voxels, b.voxels)
        and torch.equal(a.ids, b.ids)
        and (a.epoch, a.step) == (b.epoch, b.step)
        for a, b in zip(one, two, strict=True)
    ]
    say("set on the device", batches=count, equal=sum(equal), held_all=bool(place.filled.all()))
    if not all(equal):
        failures.append("held")


if __name__ == "__main__":
    stages({"tests": tests, "selfcheck": selfcheck, "precisions": precisions, "resume": resume, "held": held})

"""How fast is a step on this GPU, in each form that a run may use, and what takes its time?

    python3 bench/gpu/speed.py step profile start batches

`step`: a plain fp16-autocast loop, then p2w's own loop in each form: of layers, as a CUDA graph, compiled. `profile`: the
GPU's busy share and a table of kernels. `start`: seconds from the command to the first step. `batches`: larger batches, and
the recipe `large`. Rows as in rows.py; the table of kernels goes to OUT/profile.txt.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import (
    BATCH,
    BOTH,
    FLAT_FORMS,
    FOLDED_FORMS,
    FUSED_FORMS,
    RECIPE,
    Run,
    Setup,
    Unavailable,
    rate,
    recipe_of,
    structured_set,
)
from rows import (
    CUDA,
    DAY,
    DEVICE,
    OUT,
    REPO,
    attempt,
    needs_card,
    say,
    seconds_left,
    stages,
    synchronize,
)  # fmt: skip
from step import Step, Way  # bench/step.py: a loop that uses nothing of p2w's trainer

STEPS = 20 if CUDA else 1  # a round
FORMS: dict[str, Setup] = {
    "layers plain": Setup(),
    "as a run chooses": Setup(graph="auto", forms=None),
    "norm flat": Setup(forms=FLAT_FORMS),
    "norm fused": Setup(forms=FUSED_FORMS),
    "up-sampling folded": Setup(forms=FOLDED_FORMS),
    "norm fused, up-sampling folded": Setup(forms=BOTH),
    "layers plain, CUDA graph": Setup(graph="on"),
    "norm fused, up-sampling folded, CUDA graph": Setup(forms=BOTH, graph="on"),
    "layers plain, fp16": Setup(precision="fp16"),
    "up-sampling folded, compiled": Setup(forms=FOLDED_FORMS, compiled=True),
}
COMPILING_S = 60.0  # torch.compile of this network, forward and backward
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def plain_loop() -> None:
    """The baseline loop: contiguous, eager, unfused Adam, fp16 autocast with a scaler (float32 on a CPU)."""
    config = recipe_of(RECIPE)
    way = Way("fp16") if CUDA else Way()
    step = Step(way, BATCH, config.pretext.size, DEVICE, config.model.width)
    rates = [step() for _ in range(23 if CUDA else 2)][3 if CUDA else 1 :]
    middle = sorted(rates)[len(rates) // 2]
    spread = [min(rates), max(rates)]
    say("step", form=f"plain loop, {way}", batch=BATCH, ms=1e3 * BATCH / middle, samples_s=middle,
        spread_samples_s=spread, floor=True)  # fmt: skip


def step() -> None:
    """Time every form, each in its own trainer; the plain loop before and after them."""
    shards = structured_set()
    attempt("plain loop", plain_loop)
    for name, setup in FORMS.items():
        if not CUDA and (setup.graph == "on" or setup.precision == "fp16" or setup.compiled):
            needs_card(f"step: {name}")
            continue

        def one(name: str = name, setup: Setup = setup) -> None:
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            try:
                run = Run(setup, shards)
            except Unavailable as error:
                say(f"step: {name}", skipped=str(error))
                return
            try:
                say("step", form=name, batch=setup.batch, amp=run.trainer.stepper.precision.name,
                    **rate(run, STEPS))  # fmt: skip
            finally:
                run.close()

        attempt(f"step: {name}", one, needs_s=COMPILING_S if setup.compiled else 8.0 if CUDA else 0.0)
    attempt("plain loop", plain_loop, needs_s=3.0 if CUDA else 0.0)


def profile() -> None:
    """Profile three steps: the GPU's busy share, kernels and host waits a step, and the slowest kernels."""
    shards = structured_set()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if CUDA:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for name in ("layers plain", "as a run chooses"):

        def one(name: str = name) -> None:
            try:
                run = Run(FORMS[name], shards)
            except Unavailable as error:
                say(f"profile: {name}", skipped=str(error))
                return
            try:
                run.steps(4)
                synchronize()
                with torch.profiler.profile(activities=activities) as found:
                    run.steps(3)
                    synchronize()
            finally:
                run.close()
            order = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
            table = found.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=110)
            with open(OUT / "profile.txt", "a") as file:
                file.write(f"{name}: three steps of {RECIPE}, batch {BATCH}\n{table}\n")
            if CUDA:
                say("profile", form=name, **_busy(found))
            else:
                say("profile", form=name, operations_a_step=len(found.events()) / 3)

        attempt(f"profile: {name}", one)
    if not CUDA:
        needs_card("busy share of the GPU")


def _busy(found: torch.profiler.profile) -> dict[str, float]:
    """Share of the time from the first kernel to the last in which the GPU ran any; kernels and waits a step."""
    on_card = torch.autograd.DeviceType.CUDA
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == on_card and event.time_range.end > event.time_range.start
    )
    busy = end = 0.0
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    waits = sum(event.name in SYNCS for event in found.events())
    span = end - spans[0][0]
    # One wait is this measurement's own, after the third step.
    return {"busy_share": busy / span, "kernels_a_step": len(spans) / 3, "host_waits_a_step": (waits - 1) / 3}


def start() -> None:
    """Seconds from the command to the first logged step, of a machine that has never run p2w and of one that has."""
    shards = structured_set()
    size = [str(edge) for edge in recipe_of(RECIPE).pretext.size]
    for name in ("first start", "second start") if CUDA else ("first start",):

        def one(name: str = name) -> None:
            folder = Path(tempfile.mkdtemp(dir=DAY))
            command = [
                sys.executable, "launch/train.py", RECIPE, "--shards", shards.where, "--run-dir", str(folder / "run"),
                "--data.batch", str(BATCH), "--train.steps", "1000", "--train.log-every", "1",
                "--pretext.size", *size, "--model.width", str(recipe_of(RECIPE).model.width),
            ]  # fmt: skip
            began = time.time()
            with open(folder / "said.txt", "wb") as said:
                process = subprocess.Popen(command, cwd=REPO, stdout=said, stderr=subprocess.STDOUT)
                try:
                    first = _first_step(process, folder / "run" / "metrics.jsonl", began)
                finally:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(30)
                    except subprocess.TimeoutExpired:
                        process.kill()
            print((folder / "said.txt").read_text(errors="replace")[-2000:], flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            say("start", name=name, seconds_to_first_step=first)

        attempt(name, one)


def _first_step(process: subprocess.Popen[bytes], metrics: Path, began: float) -> float:
    """Seconds until the file of metrics has a training loss. Raises RuntimeError where the run ends before."""
    while seconds_left() > 5:
        if metrics.exists():
            lines = [line for line in metrics.read_text().splitlines() if '"train/loss"' in line]
            if lines:
                return json.loads(lines[0])["time"] - began
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with code {process.returncode} before its first step")
        time.sleep(0.05)
    raise RuntimeError("no first step before this stage ends")


def batches() -> None:
    """The rate at larger batches, and of the recipe `large`."""
    shards = structured_set()
    sizes = (
        [("paper", 32), ("paper", 64), ("paper", 128), ("large", 4), ("large", 16)] if CUDA else [("demo", 8)]
    )
    for recipe, batch in sizes:

        def one(recipe: str = recipe, batch: int = batch) -> None:
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            run = None
            try:
                run = Run(Setup(recipe=recipe, batch=batch, graph="auto", forms=None), shards)
                say(
                    "step",
                    form=f"{recipe}, batch {batch}",
                    batch=batch,
                    **rate(run, 6 if CUDA else 1),
                )
            except torch.OutOfMemoryError as error:
                say(f"step: {recipe}, batch {batch}", skipped=f"out of memory: {str(error)[:120]}")
            finally:
                if run is not None:
                    run.close()

        attempt(f"step: {recipe}, batch {batch}", one, needs_s=10.0 if CUDA else 0.0)


if __name__ == "__main__":
    stages({"step": step, "profile": profile, "start": start, "batches": batches})

"""Collects the results of the GPU day: rows and goals in bench/results/gpu_day.json, and a section of table.md.

    python bench/gpu/table.py OUT-OF-1 OUT-OF-2 OUT-OF-3      folders of bench/gpu/day.sh; then `python bench/table.py`

Reads rows-*.jsonl, kernel.json and end_to_end.json in those folders, wherever they lie. What a stage could not measure is
listed as skipped, with its reason; a part that failed is a goal that is not met.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from common import RESULTS, Goal, Row, save, show

SAMPLES_S = 730  # end to end, paper's network at 64x64x32, batch 16, on an H200
TIMES_PLAIN = 2.0  # a plain fp16-autocast loop in the same run
COPY = 0.5  # of a copy's speed, by crop-resize at batch 128
SHARE = 0.005  # of a step, by crop-resize at batch 16
START_S = 15.0  # from the command to the first step, on a machine that has run p2w before
LOSSES = {
    "tf32": 0.02,
    "bf16": 0.1,
    "fp16": 0.1,
}  # worst difference from float32's losses over the first steps
REHEARSED = "CPU"  # of its rates there are no goals
Found = list[dict[str, Any]]


def read(folders: Iterable[Path]) -> tuple[Found, dict[str, Any]]:
    """All rows without duplicates, and the results of the benches that stages ran, by name."""
    rows: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {}
    for folder in folders:
        for path in sorted(folder.rglob("rows-*.jsonl")):
            rows |= {line: json.loads(line) for line in path.read_text().splitlines() if line}
        for name in ("kernel", "end_to_end"):
            for path in sorted(folder.rglob(f"{name}.json")):
                results[name] = json.loads(path.read_text())
    return list(rows.values()), results


def of(found: Found, what: str, **fields: Any) -> Found:
    """Rows of one kind that were measured."""
    return [
        row for row in found
        if row["what"] == what and "skipped" not in row and "error" not in row
        and all(row.get(name) == value for name, value in fields.items())
    ]  # fmt: skip


def correct(found: Found) -> Iterator[Goal]:
    """Goals on correctness."""
    for row in of(found, "tests marked gpu"):
        yield Goal(
            f"tests on the card that fail, of {row['passed'] + row['failed']} run", row["failed"], 0, False
        )
    for what in ("convolutions in bf16", "convolutions in fp16", "crop-resize"):
        for row in of(found, what):
            text = what if row["found"] == "sound" else f"{what}: {row['found']}"
            yield Goal(f"self-check, {text}", float(row["found"] == "sound"), 1)
    for row in found:
        if row["what"].startswith("losses in ") and row.get("amp") in LOSSES and "worst_differs" in row:
            text = f"losses of {row['steps']} steps in {row['amp']} differ from fp32's by, at most"
            yield Goal(text, row["worst_differs"], LOSSES[row["amp"]], False)
    for row in of(found, "resume"):
        text = f"{row['name']}: differs by (two equal runs by {row['two_runs_differ']:.3g})"
        yield Goal(text, row["resumed_differs"], row["bound"], False)
    for row in of(found, "set on the device"):
        yield Goal("batches from the device's memory equal to streamed ones", row["equal"], row["batches"])
    for row in found:
        if row["what"] == "stage" and row["state"] in ("failed", "too slow"):
            yield Goal(f"stage {row['stage']}: {row['state']}, exit code {row['exit_code']}", 0, 1)
        if "error" in row:
            yield Goal(f"{row['what']}: {row['error'][:120]}".replace("|", "/"), 0, 1)


def rates(found: Found, results: dict[str, Any], card: str) -> tuple[list[Row], list[Goal]]:
    """Steps in each form, the whole loop, and their goals."""
    rows, goals = [], []
    floors = sorted(row["samples_s"] for row in of(found, "step", floor=True))
    floor = floors[-1] if floors else 0.0  # the better of the two times it was measured
    for row in of(found, "step"):
        group = "a step of the recipe's network" if row["batch"] == _batch(found) else "other batches"
        note = f"{row['ms']:.2f} ms"
        if floor and group.startswith("a step") and not row.get("floor"):
            note += f", {row['samples_s'] / floor:.2f}x the plain loop"
        spread = tuple(row["spread_samples_s"])
        kind = "peer" if row.get("floor") else "ours"
        rows.append(
            Row(f"{group}, {card}", row["form"], row["samples_s"], "samples/s", kind, (spread[0], spread[1]), note),
        )  # fmt: skip
    whole = [row for row in results.get("end_to_end", {}).get("rows", []) if row["kind"] == "ours"]
    chosen = whole or [{"value": row["samples_s"]} for row in of(found, "step", form="as a run chooses")]
    if chosen and card != REHEARSED:
        rate = chosen[0]["value"]
        goals.append(Goal("samples/s end to end (730 is asked of an H200)", rate, SAMPLES_S))
        if floor:
            goals.append(Goal("end to end, times a plain fp16-autocast loop", rate / floor, TIMES_PLAIN))
    for row in of(found, "start") if card != REHEARSED else ():
        text = f"seconds to the first step, {row['name']}"
        goals.append(
            Goal(
                text, row["seconds_to_first_step"], START_S if row["name"].startswith("second") else 60, False
            )
        )
    return rows, goals


def _batch(found: Found) -> int:
    """The batch size at which forms are compared."""
    floors = of(found, "step", floor=True)
    return int(floors[0]["batch"]) if floors else 16


def kernel(found: Found, results: dict[str, Any]) -> tuple[list[Row], list[Goal]]:
    """What bench/kernel.py said; crop-resize's share of the step is by the step that was measured the same day."""
    result = results.get("kernel", {})
    rows = [
        Row(**row | {"spread": tuple(row["spread"]) if row["spread"] else None})
        for row in result.get("rows", [])
    ]
    goals = []
    for goal in result.get("goals", []):
        bound = goal["bound"]
        if "fraction of a copy" in goal["text"] and goal["text"].split()[-1] in ("128", "256"):
            bound = max(bound, COPY)
        if "of a training step" not in goal["text"]:
            goals.append(Goal(goal["text"], goal["value"], bound, goal["at_least"]))
    steps = of(found, "step", form="as a run chooses")
    ours = [row for row in rows if row.kind == "ours" and "batch 16," in row.group]
    if steps and ours and "CPU" not in ours[0].group:
        share = 16e3 / ours[0].value / steps[0]["ms"]
        goals.append(Goal("crop-resize, of a step of 16 samples", share, SHARE, False))
    return rows, goals


def layers(found: Found, card: str) -> list[Row]:
    """Ceilings, convolutions, norms, up-sampling."""
    rows = [
        Row(f"copy, {card}", "bytes read and written", row["tb_s"], "TB/s", "bound")
        for row in of(found, "copy")
    ]
    for row in of(found, "matrix product"):
        rows.append(
            Row(f"arithmetic, {card}", f"matrix product, {_short(row)}", row["tflop_s"], "TFLOP/s", "bound")
        )
    for row in of(found, "convolutions"):
        note = "forward, input, weights: " + ", ".join(f"{ms:.2f}" for ms in row["ms"]) + " ms"
        rows.append(
            Row(f"arithmetic, {card}", f"all convolutions, {_short(row)}", row["tflop_s"], "TFLOP/s", "ours", None, note),
        )  # fmt: skip
    for row in of(found, "convolution"):
        work = 3 if row["ms"][1] else 2
        rate = work * row["gflop"] / sum(row["ms"])
        note = "ms: " + ", ".join(f"{ms:.3f}" for ms in row["ms"])
        rows.append(
            Row(f"convolutions, {_short(row)}, {card}", row["name"], rate, "TFLOP/s", "ours", None, note)
        )
    for row in of(found, "norm"):
        note = f"{row['both_ms']:.3f} ms"
        rows.append(Row(f"norm and ReLU, forward and backward, {_short(row)}, {card}", row["name"], 1e3 / row["both_ms"],
                        "times/s", "ours" if row["name"] == "fused" else "peer", None, note))  # fmt: skip
    for row in of(found, "upsampling"):
        kind = "ours" if row["form"] == "folded" else "peer"
        rows.append(Row(f"up-sampling {row['name']}, {card}", row["form"], 1e3 / row["both_ms"], "times/s", kind, None,
                        f"{row['both_ms']:.3f} ms"))  # fmt: skip
    return rows


def _short(row: dict[str, Any]) -> str:
    return str(row["dtype"]).removeprefix("torch.")


def science(found: Found, card: str) -> tuple[list[Row], list[Goal]]:
    """Fine-tuning from the run and from scratch, and that the run could be stopped and continued."""
    rows, goals = [], []
    tuned = {row["start"]: row for row in of(found, "fine-tuning")}
    for start, row in tuned.items():
        metric = (
            "auc"
            if "auc" in row
            else next((name for name in row if isinstance(row[name], float) and row[name] <= 1), "")
        )
        if metric:
            kind = "ours" if start != "Scratch" else "peer"
            note = f"{row['trials']} trials"
            rows.append(
                Row(f"NCC on phantoms, a tenth of the patients, {card}", start, row[metric], metric, kind, None, note),
            )  # fmt: skip
    against = {(row["task"], row["start"]): row for row in of(found, "transfer against scratch")}
    for row in of(found, "transfer"):
        if row["mean"] is not None:
            apart = against.get((row["task"], row["start"]))
            beside = (
                ""
                if apart is None
                else f", {100 * apart['difference']:+.1f} points against scratch, p = {apart['p']:.3f}"
            )
            rows.append(
                Row(
                    f"{row['task']} on varied phantoms, a tenth of the patients, {card}", row["start"], row["mean"],
                    row["metric"], "peer" if row["start"] == "Scratch" else "ours", None, f"{row['trials']} trials{beside}",
                )
            )  # fmt: skip
    for stopped, continued in zip(
        of(found, "pretraining told to stop"), of(found, "pretraining continued"), strict=False
    ):
        text = f"steps that pretraining did after it was stopped at {stopped['step']} ({stopped['state']})"
        goals.append(Goal(text, continued["step"] - stopped["step"], 1))
    return rows, goals


def skipped(found: Found) -> list[str]:
    """What was not measured and why, without duplicates."""
    said = []
    for row in found:
        if row["what"] == "stage" and row["state"] == "skipped":
            said.append(f"stage {row['stage']}: {row['reason']}")
        elif "skipped" in row:
            said.append(f"{row['what']}: {row['skipped']}")
    return [line.replace("|", "/") for line in dict.fromkeys(said)]


def main() -> None:
    """Read, make the result, show it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_day.json")
    args = parser.parse_args()
    found, results = read(args.folders)
    if not found:
        sys.exit(
            f"error: {args.folders[0]}: no rows-*.jsonl in it; name folders that bench/gpu/day.sh wrote to"
        )
    machines = of(found, "machine")
    machine = machines[0] if machines else {"card": "unknown card", "machine": {}}
    card = machine["card"]
    step_rows, step_goals = rates(found, results, card)
    kernel_rows, kernel_goals = kernel(found, results)
    tuned_rows, tuned_goals = science(found, card)
    where = {
        name: machine.get(name) for name in ("card", "driver_says", "torch", "cudnn", "triton", "commit")
    }
    more: dict[str, Any] = {"machine": machine["machine"] | where} if machines else {}
    profiles = {row["form"]: row for row in of(found, "profile")}
    stages = {row["stage"]: [row["state"], row["seconds"]] for row in found if row["what"] == "stage"}
    result = save(
        args.out, "what runs on a card: right, and how fast", "for call in 1 2 3; do bash bench/gpu/day.sh $call; done",
        [*step_rows, *kernel_rows, *layers(found, card), *tuned_rows],
        [*step_goals, *kernel_goals, *tuned_goals, *correct(found)],
        skipped=skipped(found), profiles=profiles, stages=stages,
        pretraining=of(found, "pretraining"), **more,
    )  # fmt: skip
    show(result)
    for line in result["skipped"]:
        print(f"  skipped: {line}")


if __name__ == "__main__":
    main()

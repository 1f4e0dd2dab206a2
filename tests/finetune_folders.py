"""Transfer folders as launch/finetune.py leaves them, with metrics of the test's choice."""

import json
from pathlib import Path


def write_transfer(
    folder: Path, task="ncc", label="Parts2Whole", auc=(0.9, 0.91, 0.92), seeds=None, planned=None, **more
):
    """One folder; `auc` are the values of `metric` by trial, None for a trial that is unfinished."""
    metric = more.pop("metric", "auc" if task in ("ncc", "ecc") else "iou")
    init = {
        "label": label,
        "source": more.pop("source", "random" if label == "Scratch" else f"runs/{label}@100"),
    }
    init |= {key: more.pop(key, None) for key in ("step", "val_mse", "volume_fraction", "skips")}
    kind = "classification" if metric == "auc" else "segmentation"
    settings = {
        "task": {"name": task, "fingerprint": more.pop("fingerprint", f"{task}-0"), "kind": kind},
        "init": init,
        "network": "unet3d",
        "fraction": 1.0,
        "decoder": "scratch",
        "trials": planned or len(auc),
    } | more
    folder.mkdir(parents=True)
    (folder / "transfer.json").write_text(json.dumps(settings))
    for index, value in enumerate(auc):
        write_trial(
            folder,
            index,
            {metric: value},
            (seeds or range(100))[index],
            "finished" if value is not None else "running",
        )
    return folder


def write_trial(folder: Path, index: int, metrics, seed: int = 0, state: str = "finished"):
    """One trial's result."""
    place = folder / f"trial-{index:02d}"
    place.mkdir(exist_ok=True)
    result = {"trial": index, "seed": seed, "state": state}
    if state == "finished":
        result |= {"metrics": metrics, "ci95": {name: [v, v] for name, v in metrics.items()}, "n_test": 50}
        result["test_predictions"] = "predictions.npz"
    (place / "result.json").write_text(json.dumps(result))

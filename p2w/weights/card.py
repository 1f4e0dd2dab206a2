"""The model card: all that a user of the weights must know, collected by the program from the run folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2w import __version__
from p2w import config as settings
from p2w.config import Config
from p2w.errors import UserError
from p2w.log import read_metrics
from p2w.model import Encoder

INPUT = "HU clipped to window_hu and scaled to [0, 1], float, shape (batch, 1, z, y, x)"
LICENCE = (
    "The method is covered by US patents 11,915,417 and 12,430,767. Weights may fall under the terms of the scans they "
    "were trained on."
)


@dataclass(frozen=True)
class Trained:
    """One checkpoint of a run: where it lies, its step, and the run's settings."""

    run: Path
    step: int
    config: Config

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.run / "checkpoints" / f"step-{self.step:08d}"


def card(trained: Trained, encoder: Encoder, holds: str) -> dict[str, Any]:
    """Plain JSON values. `holds` says what the file has: "encoder" or "all"."""
    config = trained.config
    return {
        "p2w": __version__,
        "holds": holds,
        "encoder": {
            "name": config.model.name,
            "width": config.model.width,
            "channels": list(encoder.channels),
            "strides": list(encoder.strides),
        },
        "input": {
            "what": INPUT,
            "axis_order": "zyx",
            "window_hu": list(config.pretext.window_hu),
            "size_zyx": list(config.pretext.size),
            "edges_divisible_by": encoder.strides[-1],
        },
        "training": {
            "step": trained.step,
            "samples": trained.step * config.data.batch,
            "figures": _figures(trained),
            "data": data_of(trained.run),
            "config": json.loads(settings.to_json(config)),
        },
        "notice": LICENCE,
    }


def _figures(trained: Trained) -> dict[str, float]:
    """What was measured at that step."""
    found: dict[str, float] = {}
    for record in read_metrics(trained.run):
        if record["step"] == trained.step:
            found |= {
                name: value
                for name, value in record.items()
                if name.startswith(("val/", "similarity/", "contrast/"))
            }
    return found


def data_of(run: Path) -> dict[str, Any]:
    """The data set of the run's last start, as its folder recorded it."""
    try:
        last = json.loads((run / "run.json").read_text())["starts"][-1]
        return {"fingerprint": str(last["data"]), "shards": str(last["shards"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{run}/run.json: does not tell the data set ({error}); copy the run folder again"
        ) from error


def markdown(card: dict[str, Any]) -> str:
    """The card for people: README.md of a hub folder."""
    encoder, fed, training = card["encoder"], card["input"], card["training"]
    figures = "".join(f"| {name} | {value:.4f} |\n" for name, value in training["figures"].items())
    return f"""---
library_name: p2w
tags: [medical-imaging, ct, self-supervised, parts2whole]
---

# {encoder["name"]}, width {encoder["width"]}, pretrained with p2w ({training["config"]["pretext"]["name"]})

```python
import p2w

encoder = p2w.load("this folder")    # .channels {tuple(encoder["channels"])}, .strides {tuple(encoder["strides"])}
features = encoder(x)                # list, fine to coarse
```

**Input**: {fed["what"]}; window {fed["window_hu"]} HU, axes {fed["axis_order"]}; trained at {fed["size_zyx"]} voxels; any
size whose edges are divisible by {fed["edges_divisible_by"]}.

**Training**: {training["samples"]:,} samples in {training["step"]:,} steps; data set {training["data"]["fingerprint"]}. All
settings are in `card.json`.

| at that step | |
|---|---|
{figures}
{card["notice"]}
"""

"""The model card: what a user of the weights must know, collected from the run folder; and the card of an export.

`exported_card` gives the card as it leaves the machine: without absolute paths, and with hashes of the scans that
pretraining trained on. `training.data.shards` is the set's path below the run's working directory, or else its last part; of
every path in the command, the settings and the facts on the data set the last part alone stays. `training.data.seen` holds
hashes of the scans, where they are few (`p2w.shards.training_scans`), so that the leak check of target tasks works without
the set.
"""

import copy
import json
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit, urlunsplit

from p2w import __version__
from p2w import config as settings
from p2w.config import Config
from p2w.errors import UserError
from p2w.files import last_part
from p2w.log import read_metrics
from p2w.model import Encoder
from p2w.pretext import build_pretext
from p2w.pretext.settings import Shows
from p2w.shards.manifest import relocated
from p2w.shards.training_scans import SEEN, hashed_training_scans
from p2w.stream.stream import open_trained_sets
from p2w.weights.hub import is_hub_name

INPUT = "HU clipped to window_hu and scaled to [0, 1], float, shape (batch, {channels}, z, y, x)"
FINGERPRINT = "the first 16 digits of a SHA-256 over the manifest: shape, window, tiling, split, and each shard's checksum"
LICENCE = (
    "The method is covered by US patents 11,915,417 and 12,430,767. Weights may fall under the terms of the scans they "
    "were trained on."
)


@dataclass(frozen=True)
class Trained:
    """One checkpoint of a run: the run folder, the step, and the run's settings."""

    run: Path
    step: int
    config: Config

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.run / "checkpoints" / f"step-{self.step:08d}"


def model_card(trained: Trained, encoder: Encoder, holds: str) -> dict[str, Any]:
    """The card as plain JSON values; `holds` is what the file contains, "encoder" or "all"."""
    config, start = trained.config, last_start(trained.run)
    return {
        "p2w": __version__,
        "holds": holds,
        "encoder": {
            "name": config.model.name,
            "width": config.model.width,
            "channels": list(encoder.channels),
            "strides": list(encoder.strides),
            "in_channels": encoder.in_channels,
        },
        "input": {
            "what": INPUT.format(channels=encoder.in_channels),
            "axis_order": "zyx",
            "window_hu": list(config.pretext.window_hu),
            "size_zyx": list(config.pretext.size),
            "spacing_mm_zyx": _spacing(config, start.get("data_set")),
            **_scans(start.get("data_set")),
            "edges_divisible_by": encoder.strides[-1],
        },
        "training": {
            "step": trained.step,
            "samples": trained.step * config.data.batch,
            "figures": _figures(trained),
            "data": data_of(trained.run),
            "fingerprint_is": FINGERPRINT,
            "data_set": start.get("data_set"),
            "command": start.get("command"),
            "config": json.loads(settings.config_to_json(config)),
        },
        "notice": LICENCE,
    }


def _figures(trained: Trained) -> dict[str, float]:
    """The metrics of validation and of the monitors at the checkpoint's step."""
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
    """The data set of the run's last start: its fingerprint, and `shards`, a URL or an absolute path."""
    start = last_start(run)
    cwd = str(start.get("cwd") or "")
    shards = relocated(str(start["shards"]), lambda path: path if "://" in path else os.path.join(cwd, path))
    return {"fingerprint": str(start["data"]), "shards": shards}


def last_start(run: Path) -> dict[str, Any]:
    """The run's last start in run.json. Raises UserError when it names no data set."""
    try:
        start = json.loads((run / "run.json").read_text())["starts"][-1]
        return {**start, "data": start["data"], "shards": start["shards"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{run}/run.json: does not name the data set ({error}); copy the run folder again"
        ) from error


def _scans(data_set: Any) -> dict[str, Any]:
    """Modality of the scans and how intensities were scaled, where they are not CT; their spacing, where it was changed;
    `store` "scans" where wholes were cut at random places of stored scans."""
    recorded = data_set if isinstance(data_set, dict) else {}
    scans = {key: recorded[key] for key in ("modality", "intensity", "store") if key in recorded}
    tiling = recorded.get("tiling")
    resampled = tiling.get("spacing_mm") if isinstance(tiling, dict) else None
    return scans | ({"resampled_to_mm": resampled} if resampled else {})


def _spacing(config: Config, data_set: Any) -> dict[str, list[float] | None]:
    """Spacing in mm (z, y, x) of the scans and of the network's input: smallest, geometric middle, largest; None: unknown.

    Wholes and parts are both resized to the network's size, so the voxels of parts are finer. The extremes are those of the
    smallest and the largest part by volume: along a single axis a part may be longer or shorter. Raises UserError for a
    pretext that does not say what it shows.
    """
    names = ("scans_smallest", "scans_median", "scans_largest")
    pretext = build_pretext(config)
    shows = pretext.shows
    if shows not in get_args(Shows):
        raise UserError(
            f"pretext {config.pretext.name}: shows {shows!r}, must be one of {', '.join(get_args(Shows))}; the spacing that "
            "the network saw follows from it"
        )
    try:
        spread = [[float(mm) for mm in row] for row in data_set["spacing_mm"]]
        # Where sub-scans were filled up with air, only their real voxels count as the whole.
        shape = [float(edge) for edge in data_set.get("real_shape", data_set["shape"])]
        edges = [*zip(spread[1], shape, config.pretext.size, strict=True)]
        whole = [mm * edge / size * pretext.kept_edge for mm, edge, size in edges]
        crop = [mm * min(1.0, edge / size) for mm, edge, size in edges]
    except (AttributeError, LookupError, TypeError, ValueError):
        return dict.fromkeys((*names, "network_smallest", "network", "network_largest"))
    unit = crop if shows == "crop" else whole
    fractions = config.pretext.volume_fraction if shows == "part" else (1.0, 1.0)
    small, large = (fraction ** (1 / 3) for fraction in fractions)
    edges_of = {"network_smallest": small, "network": math.sqrt(small * large), "network_largest": large}
    seen = {name: [round(mm * edge, 4) for mm in unit] for name, edge in edges_of.items()}
    return {**dict(zip(names, spread, strict=True)), **seen}


def markdown(card: dict[str, Any]) -> str:
    """The card as README.md of a hub folder."""
    encoder, inputs, training = card["encoder"], card["input"], card["training"]
    window, axes = inputs["window_hu"], inputs["axis_order"]
    where = card.get("repository", "this folder")
    figures = "".join(f"| {name} | {value:.4f} |\n" for name, value in training["figures"].items())
    return f"""---
library_name: p2w
{_front(card)}tags: [medical-imaging, ct, self-supervised, parts2whole]
---

# {encoder["name"]}, width {encoder["width"]}, pretrained with p2w ({training["config"]["pretext"]["name"]})

```python
import p2w

encoder = p2w.load("{where}")    # .channels {tuple(encoder["channels"])}, .strides {tuple(encoder["strides"])}
features = encoder(x)                # list, fine to coarse
```

**Input**: {inputs["what"]}; window {window} HU, axes {axes}; trained at {inputs["size_zyx"]} voxels; any
size whose edges are divisible by {inputs["edges_divisible_by"]}. {_of_scans(inputs)}

**Training**: {training["samples"]:,} samples in {training["step"]:,} steps; data set {training["data"]["fingerprint"]}
({training["fingerprint_is"]}). All settings are in `card.json`.

| at that step | |
|---|---|
{figures}
{_licences(card)}{card["notice"]}
"""


def _front(card: dict[str, Any]) -> str:
    """Lines of the page's YAML that only a published card has."""
    known = {"license": card.get("licence"), "pipeline_tag": card.get("pipeline_tag")}
    return "".join(f"{name}: {value}\n" for name, value in known.items() if value)


def _licences(card: dict[str, Any]) -> str:
    """A paragraph on the licences of weights and data, of a published card."""
    if "licence" not in card:
        return ""
    return f"**Licence**: of the weights {card['licence']}. Trained on: {card['data_licence']}.\n\n"


def _of_scans(inputs: dict[str, Any]) -> str:
    spacing, resampled = inputs["spacing_mm_zyx"], inputs.get("resampled_to_mm")
    said = "Wholes were cut at random places of the scans. " if inputs.get("store") == "scans" else ""
    if "modality" in inputs:
        low, high = inputs["intensity"]["percentiles"]
        said += (
            f"The scans are {inputs['modality'].upper()}: of each, the percentiles {low} and {high} became the ends of that "
            "window, so yours become 0 and 1. "
        )
    if spacing["network"] is None:
        return f"{said}The run did not record the spacing of its scans."
    if resampled:
        return (
            f"{said}Scans were resampled to {resampled} mm (z, y, x), and what is cut from them is resized: the network saw "
            f"{spacing['network_smallest']} to {spacing['network_largest']} mm."
        )
    return (
        f"{said}Scans are not resampled: {spacing['scans_median']} mm (z, y, x; median). What is cut from them is, and the "
        f"network saw {spacing['network_smallest']} to {spacing['network_largest']} mm."
    )


def exported_card(card: dict[str, Any], run: Path) -> tuple[dict[str, Any], str]:
    """The card of an export, from `model_card`'s; and, where it gets no hashes of scans, the reason in words.

    Raises UserError for a run that does not name its data set.
    """
    card, start = copy.deepcopy(card), last_start(run)
    training = card["training"]
    if isinstance(training.get("command"), str):
        training["command"] = command_without_paths(training["command"])
    training["data_set"] = last_part(training.get("data_set"))
    training["config"] = _without_paths(training["config"])
    data, cwd = training["data"], str(start.get("cwd") or "")
    data["shards"] = portable_shards(str(start["shards"]), cwd)
    try:
        sets = open_trained_sets(run, start, start["data"], str(run))
        data[SEEN] = hashed_training_scans([meta for meta, _ in sets])
    except UserError as error:
        return card, str(error)
    return card, ""


def portable_shards(where: str, cwd: str) -> str:
    """The name of a set or mixture in an export: the path below `cwd`, else the last part; a URL without user and query."""
    taken: dict[str, int] = {}

    def name(path: str) -> str:
        found = _portable(path, cwd)
        taken[found] = taken.get(found, 0) + 1
        # The parts of a mixture have to differ, and two folders may have one name.
        return found if taken[found] == 1 else f"{found} ({taken[found]})"

    return relocated(where, name)


def _portable(path: str, cwd: str) -> str:
    if "://" in path and not path.startswith("file:"):
        try:
            url = urlsplit(path)
        except ValueError:  # no URL that anything could be read from
            return str(last_part(path))
        return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))
    if "://" in path:
        path = urlsplit(path).path
    below = os.path.relpath(path, cwd) if cwd and os.path.isabs(path) else os.path.normpath(path)
    if os.path.isabs(below) or below.split("/")[0] in ("..", "~"):
        return os.path.basename(os.path.normpath(path))
    return below


def command_without_paths(command: str) -> str:
    """A command line of which every path and URL is cut to its last part; names of the Hub stay."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that does not end
        words = command.split()
    return shlex.join(map(_word_without_path, words))


def _word_without_path(word: str) -> str:
    option, equals, value = word.partition("=")
    if equals and "/" not in option:
        return f"{option}={_without_paths(value)}"
    return str(_without_paths(word))


def _without_paths(value: Any) -> Any:
    """A JSON value with every path and URL in it cut to its last part; names of the Hub stay, they name no machine."""
    if isinstance(value, str) and is_hub_name(value):
        return value
    if isinstance(value, dict):
        return {name: _without_paths(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(one) for one in value]
    return last_part(value)

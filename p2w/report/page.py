"""The report's page: its layout, its pictures, and the volumes for its slider.

A volume is its uint8 voxels in C order (z, y, x), each row as differences from the voxel to its left (modulo 256), then
zlib, then base64. Browsers decompress zlib (DecompressionStream), and with differences a CT is a third smaller.
"""

import base64
import json
import math
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w import __version__
from p2w.errors import first_line
from p2w.report import curves, results_section, run_section
from p2w.report.markup import HERE, Markup, document, join_markup, safe, several, tag
from p2w.report.run_reader import RunFacts

LIMIT = 9 << 20  # characters of volumes in a page; the rest of the page takes a few MB at most
LARGEST = 4 << 30  # bytes of an unpacked npz; ours are smaller
SLICE_TO_PIXEL = 2.5  # slice thickness over pixel width of a chest CT, for a run without a recorded spacing

Volume = NDArray[np.uint8]


@dataclass(frozen=True)
class Volumes:
    """`whole` (W, d, h, w); `part`, `output` (W, S, d, h, w), uint8; `scale` (S,), NaN for scales as in training."""

    whole: Volume
    part: Volume
    output: Volume
    scale: NDArray[np.float64]
    keys: list[str]
    extent: NDArray[np.float64]  # (W, 3): edges z, y, x of each whole, in any unit
    source: str


def find_volumes(run: Path, problems: list[str], edges: Sequence[float] = ()) -> Volumes | None:
    """The volumes of the analysis, else of the end of training, else None. Files that cannot be read go to `problems`.

    `edges` (z, y, x) are the proportions of wholes for a file that lacks them.
    """
    for name in ("analysis/reconstructions.npz", "figures/reconstruction.npz"):
        if (run / name).exists():
            try:
                return _read(run / name, name, edges)
            except (OSError, ValueError, LookupError, EOFError, MemoryError, RuntimeError) as error:
                problems.append(f"{name}: not read ({first_line(error)})")
            except (zipfile.BadZipFile, zlib.error, SyntaxError, NotImplementedError) as error:
                problems.append(f"{name}: not read ({error})")
    return None


def _read(path: Path, name: str, edges: Sequence[float]) -> Volumes:
    """Read an npz. Raises ValueError when the shapes or types of its arrays are wrong."""
    with zipfile.ZipFile(path) as listing:
        size = sum(member.file_size for member in listing.infolist())
    if size > LARGEST:
        raise ValueError(f"it would unpack to {size:,} bytes")
    with np.load(path, allow_pickle=False) as file:
        saved = {key: np.asarray(file[key]) for key in file.files}
    whole, part, output = saved["whole"], saved["part"], saved["output"]
    if whole.ndim != 4 or part.ndim != 5 or 0 in part.shape:
        raise ValueError(
            f"whole {whole.shape} and part {part.shape} are not (W, d, h, w) and (W, S, d, h, w)"
        )
    expected = (len(whole), part.shape[1], *whole.shape[1:])
    if part.shape != expected or output.shape != expected:
        raise ValueError(f"part {part.shape} and output {output.shape} do not fit whole {whole.shape}")
    if any(array.dtype != np.uint8 for array in (whole, part, output)):
        raise ValueError("not all volumes are uint8")
    scale = np.full(part.shape[1], np.nan)
    if saved["scale"].shape == scale.shape:
        scale = saved["scale"].astype(np.float64)
    keys = [str(key) for key in saved["keys"].reshape(-1)]
    extent = np.asarray(saved.get("extent_mm", ()), np.float64)
    if extent.shape != (len(whole), 3) or not (np.isfinite(extent) & (extent > 0)).all():
        extent = np.tile(edges or np.array(whole.shape[1:]) * (SLICE_TO_PIXEL, 1, 1), (len(whole), 1))
    return Volumes(whole, part, output, scale, keys, extent, name)


def pack_volume(volume: Volume) -> str:
    """A volume (d, h, w) uint8 as text, encoded as this module's docstring says."""
    steps = np.diff(volume, axis=2, prepend=np.uint8(0))  # uint8 wraps round
    return base64.b64encode(zlib.compress(steps.tobytes(), 6)).decode()


def payload(volumes: Volumes, limit: int = LIMIT) -> dict[str, Any]:
    """Data for the page's script: as many wholes as fit into `limit` characters, at least one.

    If a single whole does not fit, scales are left out, but not the last one.
    """
    scales, shown = list(range(len(volumes.scale))), 0
    data: dict[str, Any] = {"whole": [], "part": [], "output": []}
    used = 0
    for row in range(len(volumes.whole)):
        whole = pack_volume(volumes.whole[row])
        if not shown:
            room = max(1, int((limit - len(whole)) // (2 * len(whole))))
            scales = np.linspace(len(scales) - 1, 0, min(room, len(scales))).astype(int)[::-1].tolist()
        pairs = [(pack_volume(volumes.part[row, s]), pack_volume(volumes.output[row, s])) for s in scales]
        size = len(whole) + sum(len(text) for pair in pairs for text in pair)
        if shown and used + size > limit:
            break
        used, shown = used + size, shown + 1
        data["whole"].append(whole)
        data["part"].append([part for part, _ in pairs])
        data["output"].append([output for _, output in pairs])
    scale = [float(volumes.scale[s]) for s in scales]
    return {
        **data,
        "shape": list(volumes.whole.shape[1:]),
        "extent": volumes.extent[:shown].tolist(),
        "keys": [volumes.keys[row] if row < len(volumes.keys) else "" for row in range(shown)],
        "scale": [s if math.isfinite(s) else None for s in scale],
    }


def script_json(data: object) -> str:
    """JSON that can neither end the script element that contains it nor open a comment in it."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


GOOD, OPEN = {"finished", "stopped early"}, {"running", "told to stop"}
PICTURES = {  # figures/NAME.png -> caption
    "tsne": "t-SNE of features, one panel a network. Circles are parts, diamonds wholes; colour is the whole, size the "
    "part's scale. Clusters of one colour mean that parts of one image are close together.",
    "similarity_networks": "Cosine similarity of pairs of parts, by network. The less the two histograms overlap, the "
    "better the features separate images.",
    "separability_by_scale": "Separability by the scale of the parts. Grey marks the scales of training; the rest is "
    "generalisation.",
    "contrastive": "Contrastive loss and validation MSE over the checkpoints. Only the MSE is trained; the paper claims "
    "that both fall together.",
    "reconstruction_scales": "Fixed wholes, reconstructed from parts of growing scale.",
    "retrieval": "Nearest neighbours: whether a part finds the whole it was cut from among all wholes.",
    "similarity": "Cosine similarity of pairs of parts before and after training, on validation wholes.",
    "reconstruction": "Middle slices of four fixed wholes: the network's input, its output, the target.",
}
# Plots of lines and points, inverted on a dark page; the others show slices of CT, which must stay as they are.
DRAWINGS = {"tsne", "similarity_networks", "separability_by_scale", "contrastive", "similarity", "test"}
PICTURE_DPI = 130  # of `analysis.plots.save_figure`
REDRAWN = {"loss"}  # the page draws this curve itself
LARGEST_PICTURE, ALL_PICTURES = 3 << 20, 5 << 20  # bytes


def render_report(facts: RunFacts) -> str:
    """The page as text."""
    spacing = run_section.whole_edges_mm(facts)
    found = find_volumes(facts.run, facts.problems, spacing)
    script = (HERE / "slider.js").read_text()
    data_and_hardware = (
        section("Data set", run_section.data_set(facts)),
        section("Hardware", run_section.hardware(facts)),
    )
    sections = [
        run_section.header(facts, GOOD, OPEN),
        tag("section", results_section.headline_tiles(facts), aria_label="Results in numbers"),
        _slider(facts, found),
        section("Curves", _charts(facts)),
        section("Representation", results_section.analysis(facts)),
        section("Figures", _pictures(facts)),
        tag("div", *data_and_hardware, class_="columns"),
        section("Starts and interruptions", run_section.starts(facts)),
        section("Settings", run_section.settings(facts)),
        section("Commands", run_section.commands(facts)),
        section("Not on this page", _missing(facts, found)),
        footer(),
    ]
    return document(run_section.title(facts), join_markup(sections), script=script)


def footer() -> Markup:
    """When the page was written, and by which version."""
    return tag(
        "footer", tag("p", f"Written {time.strftime(run_section.DATE)} by p2w {__version__}.", class_="note")
    )


def section(title: str, inside: Markup | None) -> Markup:
    """A section with a title; empty when `inside` is empty."""
    name = title.lower().replace(" ", "-")
    return tag("section", tag("h2", title, id=name), inside, aria_labelledby=name) if inside else Markup("")


def _charts(facts: RunFacts) -> Markup | None:
    return chart_grid(curves.charts(facts))


def chart_grid(drawn: Sequence[Markup]) -> Markup | None:
    """Charts side by side, so that none is alone in its row; None for none."""
    alone = len(drawn) % 3 == 1  # in the last of the rows of three
    return tag("div", *drawn, class_="charts of2" if alone else "charts") if drawn else None


def _slider(facts: RunFacts, found: Volumes | None) -> Markup:
    """Part, reconstruction and whole, with controls for whole, scale, plane and slice."""
    if found is None:
        return Markup("")
    data = payload(found)
    some = len(data["whole"]), len(data["scale"])
    text = "The part is stretched to the network's size, as the network sees it. Axial: front at the top, the patient's "
    text += "right on the left. Coronal and sagittal: head at the top."
    if some != (len(found.whole), len(found.scale)):
        text += (
            f" To keep the page small, {some[0]} of {several(len(found.whole), 'whole')} and {some[1]} of "
        )
        text += f"{several(len(found.scale), 'scale')} are here; all are in {found.source}."
    views = (("part", "part"), ("output", "reconstruction"), ("whole", "whole"))
    viewer = tag(
        "div",
        _controls(facts, data["scale"], some[0]),
        tag("div", *(_view(kind, name) for kind, name in views), class_="views"),
        tag("p", tag("span", class_="error"), " · ", tag("span", class_="key"), class_="note"),
        id="slider", hidden="",
    )  # fmt: skip
    holder = Markup(
        f'<script type="application/json" id="volumes">{script_json(data)}</script>'
        "<noscript><p>The slider needs JavaScript; nothing else on this page does.</p></noscript>"
    )
    return section("Reconstructions", join_markup((viewer, tag("p", text, class_="note"), holder)))


def _view(kind: str, name: str) -> Markup:
    canvas = tag("canvas", role="img", data_kind=kind, aria_label=name, width="1", height="1")
    return tag("figure", tag("figcaption", name), canvas)


def _controls(facts: RunFacts, scales: Iterable[float | None], wholes: int) -> Markup:
    names = [
        run_section.own_scale(facts) if scale is None else f"{scale:.3g} of the whole" for scale in scales
    ]
    planes = [
        tag("label", Markup(f'<input type="radio" name="plane" value="{plane}">'), plane)
        for plane in ("axial", "coronal", "sagittal")
    ]
    slider = Markup('<input type="range" name="slice" min="0" value="0" step="1" aria-label="Slice">')
    return tag(
        "div",
        tag("label", "Whole", _select("whole", [str(at + 1) for at in range(wholes)])),
        tag("label", "Part", _select("scale", names)),
        tag("fieldset", tag("legend", "Plane"), *planes),
        tag("div", tag("span", "Slice", aria_hidden="true"), slider, tag("output", aria_live="off"), class_="slice"),
        class_="controls", role="group", aria_label="What the three pictures show",
    )  # fmt: skip


def _select(name: str, options: list[str]) -> Markup:
    return tag("select", *(tag("option", text, value=at) for at, text in enumerate(options)), name=name)


def _pictures(facts: RunFacts) -> Markup | None:
    """The PNGs of RUN/figures, those with a caption first."""
    files = {path.stem: path for path in sorted((facts.run / "figures").glob("*.png"))}
    names = [name for name in PICTURES if name in files]
    names += [name for name in files if name not in PICTURES and name not in REDRAWN]
    return pictures(facts, {name: files[name] for name in names})


def pictures(
    facts: RunFacts, files: Mapping[str, Path], captions: Mapping[str, str] = PICTURES
) -> Markup | None:
    """These PNGs with their captions, by name; one that is too large or no PNG is listed among the problems instead."""
    drawn, total = [], 0
    for name, path in files.items():
        where = path.relative_to(facts.run)
        try:
            with open(path, "rb") as file:
                data = file.read(LARGEST_PICTURE + 1)
        except OSError as error:
            facts.problems.append(f"{where}: not read ({error.strerror})")
            continue
        total += len(data)
        if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) > LARGEST_PICTURE or total > ALL_PICTURES:
            facts.problems.append(f"{where}: left out (no PNG, or too large for this page)")
            continue
        words = name.replace("_", " ").replace("-", " ")
        words = f"{words[:1].upper()}{words[1:]}"
        low = _legible_width(data)
        kind = "drawing" if path.stem in DRAWINGS else "photo"
        image = f'<img alt="{safe(words)}" class="{kind}" style="min-width: {low}px; max-width: {2 * low}px" '
        image += f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        frame = tag(
            "div", Markup(image), class_="scroll", role="region", tabindex="0", aria_label=f"Figure: {words}"
        )
        drawn.append(tag("figure", frame, tag("figcaption", captions.get(name, f"{words}."))))
    return tag("div", *drawn, class_="pictures") if drawn else None


def _legible_width(png: bytes) -> int:
    """CSS pixels below which a picture scrolls instead of shrinking: three quarters of the size it was drawn in.

    Labels are drawn in 8 to 10 points, and are read down to 6. At most 1,040, the width of the page.
    """
    if len(png) < 24:
        return 0
    return min(1040, int.from_bytes(png[16:20], "big") * 72 // PICTURE_DPI)


def _missing(facts: RunFacts, found: Volumes | None) -> Markup | None:
    """What is missing, with the command that makes it, and files that could not be read."""
    lines: list[object] = []
    analyze = tag("code", f"torchrun -m p2w analyze --run-dir {run_section.quoted(facts.run)}")
    if not facts.summary:
        what = "Similarity, t-SNE, contrastive loss over checkpoints, retrieval, parts of growing scale: "
        lines.append(tag("li", what, analyze))
    if not facts.series("val/loss")[0]:
        lines.append(
            tag("li", "Validation: nothing is logged yet, or the data set has no scans set aside for it.")
        )
    if found is None:
        end = "training leaves them in figures/reconstruction.npz when it ends; "
        lines.append(tag("li", "Reconstructions for the slider: ", end, "those of growing scale: ", analyze))
    lines += [tag("li", problem) for problem in dict.fromkeys(facts.problems)]
    return tag("ul", *lines) if lines else None

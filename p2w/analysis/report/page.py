"""The page: sections from facts, one function each, put between a head and a foot."""

import base64
import hashlib
import time
from collections.abc import Iterable
from pathlib import Path

from p2w import __version__
from p2w.analysis.report import curves, described, measured, volumes
from p2w.analysis.report.facts import Facts
from p2w.analysis.report.markup import Markup, join, safe, several, tag

HERE = Path(__file__).parent
GOOD, OPEN = {"finished", "stopped early"}, {"running", "told to stop"}
PICTURES = {  # figures/NAME.png -> how to read it
    "tsne": "t-SNE of features, one panel a network. Circles are parts, diamonds wholes; colour is the whole, size the "
    "part's scale. Clusters by colour mean that parts of one image lie together.",
    "similarity_networks": "Cosine similarity of pairs of parts, by network. The less the two histograms overlap, the "
    "better the features tell images apart.",
    "separability_by_scale": "Separability against the scale of the parts. In grey, the scales that training showed; "
    "what lies beyond is generalisation.",
    "contrastive": "Contrastive loss beside validation MSE over the checkpoints. Only the MSE is trained; that both fall "
    "together is the paper's claim.",
    "reconstruction_scales": "Fixed wholes, reconstructed from parts of growing scale.",
    "retrieval": "Nearest neighbours: whether a part finds the whole it was cut from among all wholes.",
    "similarity": "Cosine similarity of pairs of parts before and after training, on validation wholes.",
    "reconstruction": "Middle slices of four fixed wholes: what the network saw, what it made of it, what was there.",
}
REDRAWN = {"loss"}  # the curves above show it
LARGEST_PICTURE, ALL_PICTURES = 3 << 20, 5 << 20  # bytes


def render(facts: Facts) -> str:
    """The whole page as text."""
    spacing = described.whole_edges_mm(facts)
    found = volumes.find(facts.run, facts.problems, spacing)
    script = (HERE / "slider.js").read_text()
    sections = [
        described.header(facts, GOOD, OPEN),
        tag("section", measured.tiles(facts)),
        _slider(facts, found),
        _section("Curves", _charts(facts)),
        _section("Representation", measured.analysis(facts)),
        _section("Figures", _pictures(facts)),
        tag(
            "div",
            _section("Data set", described.data_set(facts)),
            _section("Hardware", described.hardware(facts)),
            class_="columns",
        ),
        _section("Starts and interruptions", described.starts(facts)),
        _section("Settings", described.settings(facts)),
        _section("Commands", described.commands(facts)),
        _section("Not on this page", _missing(facts, found)),
        tag("p", f"Written {time.strftime('%Y-%m-%d %H:%M %Z')} by p2w {__version__}.", class_="note"),
    ]
    return _document(facts.run.resolve().name, join(sections), script)


def _document(title: str, body: Markup, script: str) -> str:
    """Head and foot. The policy lets this script run and nothing be fetched, whatever the run folder holds."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe(title)} · p2w</title>
<style>
{(HERE / "style.css").read_text()}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def _section(title: str, inside: Markup | None) -> Markup:
    """A titled section; nothing when there is nothing in it."""
    return tag("section", tag("h2", title), inside) if inside else Markup("")


def _charts(facts: Facts) -> Markup | None:
    drawn = curves.charts(facts)
    return tag("div", *drawn, class_="charts") if drawn else None


def _slider(facts: Facts, found: volumes.Volumes | None) -> Markup:
    """Part, reconstruction and whole, with what chooses among them."""
    if found is None:
        return Markup("")
    data = volumes.payload(found)
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
        f'<script type="application/json" id="volumes">{volumes.script_json(data)}</script>'
        "<noscript><p>Leafing through volumes needs JavaScript; nothing else on this page does.</p></noscript>"
    )
    return _section("Reconstructions", join((viewer, tag("p", text, class_="note"), holder)))


def _view(kind: str, name: str) -> Markup:
    canvas = tag("canvas", role="img", data_kind=kind, aria_label=name, width="1", height="1")
    return tag("figure", tag("figcaption", name), canvas)


def _controls(facts: Facts, scales: Iterable[float | None], wholes: int) -> Markup:
    names = [described.own_scale(facts) if scale is None else f"{scale:.3g} of the whole" for scale in scales]
    planes = [
        tag("label", Markup(f'<input type="radio" name="plane" value="{plane}">'), plane)
        for plane in ("axial", "coronal", "sagittal")
    ]
    slider = Markup('<input type="range" name="slice" min="0" value="0" step="1">')
    return tag(
        "div",
        tag("label", "Whole", _select("whole", [str(at + 1) for at in range(wholes)])),
        tag("label", "Part", _select("scale", names)),
        tag("fieldset", tag("legend", "Plane"), *planes),
        tag("label", "Slice", slider, tag("output"), class_="slice"),
        class_="controls",
    )


def _select(name: str, options: list[str]) -> Markup:
    return tag("select", *(tag("option", text, value=at) for at, text in enumerate(options)), name=name)


def _pictures(facts: Facts) -> Markup | None:
    """The PNGs of RUN/figures, those with a caption first; what is too large or no PNG is named instead."""
    folder = facts.run / "figures"
    files = {path.stem: path for path in sorted(folder.glob("*.png")) if path.stem not in REDRAWN}
    order = [name for name in PICTURES if name in files] + [name for name in files if name not in PICTURES]
    drawn, total = [], 0
    for name in order:
        try:
            with open(files[name], "rb") as file:
                data = file.read(LARGEST_PICTURE + 1)
        except OSError as error:
            facts.problems.append(f"figures/{name}.png: not read ({error.strerror})")
            continue
        total += len(data)
        if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) > LARGEST_PICTURE or total > ALL_PICTURES:
            facts.problems.append(f"figures/{name}.png: left out (no PNG, or too large for this page)")
            continue
        caption = PICTURES.get(name, name)
        image = f'<img alt="{safe(caption)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        drawn.append(tag("figure", Markup(image), tag("figcaption", caption)))
    return tag("div", *drawn, class_="pictures") if drawn else None


def _missing(facts: Facts, found: volumes.Volumes | None) -> Markup | None:
    """What could be here, and the command that makes it; and what could not be read."""
    lines: list[object] = []
    analyze = tag("code", f"torchrun launch/analyze.py --run-dir {described.quoted(facts.run)}")
    if not facts.summary:
        lines.append(
            tag(
                "li",
                "Similarity, t-SNE, contrastive loss over checkpoints, retrieval, parts of growing scale: ",
                analyze,
            )
        )
    if not facts.series("val/loss")[0]:
        lines.append(
            tag("li", "Validation: nothing is logged yet, or the data set has no scans set aside for it.")
        )
    if found is None:
        end = "training leaves them in figures/reconstruction.npz when it ends; "
        lines.append(tag("li", "Reconstructions to leaf through: ", end, "those of growing scale: ", analyze))
    lines += [tag("li", problem) for problem in dict.fromkeys(facts.problems)]
    return tag("ul", *lines) if lines else None

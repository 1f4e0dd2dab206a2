"""Results in the report: headline numbers of training, and the tables of the analysis."""

import math
from collections.abc import Sequence
from statistics import fmean, median

from p2w.log import hours_minutes_seconds
from p2w.report.markup import DASH, Markup, figure, join_markup, keep_units, several, table, tag
from p2w.report.run_reader import RunFacts, child, ends, floats, number


def headline_tiles(facts: RunFacts) -> Markup:
    """The most important numbers; those that were not logged are left out."""
    return tiles([found for found in (tile(facts) for tile in TILES) if found])


def tiles(found: Sequence["Tile"]) -> Markup:
    """Numbers as tiles, each with a title above and a line below."""
    boxes = [
        tag("div", tag("dt", name), tag("dd", tag("b", keep_units(value)), tag("span", keep_units(more))))
        for name, value, more in found
    ]
    if not boxes:
        return tag("p", "Nothing is logged yet.")
    # As many columns as leave no tile alone in its row: one row of up to four, else rows of three, or four for 7 and 8.
    columns = len(boxes) if len(boxes) <= 4 else 3 if len(boxes) <= 6 else 4
    return tag("dl", *boxes, class_=f"tiles of{columns}")


Tile = tuple[str, str, str]


def _validation(facts: RunFacts) -> Tile | None:
    steps, losses = facts.series(facts.loss("val"))
    if not losses:
        return None
    floors = facts.series("val/loss_mean_image")[1]
    # Comparisons with NaN are false, so it must sort after all numbers.
    best = min(range(len(losses)), key=lambda at: (math.isnan(losses[at]), losses[at]))
    more = [f"always the mean image: {figure(floors[0])}"] if floors else []
    more += [f"best {figure(losses[best])} at step {steps[best]:.0f}"] if best < len(losses) - 1 else []
    name = "Validation MSE" if floors else "Validation loss"
    return f"{name}, first → last", f"{figure(losses[0])} → {figure(losses[-1])}", "; ".join(more)


def _separability(facts: RunFacts) -> Tile | None:
    first, last = ends(facts.series("similarity/auc")[1])
    if math.isnan(last):
        return None
    return (
        "AUC of parts, first → last",
        f"{figure(first, 3)} → {figure(last, 3)}",
        "0.5: no separation of images",
    )


def _length(facts: RunFacts) -> Tile:
    step = number(facts.status.get("step"))
    step = max((r["step"] for r in facts.records), default=0.0) if math.isnan(step) else step
    planned, batch = number(facts.config.get("train.steps")), number(facts.config.get("data.batch"))
    size = number(child(facts.last_start, "data_set", "train").get("sub_scans"))
    value = f"{step:,.0f}" + ("" if math.isnan(planned) else f" of {planned:,.0f}")
    more = "" if math.isnan(batch) else f"{several(int(step * batch), 'sample')} of {batch:.0f} a step"
    if batch > 0 and size >= batch:
        more += f", {step / (size // batch):,.1f} epochs"
    return "Steps", value, more


def _speed(facts: RunFacts) -> Tile | None:
    rates = facts.series("speed/samples_per_s")[1]
    spent = facts.training_seconds()
    if not rates and math.isnan(spent):
        return None
    fastest = f"; median {median(rates):,.1f} samples/s, best {max(rates):,.1f}" if rates else ""
    return "Time, all starts", hours_minutes_seconds(spent), f"up to the last logged line{fastest}"


def _waiting(facts: RunFacts) -> Tile | None:
    shares = [share for share in facts.series("speed/waiting_share")[1] if math.isfinite(share)]
    if not shares:
        return None
    return (
        "Waiting for data",
        f"{100 * fmean(shares):.1f} %",
        f"of rank 0's time; at most {100 * max(shares):.1f} % between two lines",
    )


def _stall(facts: RunFacts) -> Tile | None:
    """How long training waited for checkpoints, if that is logged."""
    names = {name for record in facts.records for name in record if "checkpoint" in name and "stall" in name}
    values = [value for name in names for value in facts.series(name)[1] if math.isfinite(value)]
    if not values:
        return None
    return (
        "Stall for checkpoints",
        f"{median(values):.2f} s",
        f"median of {len(values)}; longest {max(values):.2f} s",
    )


TILES = (_validation, _separability, _length, _speed, _waiting, _stall)


def analysis(facts: RunFacts) -> Markup | None:
    """The tables of RUN/analysis/summary.json."""
    summary = facts.summary
    if not summary:
        return None
    on = f"{summary.get('wholes', '?')} wholes, split {summary.get('split', '?')}, of {summary.get('shards', '?')}"
    seconds = number(summary.get("seconds"))
    took = (
        ""
        if math.isnan(seconds)
        else f", in {hours_minutes_seconds(seconds)} on {summary.get('device', '?')}"
    )
    parts = [tag("p", keep_units(f"At step {summary.get('step', '?')}, on {on}{took}."), class_="note")]
    networks = {name: child(summary, "networks", name) for name in child(summary, "networks")}
    if networks:
        parts.append(_networks(networks))
    parts += filter(None, [_correlation(child(summary, "over_checkpoints"))])
    for name, network in networks.items():
        scales = child(network, "by_scale")
        rows = zip(*(floats(scales.get(key)) for key in ("scale", "auc", "d_prime")), strict=False)
        cells = [(figure(scale, 3), figure(auc, 3), figure(apart, 2)) for scale, auc, apart in rows]
        if cells:
            head = ("scale of the parts", "AUC", "d'")
            title = f"{name}: separability by scale"
            parts.append(tag("details", tag("summary", title), table(head, cells, label=title)))
    chosen = child(summary, "settings")
    if chosen:
        parts.append(
            tag(
                "details",
                tag("summary", "Settings of the analysis"),
                table((), sorted((_title(name), value) for name, value in chosen.items())),
            )
        )
    return join_markup(parts)


def _networks(networks: dict[str, dict[str, object]]) -> Markup:
    """The table with one row for each network."""
    extra = sorted(
        key
        for key in {key for network in networks.values() for key in child(network, "retrieval")}
        if key not in HIDDEN
        and not key.startswith("chance_")
        and any(not math.isnan(number(child(n, "retrieval").get(key))) for n in networks.values())
    )
    head = (
        "network", "kind", "step", "AUC", "d'", "positive", "negative", "contrastive loss",
        *(_title(key) for key in extra),
    )  # fmt: skip
    rows = []
    for name, network in networks.items():
        similar, found = child(network, "similarity"), child(network, "retrieval")
        step = number(network.get("step"))
        cells = [(number(similar.get(key)), digits) for key, digits in SIMILARITY]
        cells += [
            (number(network.get("contrastive_loss")), 3),
            *((number(found.get(key)), 3) for key in extra),
        ]
        at = DASH if math.isnan(step) else f"{step:,.0f}"
        rows.append((name, network.get("kind", ""), at, *(figure(*cell) for cell in cells)))
    by_lot = [child(network, "retrieval") for network in networks.values()]
    by_lot = [found for found in by_lot if any(f"chance_{key}" in found for key in extra)]
    if by_lot:
        chances = (figure(number(by_lot[0].get(f"chance_{key}")), 3) for key in extra)
        rows.append(("chance", "", DASH, figure(0.5, 3), figure(0.0, 2), DASH, DASH, DASH, *chances))
    note = "Cosine similarity of pairs of parts: positive, of one whole; negative, of two. d' is the distance of the means "
    note += "in standard deviations."
    return join_markup((table(head, rows, label="Networks compared"), tag("p", note, class_="note")))


HIDDEN = {"gallery", "n_queries"}  # sizes, which are the same for all networks
SIMILARITY = (("auc", 3), ("d_prime", 2), ("positive_mean", 3), ("negative_mean", 3))


TITLES = {
    "t": "temperature",
    "min_std_hu": "least standard deviation (HU)",
    "top_1": "top 1",
    "top_5": "top 5",
}


def _title(key: str) -> str:
    """A key of summary.json in words."""
    return TITLES.get(key, key.replace("_", " "))


def _correlation(over: dict[str, object]) -> Markup | None:
    """A sentence on the correlation of validation MSE and contrastive loss."""
    r = number(over.get("pearson_r"))
    if math.isnan(r):
        return None
    (low, high), p = ends(floats(over.get("ci95"))), number(over.get("p_value"))
    text = f"Over {several(len(floats(over.get('steps'))), 'checkpoint')}, contrastive loss and validation MSE go together "
    text += f"with Pearson r = {figure(r, 3)} (95 % interval {figure(low, 3)} to {figure(high, 3)}, p = {p:.2g}); the paper "
    return tag("p", keep_units(text + "has 0.93."))

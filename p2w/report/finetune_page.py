"""The page of a fine-tuning, or of all folds of a cross-validation: results, trials, curves, settings, commands."""

import math
import re
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np

from p2w.log import hours_minutes_seconds
from p2w.report import curves, page, results_section, run_section
from p2w.report.markup import (
    DASH,
    Markup,
    command_lines,
    document,
    figure,
    join_markup,
    keep_units,
    several,
    table,
    tag,
)
from p2w.report.run_reader import (
    FineTuningFacts,
    RunFacts,
    child,
    metric_words,
    number,
    over_trials,
    scores,
    whole,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 12  # metrics in the first table; the others, those of single classes, are unfolded
SECOND = (
    "dice",
    "auc_patient",
    "mae",
    "iou",
    "f1",
)  # what stands beside the compared metric, the first that there is


def render_fine_tuning(found: FineTuningFacts) -> str:
    """The page as text."""
    facts, run = found.run, found.run.run.resolve()
    charts = [chart for chart in _charts(found) if chart]
    body = [
        _head(found),
        tag("section", results_section.tiles(_tiles(found)), aria_label="Results in numbers"),
        page.section("Predictions", _pictures(found)),
        page.section("Test", _test(found)),
        page.section("Curves", page.chart_grid(charts)),
        page.section("Trials", _trials(found)),
        tag("div", page.section("Task", _task(found)), page.section("Starting point", _init(found)), class_="columns"),
        tag("div", page.section("Hardware", run_section.hardware(facts)), page.section("Settings", _settings(facts)),
            class_="columns"),
        page.section("Commands", _commands(found)),
        page.section("Not on this page", _missing(found)),
        page.footer(),
    ]  # fmt: skip
    task = child(found.manifest, "task").get("name", "")
    title = f"{run.parent.name}/{run.name}: {task}, {found.state}"
    return document(title, join_markup(body))


def _head(found: FineTuningFacts) -> Markup:
    """Name, state, and one line on task, network and share of the data."""
    tree, done = found.manifest, found.state == "finished"
    task, width, share = child(tree, "task"), number(tree.get("width")), number(tree.get("fraction"))
    what = [f"fine-tuned on {task.get('name', '?')} ({task.get('kind', '?')})", str(tree.get("network", ""))]
    what += [] if math.isnan(width) else [f"width {width:g}"]
    what += [f"from {child(tree, 'init').get('label', '?')}"]
    what += [f"{100 * share:g} % of the training patients"] * (share < 1)
    what += [f"{several(len(found.folds), 'fold')} of a cross-validation"] * bool(found.folds)
    why = "" if done else "the same command continues it"
    return run_section.page_head(
        found.run.run, found.state, "good" if done else "open", why, list(filter(None, what))
    )


def _tiles(found: FineTuningFacts) -> list[results_section.Tile]:
    """The most important numbers."""
    tiles: list[results_section.Tile] = []
    done, tree = found.finished, found.manifest
    for name in [*found.metrics[:1], *(name for name in SECOND if name in found.metrics[1:])][:2]:
        mean, spread, low, high = over_trials(found, name)
        value = figure(mean, 3) + ("" if math.isnan(spread) else f" \u00b1 {figure(spread, 3)}")
        more = "" if math.isnan(low) else f"95 % interval by patient: {figure(low, 3)} to {figure(high, 3)}"
        words = metric_words(name)
        tiles.append((f"{words[:1].upper()}{words[1:]}, test samples", value, more))
    epochs = [e for e in (number(trial.result.get("epochs")) for trial in done) if math.isfinite(e)]
    if epochs:
        each = (
            f"{min(epochs):,.0f}"
            if min(epochs) == max(epochs)
            else f"{min(epochs):,.0f} to {max(epochs):,.0f}"
        )
        tiles.append(("Trials", f"{len(done)} of {found.planned}", f"of {each} epochs"))
    seconds = [s for s in (number(trial.result.get("seconds")) for trial in done) if math.isfinite(s)]
    if seconds:
        longest = hours_minutes_seconds(max(seconds))
        tiles.append(
            ("Time, all trials", hours_minutes_seconds(sum(seconds)), f"the longest trial {longest}")
        )
    counts = [number(child(tree, "samples").get(split)) for split in ("train", "val", "test")]
    if not any(map(math.isnan, counts)):
        tested = child(found.run.summary).get(
            "patients", done[0].result.get("test_patients") if done else None
        )
        more = "to train, validate, test" + (
            f"; {several(int(whole(tested)), 'patient')} tested" if tested else ""
        )
        tiles.append(("Samples", " / ".join(f"{count:,.0f}" for count in counts), more))
    return tiles


MASKS = (
    "Four test samples, from the worst to the best, by the trial that p2w predict takes: dashed the true outline, solid the "
    "predicted one, in the slice with most of the mask."
)
CROPS = (
    "Four test samples, from the lowest probability to the highest, by the trial that p2w predict takes: the middle slice, "
    "and the true label."
)


def _pictures(found: FineTuningFacts) -> Markup | None:
    """Test samples of every folder, and the pictures of the trial with the lowest validation loss."""
    masks = str(child(found.manifest, "task").get("kind", "")).endswith("segmentation")
    files, captions = {}, {}
    for folder in found.folds or [found.run.run]:
        which = f", {folder.name.replace('-', ' ')}" if found.folds else ""
        path = folder / "figures" / "predictions.png"
        if path.exists():
            files[f"predictions{which}"] = path
            captions[f"predictions{which}"] = (
                which[2:].capitalize() + ". " * bool(which) + (MASKS if masks else CROPS)
            )
    shown = [trial for trial in found.finished if (trial.facts.run / "test.png").exists()]
    if shown:
        best = min(shown, key=lambda trial: number(trial.result.get("best_val_loss")))
        files[f"test samples of {best.name}"] = best.facts.run / "test.png"
    return page.pictures(found.run, files, captions)


def _test(found: FineTuningFacts) -> Markup | None:
    """All metrics on the test samples over the trials."""
    if not found.metrics:
        return None
    rows = []
    for name in found.metrics:
        values = [v for v in (trial.metric(name) for trial in found.finished) if math.isfinite(v)]
        mean, spread, low, high = over_trials(found, name)
        interval = DASH if math.isnan(low) else f"{figure(low, 3)} to {figure(high, 3)}"
        lowest, highest = (figure(end(values), 3) if values else DASH for end in (min, max))
        rows.append((metric_words(name), figure(mean, 3), figure(spread, 3), interval, lowest, highest))
    cross = bool(child(found.run.summary, "metrics"))
    first = "all folds together" if cross else "mean of trials"
    head = (
        "metric", first, "SD of folds" if cross else "SD of trials", "95 % interval by patient", "lowest",
        "highest",
    )  # fmt: skip
    parts = [table(head, rows[:MOST], "named", label="Metrics on the test samples")]
    if len(rows) > MOST:
        rest = table(head, rows[MOST:], "named", label="Further metrics")
        parts.append(tag("details", tag("summary", f"{len(rows) - MOST} further metrics"), rest))
    note = "The interval says how far the result may move with other patients, as if the network stayed the same; it is the "
    note += "mean of the trials' intervals. "
    if cross:
        note = "Mean and interval are those of all patients, each tested once, by a network that did not see them. "
    parts.append(tag("p", note + "Lowest and highest are those of single trials.", class_="note"))
    return join_markup(parts)


def _charts(found: FineTuningFacts) -> list[Markup | None]:
    """Loss, the metric that stops a trial, learning rate, the test metric by trial, ROC curves."""
    facts = found.run
    return [
        curves.chart("fine-tuning", lambda axes, _: _losses(axes, found), "Loss by epoch, a line a trial. Dots: the epoch "
                     "whose weights were kept.", facts),
        curves.chart("val-metric", lambda axes, _: _lines(axes, found, "val_metric", curves.BLUE, "validation"),
                     "The task's metric on the validation samples, which ends a trial here.", facts),
        curves.chart("lr", lambda axes, _: _lines(axes, found, "lr", curves.BLUE, ""), "Learning rate.", facts),
        curves.chart("test", lambda axes, _: _by_trial(axes, found), "The first metric on the test samples, a dot a trial, "
                     "with its 95 % interval by patient.", facts),
        curves.chart("roc", lambda axes, _: _roc(axes, found), "ROC curves on the test samples, a line a trial.", facts),
    ]  # fmt: skip


def _lines(axes: "Axes", found: FineTuningFacts, name: str, colour: str, label: str) -> bool:
    """A metric over epochs, a line a trial, only the first of which has a label."""
    drawn = False
    for trial in found.trials:
        epochs, values = curves.thin(*trial.facts.series(name))
        if epochs:
            alone = "o-" if len(epochs) == 1 else "-"
            axes.plot(
                epochs, values, alone, color=colour, linewidth=1, alpha=0.7, label="" if drawn else label
            )
            drawn = True
    axes.set_xlabel("epoch")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel({"lr": "learning rate", "val_metric": "metric on validation samples"}.get(name, "loss"))
    return drawn


def _losses(axes: "Axes", found: FineTuningFacts) -> bool:
    drawn = _lines(axes, found, "train_loss", curves.GREY, "training")
    drawn |= _lines(axes, found, "val_loss", curves.BLUE, "validation")
    name = "val_metric" if any(trial.facts.series("val_metric")[0] for trial in found.trials) else "val_loss"
    for trial in found.trials:
        epochs, values = trial.facts.series(name)
        losses = dict(zip(*trial.facts.series("val_loss"), strict=True))
        kept = [
            (value if name == "val_loss" else -value, at) for at, value in zip(epochs, values, strict=True)
        ]
        best = min((pair for pair in kept if math.isfinite(pair[0])), default=None)
        if best and math.isfinite(losses.get(best[1], math.nan)):
            axes.plot([best[1]], [losses[best[1]]], "o", color=curves.BLUE)
    return drawn


def _by_trial(axes: "Axes", found: FineTuningFacts) -> bool:
    """The compared metric of each trial with its interval."""
    if len(found.finished) < 2 or not found.metrics:
        return False
    name = found.metrics[0]
    points = [(at, trial.metric(name), *trial.interval(name)) for at, trial in enumerate(found.finished)]
    for at, value, low, high in points:
        if math.isfinite(low + high):
            axes.plot([at, at], [low, high], color=curves.GREY)
        axes.plot([at], [value], "o", color=curves.BLUE)
    axes.axhline(
        over_trials(found, name)[0],
        color=curves.ORANGE,
        linestyle="--",
        label="all" if found.run.summary else "mean",
    )
    names = [
        re.sub(r"fold (\d+), trial ", r"\1/", trial.name).removeprefix("trial ") for trial in found.finished
    ]
    if len(points) <= 20:
        axes.set_xticks(range(len(points)), names)
    axes.set_xlabel("fold/trial" if found.folds else "trial")
    axes.set_ylabel(metric_words(name))
    return True


def _roc(axes: "Axes", found: FineTuningFacts) -> bool:
    drawn = False
    for trial in found.finished:
        score, truth = scores(trial)
        if len(score) and 0 < truth.sum() < len(truth):
            order = np.argsort(-score, kind="stable")
            last = np.append(np.diff(score[order]) != 0, True)  # equal scores are one step
            hits, false = np.cumsum(truth[order])[last], np.cumsum(~truth[order])[last]
            axes.plot(
                np.append(0, false / false[-1]),
                np.append(0, hits / hits[-1]),
                color=curves.BLUE,
                linewidth=1,
                alpha=0.7,
            )
            drawn = True
    axes.plot([0, 1], [0, 1], color=curves.GREY, linewidth=0.8)
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    return drawn


def _trials(found: FineTuningFacts) -> Markup | None:
    """A row for each trial that has begun."""
    if not found.trials:
        return None
    name = found.metrics[0] if found.metrics else ""
    rows = []
    for trial in found.trials:
        outcome = trial.result
        low, high = trial.interval(name)
        seconds, last = (
            number(outcome.get("seconds")),
            max(trial.facts.series("val_loss")[0], default=math.nan),
        )
        rows.append(
            (
                trial.name, outcome.get("seed", DASH), "finished" if trial.finished else "unfinished",
                figure(number(outcome.get("epochs", last)), 0), figure(number(outcome.get("best_val_loss")), 4),
                DASH if math.isnan(seconds) else hours_minutes_seconds(seconds),
                figure(trial.metric(name), 3), DASH if math.isnan(low) else f"{figure(low, 3)} to {figure(high, 3)}",
                figure(number(outcome.get("n_train")), 0),
            )
        )  # fmt: skip
    head = ("trial", "seed", "state", "epochs", "best validation loss", "time", metric_words(name) or "metric",
            "95 % interval", "samples trained on")  # fmt: skip
    return table(head, rows, "named", label="Trials")


SPLITS = {"train": "train", "val": "validate", "test": "test"}


def _task(found: FineTuningFacts) -> Markup:
    """The target set."""
    tree, task = found.manifest, child(found.manifest, "task")
    counts = {name: number(child(tree, "samples").get(split)) for split, name in SPLITS.items()}
    samples = [f"{count:,.0f} to {name}" for name, count in counts.items() if not math.isnan(count)]
    fold = number(tree.get("fold"))
    rows = [
        ("task", task.get("name", "")), ("kind", task.get("kind", "")), ("set", task.get("where", "")),
        ("fingerprint", task.get("fingerprint", "")),
        ("samples", ", ".join(samples) + (", of the first fold" if found.folds else "")),
        ("share of the training patients", f"{100 * number(tree.get('fraction', 1)):g} %"),
        ("folds" if found.folds else "fold", len(found.folds) if found.folds else "" if math.isnan(fold) else f"{fold:.0f}"),
    ]  # fmt: skip
    return table((), [(name, keep_units(str(value))) for name, value in rows if value not in ("", None)])


def _init(found: FineTuningFacts) -> Markup:
    """Where the weights came from."""
    tree, init = found.manifest, child(found.manifest, "init")
    loss, step = number(init.get("val_mse")), number(init.get("step"))
    rows = [
        ("label", init.get("label", "")), ("weights", init.get("source", "")), ("pretext", init.get("pretext") or ""),
        ("step", "" if math.isnan(step) else f"{step:,.0f}"),
        ("validation MSE of the pretraining", "" if math.isnan(loss) else figure(loss)),
        ("decoder", "as pretrained" if tree.get("decoder") == "pretrained" else "new" if tree.get("decoder") else ""),
        ("test scans seen in pretraining", tree.get("leak") or ""),
    ]  # fmt: skip
    return table((), [row for row in rows if row[1] != ""])


FIRST = (
    "batch", "epoch_steps", "optimizer", "lr", "schedule", "patience", "stop_on", "max_epochs", "precision",
    "freeze",
)  # fmt: skip


def _settings(facts: RunFacts) -> Markup | None:
    """The settings that decide most, then all."""
    if not facts.config:
        return None
    names = {name: run_section.spelled(value) for name, value in facts.config.items()}
    rows = [(name, names[name]) for name in FIRST if name in names]
    every = table(("setting", "value"), sorted(names.items()), label="All settings")
    return join_markup((table((), rows), tag("details", tag("summary", f"All {len(names)} settings"), every)))


def _commands(found: FineTuningFacts) -> Markup:
    """The commands that continue the run, that compare it with another start, and that use it."""
    start, run = found.run.last_start, run_section.quoted(found.run.run)
    launcher, where = run_section.launcher_of(start), f", in {start['cwd']}" if start.get("cwd") else ""
    parts = []
    if start.get("command"):
        parts += [
            tag("h3", f"Continue it (its own command{where})"),
            command_lines(f"{launcher} {start['command']}"),
        ]
        init = child(found.manifest, "init").get("source")
        other, folder = (
            ("random", f"{found.run.run}-random")
            if init != "random"
            else ("RUN", f"{found.run.run}-pretrained")
        )
        title = "What is the pretraining worth? The same from random weights, then both side by side"
        title = (
            title
            if init != "random"
            else "The same from pretrained weights, a run of p2w train, then both side by side"
        )
        words = other_start(str(start["command"]), found.manifest, other, folder)
        if words:
            compare = f"p2w table1 {run} {shlex.quote(folder)}"
            if init != "random":
                label = shlex.quote(str(child(found.manifest, "init").get("label", "")))
                compare += f" --ours {label} --against Scratch"
            parts += [tag("h3", title), command_lines(f"{launcher} {shlex.join(words)}\n{compare}")]
    kind = str(child(found.manifest, "task").get("kind", ""))
    if kind.endswith("segmentation"):
        use = f"p2w predict {run} --scan scan.nii.gz --out mask.nii.gz --preview mask.png"
        parts += [tag("h3", "Use it on a scan"), command_lines(use)]
    parts += [tag("h3", "This page again"), command_lines(f"p2w report {run}")]
    return join_markup(parts)


def other_start(command: str, manifest: dict[str, Any], init: str, folder: str) -> list[str]:
    """The words of the run's command with another start and folder, and the same network; [] if it cannot be read."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    kept: list[str] = []
    skip = False
    for word in words:
        name = word.partition("=")[0]
        if skip:
            skip = False
        elif name in ("--init", "--run-dir", "--run", "--label", "--network", "--width", "--allow-leak"):
            skip = "=" not in word and name != "--allow-leak"
        else:
            kept.append(word)
    network, width = manifest.get("network"), number(manifest.get("width"))
    kept += ["--init", init, "--run-dir", folder]
    kept += ["--network", str(network)] if network and init == "random" else []
    return kept + (["--width", f"{width:g}"] if not math.isnan(width) and init == "random" else [])


def _missing(found: FineTuningFacts) -> Markup | None:
    """What is missing, and files that could not be read."""
    lines: list[object] = []
    left = found.planned - len(found.finished)
    if left:
        lines.append(
            tag("li", f"{several(left, 'trial')} not finished: the command above does what is left.")
        )
    kind = str(child(found.manifest, "task").get("kind", ""))
    drawn = any(
        (folder / "figures" / "predictions.png").exists() for folder in found.folds or [found.run.run]
    )
    if not drawn and kind.endswith("segmentation"):
        lines.append(
            tag(
                "li",
                "Pictures of test samples: the command above draws them when a trial has kept its weights.",
            )
        )
    lines += [tag("li", problem) for problem in dict.fromkeys(found.run.problems)]
    return tag("ul", *lines) if lines else None

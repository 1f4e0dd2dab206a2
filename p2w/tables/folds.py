"""Runs that differ in the fold alone become one: cross-validation, where every patient is tested on once.

A trial's number is the mean over the folds of its metric, so that n is the number of trials: folds share their training
patients and are no trials of their own. Predictions are not pooled: scores of different networks have no common scale.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from p2w.target.results import Transfer, Trial


def joined(transfers: Sequence[Transfer]) -> list[Transfer]:
    """The transfers of one task, those of several folds as one over all the folds that any of them was tested on.

    A trial counts when it is finished in every one of these folds, with one seed. With one fold all stay as they are.
    """
    folds = sorted({one.fold for one in transfers if one.fold is not None})
    if len(folds) < 2:
        return list(transfers)
    groups: dict[object, list[Transfer]] = {}
    for one in transfers:
        alike = (one.label, one.source, one.network, one.width, one.decoder, one.fraction, one.fingerprint)
        groups.setdefault((*alike, sorted(one.recipe.items())).__repr__(), []).append(one)
    return [made for group in groups.values() for made in _join(group, folds)]


def _join(group: list[Transfer], folds: list[int]) -> list[Transfer]:
    if len({one.fold for one in group}) < len(group):  # one of them twice: the table names both
        return group
    trials = []
    for index in sorted({trial.index for one in group for trial in one.trials}):
        same = [trial for one in group for trial in one.trials if trial.index == index]
        if len(same) == len(folds) and len({trial.seed for trial in same}) == 1:
            names = set.intersection(*(set(trial.metrics) for trial in same))
            metrics = {name: fmean(trial.metrics[name] for trial in same) for name in sorted(names)}
            trials.append(Trial(index, same[0].seed, metrics))
    first = group[0]
    where = first.folder.parent if len(group) > 1 else first.folder
    planned = max(one.planned for one in group)
    return [
        replace(first, folder=where, fold=None, folds=tuple(folds), planned=planned, trials=tuple(trials))
    ]


def not_all(title: str, transfers: Sequence[Transfer]) -> str | None:
    """What a reader must know of a column whose test set has more folds than were tested on."""
    for one in transfers:
        tested = one.folds or (() if one.fold is None else (one.fold,))
        if tested and len(tested) < one.of_folds:
            return f"{title}: of {one.of_folds} folds only {', '.join(map(str, tested))} tested on."
        if tested and len(tested) > 1:
            return f"{title}: a trial is the mean over {len(tested)} folds."
    return None


def unlike(title: str, rows: dict[str, Transfer]) -> str | None:
    """A warning where the rows of a column were not fine-tuned by one recipe, or at one width of a network."""
    names = sorted({name for one in rows.values() for name in one.recipe} - {"seed"})
    found = []
    for name in names:
        by: dict[object, str] = {}
        for row, one in rows.items():
            if name in one.recipe:
                by.setdefault(one.recipe[name], row)
        if len(by) > 1:
            found.append(f"{name} " + ", ".join(f"{value} ({row})" for value, row in by.items()))
    widths: dict[str, dict[int, str]] = {}
    for row, one in rows.items():
        if one.width is not None:
            widths.setdefault(one.network, {}).setdefault(one.width, row)
    for network, own in widths.items():
        if len(own) > 1:
            found.append(f"width of {network} " + ", ".join(f"{width} ({row})" for width, row in own.items()))
    if not found:
        return None
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"Warning: {title}: rows differ by more than their starting point: {'; '.join(found[:3])}{more}."

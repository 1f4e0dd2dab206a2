"""Which values of a mask file are which class: as the user or a dataset.json declares it. No torch.

Classes that have one value each are exclusive (multi-class): the mask of a sample holds the number of the class, 0 for
background. Regions have several values each and may overlap (multi-label): the mask holds a bit for each region.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.ct.orientation import BadScan
from p2w.errors import UserError, first_line
from p2w.files import parse_json
from p2w.tasks.task import MOST_BITS, MOST_CLASSES, MULTI_CLASS_SEGMENTATION, MULTI_LABEL_SEGMENTATION

BACKGROUND = "background"
MOST_VALUE = 65535  # of a mask file
LARGEST = 1 << 24  # bytes of a dataset.json


class WrongLabels(BadScan):
    """A mask holds what the command does not declare: the declaration is wrong, and no other scan is cut either."""

    ends_build = True


@dataclass(frozen=True)
class LabelValues:
    """The values of a mask file that make each class, without background; and in which order regions are written."""

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    order: tuple[int, ...] = ()
    """Of regions: the value that each is written with in a label map, later ones over earlier ones; (): they are written as
    files of their own."""

    @property
    def regions(self) -> bool:
        """Whether a voxel may belong to several of them."""
        every = [value for own in self.values for value in own]
        return len(set(every)) < len(every) or any(len(own) > 1 for own in self.values)

    @property
    def kind(self) -> str:
        """The kind of task that they make."""
        return MULTI_LABEL_SEGMENTATION if self.regions else MULTI_CLASS_SEGMENTATION

    def check(self, where: str) -> "LabelValues":
        """Return them if they make sense. Raises UserError that begins with `where`."""
        if not self.names:
            raise UserError(f"{where}: no label beside {BACKGROUND}; name at least one")
        check_class_names(where, self.names)
        for name, own in zip(self.names, self.values, strict=True):
            if not own or not all(0 < value <= MOST_VALUE for value in own) or len(set(own)) < len(own):
                raise UserError(
                    f"{where}: {name} has the values {', '.join(map(str, own)) or 'none'}: whole numbers from 1 to "
                    f"{MOST_VALUE:,}, each once (0 is {BACKGROUND})"
                )
        check_class_count(where, len(self.names), self.regions)
        if self.order and (len(self.order) != len(self.names) or not self.regions):
            raise UserError(
                f"{where}: regions_class_order has {len(self.order)} values for {len(self.names)} regions: one for each, "
                "and only where labels are regions"
            )
        return self

    def encode(self, found: NDArray[Any], name: str) -> NDArray[np.int16]:
        """A mask file's values [z,y,x] as class numbers, or as bits of regions.

        Raises WrongLabels for values that are not declared.
        """
        declared = {0, *(value for own in self.values for value in own)}
        stray = sorted(present_values(found) - declared)
        if stray:
            known = ", ".join(
                f"{n}={','.join(map(str, v))}" for n, v in zip(self.names, self.values, strict=True)
            )
            raise WrongLabels(
                f"mask {name}: holds the value{'s' * (len(stray) > 1)} {', '.join(map(str, stray[:5]))}, declared are 0 and "
                f"{known}: declare all values, or correct the mask"
            )
        table = np.zeros(max(declared) + 1, np.int16)
        for number, own in enumerate(self.values):
            for value in own:
                table[value] = table[value] | (1 << number) if self.regions else number + 1
        out = np.empty(found.shape, np.int16)
        for z, image in enumerate(found):  # slice by slice, since indices take 8 bytes a voxel
            out[z] = table[image.astype(np.intp)]
        return out


def present_values(found: NDArray[Any]) -> set[int]:
    """The values of a volume of whole numbers."""
    present: set[int] = set()
    for image in found:
        low, high = int(image.min()), int(image.max())
        if high - low <= MOST_VALUE:
            present |= set((np.flatnonzero(np.bincount(image.ravel().astype(np.int64) - low)) + low).tolist())
        else:
            present |= {int(value) for value in np.unique(image)}
    return present


def check_class_names(where: str, names: Sequence[str]) -> None:
    """Raise UserError for names that are not usable in tables and file names, or not each once."""
    for name in names:
        if not name or not name.isprintable() or set(name) & set('/\\:"*?<>|') or name.startswith("."):
            raise UserError(f'{where}: {name!r} is no name of a class: printable, without / \\ : * ? " < > |')
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{where}: {twice[0]!r} is declared twice; each class has a name of its own")


def check_class_count(where: str, count: int, overlapping: bool) -> None:
    """Raise UserError for more classes than a sample's mask can hold."""
    most = MOST_BITS if overlapping else MOST_CLASSES
    if count > most:
        what = "classes that may overlap" if overlapping else "classes"
        raise UserError(f"{where}: {count} {what}, a sample holds at most {most}: choose some")


def parse_label_names(texts: Sequence[str]) -> LabelValues:
    """`NAME=V` or `NAME=V,V,…` of --label-names. Raises UserError."""
    names, values = [], []
    for text in texts:
        name, equals, numbers = text.rpartition("=")
        own = numbers.split(",")
        if not equals or not all(one.strip().isdecimal() for one in own):
            raise UserError(f"--label-names {text!r}: NAME=VALUE, such as tumour=1, or of a region NAME=1,2")
        found = tuple(int(one) for one in own)
        if name.strip().lower() == BACKGROUND and found == (0,):
            continue
        names.append(name.strip())
        values.append(found)
    return LabelValues(tuple(names), tuple(values)).check("--label-names")


def read_dataset_json(source: str) -> dict[str, Any]:
    """The dataset.json of a folder. Raises UserError where there is none or it is damaged."""
    path = os.path.join(source, "dataset.json")
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError(f"{path}: more than {LARGEST >> 20} MiB: is no dataset.json")
        tree: dict[str, Any] = parse_json(data, {"labels": {}})
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name the folder that holds it"
        ) from error
    except (ValueError, RecursionError) as error:
        said = first_line(error)
        raise UserError(f"{path}: is no dataset.json ({said}); copy it again") from error
    return tree


def numbered_names(path: str, key: str, tree: Mapping[str, Any]) -> tuple[str, ...]:
    """The names under "0", "1", … of `tree[key]`, in order. Raises UserError."""
    named = tree.get(key)
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f'{path}: {key!r} has to be an object of names, such as {{"0": "CT"}}')
    if sorted(named) != sorted(map(str, range(len(named)))):
        raise UserError(f"{path}: {key!r} has the numbers {', '.join(named)}: 0, 1, … without gaps")
    return tuple(named[str(number)] for number in range(len(named)))


def nnunet_labels(path: str, tree: Mapping[str, Any]) -> LabelValues:
    """`labels` and `regions_class_order` of nnU-Net's dataset.json: name -> value, or -> values of a region.

    Raises UserError for labels that nnU-Net refuses too (not contiguous from 0), and for an ignore label.
    """
    names, values = [], []
    for name, declared in tree["labels"].items():
        own = declared if isinstance(declared, list) else [declared]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in own):
            raise UserError(
                f"{path}: label {name!r} is {json.dumps(declared)[:60]}: a whole number, or of a region a list of them"
            )
        if name.lower() == "ignore":
            raise UserError(f"{path}: has an ignore label, which is not read here; give these voxels a class")
        if own == [0]:
            if name != BACKGROUND:
                raise UserError(f"{path}: label 0 is {name!r}, it has to be {BACKGROUND}")
            continue
        names.append(name)
        values.append(tuple(own))
    order = tree.get("regions_class_order") or ()
    if not all(isinstance(one, int) and 0 < one <= MOST_VALUE for one in order):
        raise UserError(f"{path}: regions_class_order {json.dumps(order)[:60]}: a list of values from 1")
    found = LabelValues(tuple(names), tuple(values), tuple(order)).check(path)
    check_contiguous(path, (value for own in found.values for value in own))
    if found.regions and not order:
        raise UserError(
            f"{path}: its labels are regions, and regions_class_order is missing: add it, as nnU-Net asks"
        )
    return found


def decathlon_labels(path: str, tree: Mapping[str, Any]) -> LabelValues:
    """`labels` of the Decathlon's dataset.json: "0", "1", … -> name. Raises UserError."""
    named = tree["labels"]
    if not all(value.isdecimal() and isinstance(name, str) for value, name in named.items()):
        raise UserError(f'{path}: labels have to be value: name, such as {{"0": "background", "1": "liver"}}')
    chosen = {int(value): name for value, name in named.items() if int(value)}
    check_contiguous(path, chosen)
    return LabelValues(
        tuple(chosen[value] for value in sorted(chosen)), tuple((value,) for value in sorted(chosen))
    ).check(path)


def check_contiguous(path: str, values: Iterable[int]) -> None:
    """Raise UserError unless the values are 1, 2, … without gaps."""
    have = sorted(set(values))
    if have != list(range(1, len(have) + 1)):
        gap = next((value for value in range(1, max(have) + 1) if value not in have), 1)
        raise UserError(
            f"{path}: labels {', '.join(map(str, [0, *have]))} are not contiguous: {gap} is missing"
        )

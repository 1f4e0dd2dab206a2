"""Cases of images with masks in the layouts that others use. No torch.

nnunet        dataset.json, imagesTr/CASE_0000.nii.gz (a file a channel), labelsTr/CASE.nii.gz
decathlon     dataset.json of the Medical Segmentation Decathlon, which lists images and labels
structures    CASE/ct.nii.gz and CASE/segmentations/STRUCTURE.nii.gz: a mask file a structure (TotalSegmentator)
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from p2w.ct.discover import IMAGES, printable
from p2w.errors import UserError
from p2w.tasks import source_files
from p2w.tasks.label_values import (
    LabelValues,
    check_class_count,
    check_class_names,
    decathlon_labels,
    nnunet_labels,
    numbered_names,
    read_dataset_json,
)
from p2w.tasks.task import Case, Cases

STRUCTURE = "structure "  # before a structure's name, as the role of its mask


@dataclass(frozen=True)
class LayoutContents:
    """Cases with the roles image0, image1, … and mask, or `STRUCTURE` and its name for each structure."""

    cases: Cases
    channels: tuple[str, ...]
    labels: LabelValues


def read_nnunet(source: str, out: str) -> LayoutContents:
    """nnU-Net's raw data set. Raises UserError where dataset.json and the files disagree."""
    path, tree = os.path.join(source, "dataset.json"), read_dataset_json(source)
    if "channel_names" not in tree:
        other = "; of the Medical Segmentation Decathlon: --layout decathlon" if "modality" in tree else ""
        raise UserError(f"{path}: no channel_names, which nnU-Net's has{other}")
    channels, labels = numbered_names(path, "channel_names", tree), nnunet_labels(path, tree)
    ending = tree.get("file_ending", ".nii.gz")
    if ending not in IMAGES:
        raise UserError(f"{path}: file_ending {ending!r} is not read; convert to one of {', '.join(IMAGES)}")
    if isinstance(tree.get("dataset"), dict):
        listed = _listed_cases(path, tree["dataset"], len(channels))
    else:
        files = source_files.files_below(os.path.join(source, "labelsTr"), out)
        names = sorted(name.removesuffix(ending) for name in files if name.endswith(ending))
        listed = {
            name: (
                [f"imagesTr/{name}_{channel:04d}{ending}" for channel in range(len(channels))],
                f"labelsTr/{name}{ending}",
            )
            for name in names
        }
    if not listed:
        raise UserError(
            f"{source}: labelsTr holds no {ending} file: name nnU-Net's folder of the raw data set"
        )
    wanted = tree.get("numTraining")
    if isinstance(wanted, int) and wanted != len(listed):
        raise UserError(
            f"{path}: numTraining is {wanted}, the folder has {len(listed)} labelled cases: correct one"
        )
    cases = _cases(source, listed)
    used = {image for images, _ in listed.values() for image in images}
    there = source_files.files_below(os.path.join(source, "imagesTr"), out)
    if alone := [name for name in there if f"imagesTr/{name}" not in used]:
        cases.left_out.append((f"imagesTr: {source_files.first_of(alone)}", "of no labelled case"))
    return LayoutContents(cases, channels, labels)


def _listed_cases(path: str, listed: Mapping[str, Any], channels: int) -> dict[str, tuple[list[str], str]]:
    """Cases that nnU-Net's dataset.json lists itself, under `dataset`."""
    found = {}
    for name, one in listed.items():
        images, label = (one.get("images"), one.get("label")) if isinstance(one, dict) else (None, None)
        if (
            not isinstance(images, list)
            or not isinstance(label, str)
            or not all(isinstance(i, str) for i in images)
        ):
            raise UserError(f"{path}: case {name!r} has to have images, a list of paths, and label, a path")
        if len(images) != channels:
            raise UserError(f"{path}: case {name!r} has {len(images)} images, there are {channels} channels")
        found[name] = (images, label)
    return found


def read_decathlon(source: str, out: str) -> LayoutContents:
    """A task of the Medical Segmentation Decathlon with one image a case.

    Raises UserError where dataset.json and the files disagree, and for 4-D images of several modalities.
    """
    del out
    path, tree = os.path.join(source, "dataset.json"), read_dataset_json(source)
    if "modality" not in tree or not isinstance(tree.get("training"), list):
        other = "; nnU-Net's own form: --layout nnunet" if "channel_names" in tree else ""
        raise UserError(f"{path}: no modality and training, which the Decathlon's has{other}")
    channels, labels = numbered_names(path, "modality", tree), decathlon_labels(path, tree)
    if len(channels) > 1:
        raise UserError(
            f"{path}: {len(channels)} modalities in one 4-D file are not read; nnUNetv2_convert_MSD_dataset makes a file of "
            "each, then --layout nnunet"
        )
    listed: dict[str, tuple[list[str], str]] = {}
    for number, one in enumerate(tree["training"]):
        pair = [one.get("image"), one.get("label")] if isinstance(one, dict) else [None]
        if not all(isinstance(part, str) for part in pair):
            raise UserError(f"{path}: entry {number} of training has to have image and label, two paths")
        image, label = (os.path.normpath(str(part)) for part in pair)
        name = source_files.file_stem(os.path.basename(image))
        if name in listed:
            raise UserError(f"{path}: case {name} is twice in training: leave one out")
        listed[name] = ([image], label)
    wanted = tree.get("numTraining")
    if isinstance(wanted, int) and wanted != len(listed):
        raise UserError(f"{path}: numTraining is {wanted}, training lists {len(listed)} cases: correct one")
    if not listed:
        raise UserError(f"{path}: training lists no case")
    return LayoutContents(_cases(source, listed), channels, labels)


def _cases(source: str, listed: Mapping[str, tuple[Sequence[str], str]]) -> Cases:
    """One case for each name, if all its files are there."""
    cases = Cases()
    for name, (images, label) in sorted(listed.items()):
        lacks = [path for path in (*images, label) if not os.path.isfile(os.path.join(source, path))]
        if lacks:
            cases.bad.append((name, f"{printable(lacks[0])} is missing"))
            continue
        roles = [
            (f"image{number}", source_files.as_source(printable(path), os.path.join(source, path), name))
            for number, path in enumerate(images)
        ]
        mask = source_files.as_source(printable(label), os.path.join(source, label))
        cases.cases.append(Case(roles[0][1].uid, name, name, (*roles, ("mask", mask))))
    return cases


def _structures_by_folder(
    files: Iterable[str], structures: str
) -> tuple[dict[str, dict[str, str]], dict[str, tuple[str, str]]]:
    """Folder -> structure -> file, of structures that the expression matches; and folder -> two files of one structure."""
    folders: dict[str, dict[str, str]] = {}
    twice: dict[str, tuple[str, str]] = {}
    for name in files:
        folder, _, file = name.rpartition("/")
        stem = source_files.file_stem(file)
        if re.search(structures, stem):
            own = folders.setdefault(folder, {})
            if stem in own:
                twice[folder] = own[stem], name
            own[stem] = name
    return folders, twice


def read_structures(
    source: str, out: str, images: str, masks: str, structures: str, overlapping: bool
) -> LayoutContents:
    """Images that the pattern `images` names, each with the folder of masks that `masks` names, a file a structure.

    `structures`: regular expression of the structures to take, "" for all. A structure that any case has, all must have: a
    case that lacks one is bad. Raises UserError where nothing is found.
    """
    files = source_files.files_below(source, out)
    found = source_files.matching(images, files)
    folders, twice = _structures_by_folder(files, structures)
    of_case = source_files.matching(masks.rstrip("/"), folders)
    if not found:
        raise UserError(
            f"{source}: no image there is called like {images!r}: name a pattern with --images, such as '*/ct.nii.gz'"
        )
    for folder in of_case.values():
        if folder in twice:
            raise UserError(f"{source}: {' and '.join(twice[folder])} are one structure: remove one")
    together = {name: folders[of_case[name]] for name in found if name in of_case}
    every = sorted({structure for own in together.values() for structure in own})
    if not every:
        what = f" like {structures!r}" if structures else ""
        raise UserError(
            f"{source}: no folder {masks!r} of an image holds a mask{what}: name the folders with --masks, such as "
            "'*/segmentations'"
        )
    where = f"{source} ({masks})"
    check_class_names(where, every)
    check_class_count(f"{where}, see --structures", len(every), overlapping)
    cases = Cases()
    if alone := [folder for name, folder in of_case.items() if name not in found]:
        cases.left_out.append((source_files.first_of(alone), f"folders of masks of no image {images}"))
    for name, image in sorted(found.items()):
        masks_of = together.get(name)
        if masks_of is None:
            cases.bad.append((image, f"has no folder of masks {masks.replace('*', name)}"))
        elif lacks := [structure for structure in every if structure not in masks_of]:
            said = f"has no mask of {lacks[0]}, which other cases have: add an empty one, or see --structures"
            cases.bad.append((image, said))
        else:
            roles = [("image0", source_files.as_source(image, files[image], name))]
            for structure in every:
                mask = masks_of[structure]
                roles.append((f"{STRUCTURE}{structure}", source_files.as_source(mask, files[mask])))
            cases.cases.append(Case(roles[0][1].uid, image, name, tuple(roles)))
    values = tuple((number + 1,) for number in range(len(every)))
    return LayoutContents(cases, (), LabelValues(tuple(every), values))

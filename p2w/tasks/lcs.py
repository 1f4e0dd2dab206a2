"""LCS: where is the liver? LiTS' volumes and segmentations; labels 1 (liver) and 2 (tumour) are liver (FACTS)."""

import os
import re
from dataclasses import dataclass
from typing import ClassVar

from p2w.ct.scan import read_scan
from p2w.errors import UserError
from p2w.tasks import crops, source_files
from p2w.tasks.crops import TileSettings, crops_in_tiles
from p2w.tasks.task import SEGMENTATION, WINDOW_HU, Case, Cases, CutSamples, Split

LIVER = (1, 2)
NAME = re.compile(r"(volume|segmentation)-(\d+)\.nii(?:\.gz)?")


@dataclass(frozen=True)
class Lcs(TileSettings):
    """LCS: where is the liver? From LiTS: --source holds volume-N.nii and segmentation-N.nii, or .nii.gz, in any folders."""

    train: str = "0-99"
    """Numbers of the volumes to train on."""
    val: str = "100-114"
    """To validate on."""
    test: str = "115-129"
    """To test on."""

    name: ClassVar[str] = "lcs"
    kind: ClassVar[str] = SEGMENTATION
    size: ClassVar[tuple[int, int, int]] = (32, 64, 64)
    classes: ClassVar[tuple[str, ...]] = ("background", "liver")
    channel_names: ClassVar[tuple[str, ...]] = ("ct",)
    window: ClassVar[tuple[float, float]] = WINDOW_HU

    def check(self) -> None:
        """Raise UserError for options that make no data set."""
        self.check_tiles()
        ranges = self._ranges()
        for name, (first, last) in ranges.items():
            for other, (start, end) in ranges.items():
                if name < other and first <= end and start <= last:
                    raise UserError(f"--{name} {first}-{last} and --{other} {start}-{end} share volumes")

    def find(self, source: str, out: str) -> Cases:
        """One case for each volume that has a segmentation."""
        found: dict[tuple[str, int], str] = {}
        cases = Cases()
        files = source_files.files_below(source, out)
        for name in files:
            if match := NAME.fullmatch(os.path.basename(name)):
                key = match[1], int(match[2])
                if key in found:
                    cases.bad.append((name, f"is {match[1]} {key[1]} again, after {found[key]}: remove one"))
                found.setdefault(key, name)
        if not found:
            raise UserError(f"{source}: no volume-N.nii and segmentation-N.nii below it: name LiTS' folder")
        for number in sorted({number for _, number in found}):
            image, mask = found.get(("volume", number)), found.get(("segmentation", number))
            split = next((name for name, (a, b) in self._ranges().items() if a <= number <= b), None)
            if image is None or mask is None:
                lacks = "volume" if image is None else "segmentation"
                cases.bad.append((str(image or mask), f"has no {lacks}-{number} beside it"))
            elif split is None:
                cases.left_out.append((image, "is in no split"))
            else:
                uid = f"volume-{number}"
                both = (
                    ("ct", source_files.as_source(image, files[image], uid)),
                    ("mask", source_files.as_source(mask, files[mask])),
                )
                cases.cases.append(Case(uid, image, str(number), both, split=split))
        return cases

    def split(self, cases: list[Case]) -> Split:
        """By number; LiTS has one volume a patient."""
        rule = f"LiTS' numbers: train {self.train}, val {self.val}, test {self.test}"
        return Split(rule, of={case.patient: case.split for case in cases}, seed=self.seed)

    def cut(self, case: Case, size: tuple[int, int, int]) -> CutSamples:
        """Tiles over the liver's bounding box."""
        scan = read_scan(case.source("ct"))
        mask, file = source_files.read_mask(
            case.source("mask"), scan.grid, scan.voxels.shape, LIVER, self.resample_masks
        )
        files = [
            crops.file_record("ct", case.name, scan.nbytes, scan.checksum),
            crops.file_record("mask", case.source("mask").name, file.nbytes, file.checksum),
        ]
        samples = crops_in_tiles(
            lambda place: [crops.crop_hu(scan.voxels, place)], mask, scan.grid, size, self, case.uid
        )
        return CutSamples(files, samples)

    def _ranges(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name, text in (("train", self.train), ("val", self.val), ("test", self.test)):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last:
                raise UserError(f"--{name} {text!r}: write first-last, like 0-99")
            found[name] = (first, last)
        return found

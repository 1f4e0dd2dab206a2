"""The phantom: same seed same bytes, other seed other patient, LUNA16 layout, positions that meet nodules."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from p2w.errors import UserError
from p2w.phantom import LUNGS, Label, PhantomScan, make_scan, write_luna
from p2w.phantom.__main__ import main
from p2w.phantom.body import Frame
from p2w.phantom.ct_targets import write_series

pytestmark = pytest.mark.slow  # seconds of computing

TINY = (16, 32, 32)
SMALL = (24, 48, 48)
MIDDLE = (64, 128, 128)  # half of the usual resolution, for a third of its time


@pytest.fixture(scope="module")
def scans() -> list[PhantomScan]:
    return [make_scan(seed, MIDDLE) for seed in (0, 1, 2)]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_same_seed_gives_the_same_bytes() -> None:
    a, b = make_scan(5, TINY), make_scan(5, TINY)
    assert a.voxels.tobytes() == b.voxels.tobytes()
    assert a.labels.tobytes() == b.labels.tobytes()
    assert (a.nodules, a.candidates, a.spacing_mm, a.origin_mm) == (
        b.nodules,
        b.candidates,
        b.spacing_mm,
        b.origin_mm,
    )


def test_other_seeds_are_other_patients(scans: list[PhantomScan]) -> None:
    pairs = [(scans[0], scans[1]), (scans[0], scans[2]), (scans[1], scans[2])]
    for a, b in pairs:
        assert dice(np.isin(a.labels, LUNGS), np.isin(b.labels, LUNGS)) < 0.9
        assert dice(a.labels == Label.VESSEL, b.labels == Label.VESSEL) < 0.2
        assert dice(a.labels == Label.RIB, b.labels == Label.RIB) < 0.3
        assert dice(a.labels == Label.HEART, b.labels == Label.HEART) < 0.9
        assert a.spacing_mm != b.spacing_mm


# what a radiologist would expect of the median, HU; contrast medium widens blood
EXPECTED_HU = {
    Label.AIR: (-3024, -990),
    Label.FAT: (-120, -80),
    Label.MUSCLE: (35, 75),
    Label.HEART: (30, 330),
    Label.AORTA: (30, 330),
    Label.LIVER: (40, 140),
    Label.LUNG: (-930, -780),
    Label.VESSEL: (-420, 300),
    Label.AIRWAY: (-1024, -700),
    Label.SPINE: (100, 450),
    Label.RIB: (100, 600),
}


@pytest.mark.parametrize("label", EXPECTED_HU, ids=lambda label: label.name)
def test_tissue_has_its_density(scans: list[PhantomScan], label: Label) -> None:
    low, high = EXPECTED_HU[label]
    for scan in scans:
        inside = scan.voxels[scan.labels == label]
        assert inside.size > 1000
        assert low <= np.median(inside) <= high


def test_every_tissue_is_somewhere(scans: list[PhantomScan]) -> None:
    seen = set(np.unique(np.concatenate([np.unique(scan.labels) for scan in scans])).tolist())
    assert seen == {int(label) for label in Label}


def test_nodules_are_where_the_list_says(scans: list[PhantomScan]) -> None:
    for scan in scans:
        assert scan.nodules
        for nodule in scan.nodules:
            assert 4 <= nodule.diameter_mm <= 30
            voxel = (np.array(nodule.centre_mm) - scan.origin_mm) / scan.spacing_mm
            np.testing.assert_allclose(voxel, nodule.centre_voxel, atol=1e-6)
            assert scan.labels[tuple(np.rint(voxel).astype(int))] == Label.NODULE


COARSE = [(seed, (24, 48, 48)) for seed in range(40, 48)] + [(151, (48, 96, 96))]  # 151: once inside a rib


@pytest.mark.parametrize(("seed", "shape"), COARSE)
def test_small_and_coarse_scans_keep_their_nodules(seed: int, shape: tuple[int, int, int]) -> None:
    scan = make_scan(seed, shape)
    for nodule in scan.nodules:
        assert scan.labels[tuple(np.rint(nodule.centre_voxel).astype(int))] == Label.NODULE


def test_to_voxel_inverts_to_body() -> None:
    for seed in range(4):
        frame = Frame.draw(np.random.default_rng(seed), (128, 256, 256), None, (300.0, 250.0, 350.0))
        voxel = np.random.default_rng(seed).uniform(0, frame.shape, (500, 3))
        back = frame.to_voxel(frame.to_body(voxel))
        assert np.abs((back - voxel) * frame.spacing_mm).max() < 0.1


def test_a_part_of_a_chest_is_a_scan_too() -> None:
    scan = make_scan(7, (40, 64, 64), spacing_mm=(1.0, 0.7, 0.7))
    assert scan.spacing_mm == (1.0, 0.7, 0.7)
    assert scan.voxels.shape == scan.labels.shape == (40, 64, 64)
    assert scan.voxels.dtype == np.int16 and scan.labels.dtype == np.uint8


def test_negative_candidates_are_away_from_nodules(scans: list[PhantomScan]) -> None:
    for scan in scans:
        negatives = np.array([c.centre_mm for c in scan.candidates if not c.positive])
        assert len(negatives) >= 20
        for nodule in scan.nodules:
            assert (np.linalg.norm(negatives - nodule.centre_mm, axis=1) > nodule.diameter_mm / 2).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "LUNA16"
    write_luna(out, 4, 3, shape=SMALL)
    return out


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_layout_is_luna16s(folder: Path) -> None:
    headers = sorted(folder.glob("subset*/*.mhd"))
    assert [h.parent.name for h in headers] == [f"subset{k}" for k in range(4)]
    flipped = 0
    for header in headers:
        uid = header.stem
        assert uid.startswith("2.25.") and len(uid) <= 64
        image = sitk.ReadImage(str(header))
        mask = sitk.ReadImage(str(folder / "masks" / f"{uid}.mha"))
        assert image.GetSize() == mask.GetSize() == SMALL[::-1]
        assert image.GetPixelID() == sitk.sitkInt16
        np.testing.assert_allclose(image.GetOrigin(), mask.GetOrigin(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(image.GetSpacing(), mask.GetSpacing(), rtol=0, atol=1e-6)
        assert image.GetDirection() == mask.GetDirection()
        flipped += image.GetDirection()[0] == -1
    assert flipped == 1
    assert not list(folder.rglob(".*"))


def test_annotations_lead_to_the_nodules_also_in_flipped_scans(folder: Path) -> None:
    rows = table(folder / "annotations.csv")
    assert list(rows[0]) == ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"]
    directions = set()
    for row in rows:
        mask = sitk.ReadImage(str(folder / "masks" / f"{row['seriesuid']}.mha"))
        index = mask.TransformPhysicalPointToIndex([float(row[f"coord{axis}"]) for axis in "XYZ"])
        assert mask[index] == Label.NODULE
        directions.add(mask.GetDirection()[0])
    assert directions == {1.0, -1.0}


def test_candidates_are_annotations_and_others(folder: Path) -> None:
    rows = table(folder / "candidates_V2.csv")
    assert list(rows[0]) == ["seriesuid", "coordX", "coordY", "coordZ", "class"]
    positive = {tuple(row[c] for c in list(row)[:4]) for row in rows if row["class"] == "1"}
    assert positive == {tuple(row[c] for c in list(row)[:4]) for row in table(folder / "annotations.csv")}
    assert sum(row["class"] == "0" for row in rows) == 4 * 40


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_dicom_series_has_the_same_bytes_at_any_time(tmp_path: Path) -> None:
    scan, tags = make_scan(5, TINY), {"0010|0020": "P001", "0020|000d": "2.25.1", "0020|000e": "2.25.2"}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_series(tmp_path / name, scan, tags)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_bytes_do_not_depend_on_workers_or_interruption(folder: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(uid: str) -> None:
        raise Stop(uid)

    out = tmp_path / "again"
    with pytest.raises(Stop):
        write_luna(out, 4, 3, shape=SMALL, done=stop)
    assert len(list(out.glob("subset*/*.mhd"))) == 1 and not (out / "annotations.csv").exists()
    write_luna(out, 4, 3, shape=SMALL, workers=2)
    assert contents(out) == contents(folder)


def test_a_killed_command_is_completed_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(name: str) -> list[str]:
        return ["p2w.phantom", "--out", str(tmp_path / name), "--scans", "3", "--shape", "16", "32", "32"]

    command = [sys.executable, "-m", *words("killed"), "--workers", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None and killed.stdout.readline().startswith("scan 1/3")
        killed.kill()
    for name in ("killed", "whole"):
        monkeypatch.setattr(sys, "argv", words(name))
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_never_writes_into_another_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "subset0").mkdir()
    with pytest.raises(UserError, match="no phantom"):
        write_luna(tmp_path, 1, 0, shape=SMALL)
    with pytest.raises(UserError, match="another phantom"):
        write_luna(folder, 4, 4, shape=SMALL)
    with pytest.raises(UserError, match="another phantom"):
        write_luna(folder, 2, 3, shape=SMALL)  # would leave three scans that no table lists
    with pytest.raises(UserError, match="at least 16"):
        make_scan(0, (8, 96, 96))


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*shape: str) -> tuple[int | None, str, str]:
        words = ["p2w.phantom", "--out", str(tmp_path / "L"), "--scans", "1", "--shape", *shape]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not isinstance(ended.value.code, str)
        return ended.value.code, *capsys.readouterr()

    code, out, err = run("16", "32", "32")
    assert not code, err
    assert "scan 1/1" in out and (tmp_path / "L" / "annotations.csv").exists()
    code, _, err = run("9", "64", "64")
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1

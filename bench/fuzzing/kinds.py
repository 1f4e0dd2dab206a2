"""Every kind of file that p2w reads: how a valid one is made, and how the product reads it."""

import contextlib
import gzip
import io
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

SHAPE = (8, 24, 20)  # z, y, x of the scans


@dataclass(frozen=True)
class Kind:
    """`make` writes valid files; `read` reads them; `sealed` names files of which no byte may change unnoticed."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    sealed: tuple[str, ...] = ()
    expands: int = 0  # bytes that a file may unpack to, for each of its bytes


def kinds() -> dict[str, Kind]:
    """Everything that is read from a disk or a line."""
    return scan_kinds() | {
        "mask-rtstruct": Kind(
            lambda folder: make_masks(folder, "rtstruct"), lambda folder: read_masks(folder, "rtstruct")
        ),
        "mask-seg": Kind(lambda folder: make_masks(folder, "seg"), lambda folder: read_masks(folder, "seg")),
        "shard-tar": Kind(make_set("tar"), read_set, ("1.2.0000.tar", "1.2.0001.tar")),
        "shard-arrow": Kind(make_set("arrow"), read_set, ("1.2.0000.arrow", "1.2.0001.arrow")),
        "manifest": Kind(make_set("tar", only="manifest.parquet"), read_manifest, ("manifest.parquet",)),
        "manifest-unsealed": Kind(make_unsealed, read_manifest, expands=64),
        "manifest-tables": Kind(make_tables, read_tables, expands=64),
        "manifest-scans": Kind(make_scan_store, read_scan_store, expands=64),
        "tar-stream": Kind(make_set("tar", only="1.2.0000.tar"), read_tar_stream),
        "checkpoint": Kind(
            make_checkpoint, read_checkpoint, ("step-00000003/model.safetensors", "step-00000003/state.pt")
        ),
        "checkpoint-resealed": Kind(make_checkpoint, lambda folder: read_checkpoint(folder, reseal=True)),
        "safetensors": Kind(make_safetensors, read_safetensors),
        "config": Kind(make_config, read_config),
        "settings": Kind(make_settings, read_settings),
    }


SCAN_FILES = "a.mhd packed.mhd a.mha packed.mha a.nii a.nii.gz a.nrrd packed.nrrd a.nhdr".split()  # noqa: SIM905


def scan_kinds() -> dict[str, Kind]:
    """Scans, in files and in folders of DICOM."""
    files = {
        f"scan-{name}": Kind(partial(make_scan, name=name), read_scans, expands=1032) for name in SCAN_FILES
    }
    return files | {
        "scan-dicom": Kind(make_series, read_scans),
        "scan-dicom-bare": Kind(make_bare_series, read_scans),
        "scan-dicom-gzip": Kind(make_gzip_series, read_scans, expands=1032),
        "scan-list": Kind(make_listed_slices, read_scans),
        "scan-text": Kind(make_text, read_scans),
        "scan-dicom-packed": Kind(partial(make_series, compressor="JPEG2000"), read_scans, expands=1032),
        "scan-dicom-frames": Kind(make_frames, read_scans),
    }


def make_scan(folder: Path, name: str) -> None:
    """Write a scan in a file of this name."""
    from ct_files import ct, write  # noqa: PLC0415

    write(folder / name, ct(SHAPE))


def make_series(folder: Path, **options: str) -> list[Path]:
    """Write a series of DICOM, four files of a slice each, and return them."""
    from ct_files import ct, dicom  # noqa: PLC0415

    paths: list[Path] = dicom(folder / "ct", ct((4, 24, 20)), "1.2.3", **options)
    return paths


def make_bare_series(folder: Path) -> None:
    """Write a series without DICOM's preamble."""
    for path in make_series(folder):
        path.write_bytes(path.read_bytes()[132:])


def make_gzip_series(folder: Path) -> None:
    """Write a series of which each file is gzipped."""
    for path in make_series(folder):
        (folder / "ct" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def make_listed_slices(folder: Path) -> None:
    """Write a MetaImage header that lists a file for each slice."""
    from ct_files import ct, write  # noqa: PLC0415

    head = write(folder / "a.mhd", ct(SHAPE)).read_text()
    for z, image in enumerate(ct(SHAPE)):
        (folder / f"{z}.raw").write_bytes(image.tobytes())
    (folder / "a.raw").unlink()
    names = "\n".join(f"{z}.raw" for z in range(SHAPE[0]))
    (folder / "a.mhd").write_text(head.replace("a.raw", f"LIST\n{names}"))


def make_text(folder: Path) -> None:
    """Write a MetaImage whose voxels are numbers in text."""
    from ct_files import ct, write  # noqa: PLC0415

    hu = ct(SHAPE)
    path = write(folder / "a.mha", hu)
    head = path.read_bytes()[: -hu.nbytes].replace(b"BinaryData = True", b"BinaryData = False")
    path.write_bytes(head + " ".join(map(str, hu.ravel().tolist())).encode())


def make_frames(folder: Path) -> None:
    """Write an enhanced CT, all slices in one DICOM file."""
    from dicom_files import body, ct_slice, multi_frame, save  # noqa: PLC0415

    every = [ct_slice(hu, i, (-10, -20, 2.5 * i)) for i, hu in enumerate(body(4))]
    save(multi_frame(every), folder / "a.dcm")


def read_scans(folder: Path) -> None:
    """As preprocess/shard_scans.py finds, forecasts and reads."""
    from p2w.ct.discover import find_scans  # noqa: PLC0415
    from p2w.ct.orientation import BadScan  # noqa: PLC0415
    from p2w.ct.scan import read_scan  # noqa: PLC0415
    from p2w.errors import UserError  # noqa: PLC0415
    from p2w.shards.build import errors_of_readers  # noqa: PLC0415
    from p2w.shards.scan_shards import ShardingSettings, forecast_shards  # noqa: PLC0415

    found = find_scans([str(folder)], str(folder / "out"))
    forecast_shards(found.sources, ShardingSettings())
    reasons = [why for _, why in found.bad]
    for source in found.sources:
        try:
            with errors_of_readers():
                read_scan(source)
        except BadScan as error:
            reasons.append(str(error))
    if reasons:
        raise UserError("; ".join(reasons))


def make_masks(folder: Path, kind: str) -> None:
    """Write a series and a mask of it: RTSTRUCT contours, or a DICOM-SEG segment."""
    import highdicom  # noqa: PLC0415
    import pydicom  # noqa: PLC0415
    from dicom_files import body, rtstruct, save, write_series  # noqa: PLC0415

    hu = body(4)
    patient = "PatientName PatientBirthDate PatientSex StudyID StudyDate StudyTime AccessionNumber".split()  # noqa: SIM905
    tags = dict.fromkeys((*patient, "ReferringPhysicianName", "PositionReferenceIndicator"), "")
    uids = {
        "PatientID": "A",
        "StudyInstanceUID": "1.7",
        "FrameOfReferenceUID": "1.8",
        "SliceThickness": "2.5",
    }
    paths = write_series(folder / "ct", hu, **tags, **uids)
    if kind == "rtstruct":
        corners = [(0, -15), (7, -15), (7, -5), (0, -5)]
        contours = [[(x, y, 2.5 * z) for x, y in corners] for z in (1, 2)]
        save(rtstruct({"GTV": contours}), folder / "mask.dcm")
        return
    mask = np.zeros(hu.shape, np.uint8)
    mask[1:3, 5:15, 5:15] = 1
    code = highdicom.sr.CodedConcept("91723000", "SCT", "Anatomical structure")
    algorithm = highdicom.AlgorithmIdentificationSequence("hand", code, "1")
    segment = highdicom.seg.SegmentDescription(1, "GTV", code, code, "AUTOMATIC", algorithm)
    images = [pydicom.dcmread(path) for path in paths]
    made = highdicom.seg.Segmentation(
        images, mask, "BINARY", [segment], "1.9", 3, "1.9.2", 1, "maker", "model", "1", "1"
    )
    save(made, folder / "mask.dcm")


def read_masks(folder: Path, kind: str) -> None:
    """As preprocess/prepare_target.py general --images dicom finds and cuts them."""
    from p2w.errors import UserError  # noqa: PLC0415
    from p2w.shards.build import errors_of_readers  # noqa: PLC0415
    from p2w.tasks.custom import Custom  # noqa: PLC0415

    with warnings.catch_warnings():  # of pydicom and highdicom, on values that break the standard
        warnings.simplefilter("ignore")
        task = Custom(images="dicom", masks=kind)
        cases = task.find(str(folder), "")
        reasons = [why for _, why in cases.bad]
        for case in cases.cases:
            try:
                with errors_of_readers():
                    list(task.cut(case, (8, 16, 16)).samples)
            except UserError as error:
                reasons.append(str(error))
    if reasons:
        raise UserError("; ".join(reasons))


def make_set(form: str, only: str = "") -> Callable[[Path], None]:
    """A function that writes a data set of shards of this format into a folder; with `only`, of its files this one."""
    from stream_sets import write_set  # noqa: PLC0415

    def make(folder: Path) -> None:
        write_set(folder, form, train=(3,), val=(2,))
        for path in folder.iterdir():
            if only and path.name != only:
                path.unlink()

    return make


def make_unsealed(folder: Path) -> None:
    """A manifest of an earlier time, without its own checksum: all rests on the rules."""
    make_set("tar", "manifest.parquet")(folder)
    unseal(folder / "manifest.parquet", folder / "manifest.parquet")


def unseal(sealed: Path, out: Path) -> None:
    """Write a manifest without its own checksum."""
    import pyarrow.parquet as pq  # noqa: PLC0415

    table = pq.read_table(sealed)
    meta = json.loads(table.schema.metadata[b"p2w"])
    meta.pop("seal")
    pq.write_table(
        table.replace_schema_metadata({b"p2w": json.dumps(meta).encode()}), out, compression="zstd"
    )


def make_scan_store(folder: Path) -> None:
    """The manifest, without its seal, of a set that stores a whole scan."""
    from ct_files import ct, write  # noqa: PLC0415
    from cut_here import cut_here  # noqa: PLC0415

    from p2w.shards.scan_shards import ShardingSettings  # noqa: PLC0415
    from p2w.shards.tiling import Tiling  # noqa: PLC0415

    write(folder / "scans" / "a.mhd", ct((24, 40, 40)))
    with contextlib.redirect_stdout(io.StringIO()):
        cut_here(folder / "scans", folder / "set", ShardingSettings(Tiling((8, 16, 16)), store="scans"))
    unseal(folder / "set" / "manifest.parquet", folder / "manifest.parquet")
    for name in ("scans", "set"):
        shutil.rmtree(folder / name)


def read_scan_store(folder: Path) -> None:
    """Read the manifest of a set that stores scans, and make the table of its sub-scans."""
    from p2w.shards.manifest import open_manifest  # noqa: PLC0415
    from p2w.shards.manifest_schema import stores_scans  # noqa: PLC0415
    from p2w.shards.scan_store import read_scan_store as read_store  # noqa: PLC0415

    manifest = open_manifest((folder / "manifest.parquet").read_bytes())
    if stores_scans(manifest.meta):
        store = read_store(manifest)
        assert len(store.origin) == len(store.scan) == store.wholes.num_rows


def make_tables(folder: Path) -> None:
    """A manifest of version 2, whose lists are tables."""
    from p2w.shards.manifest import manifest_bytes, open_manifest  # noqa: PLC0415

    make_set("tar", "manifest.parquet")(folder)
    found = open_manifest((folder / "manifest.parquet").read_bytes())
    meta = {key: value for key, value in found.meta.items() if key != "seal"}
    meta["bad_scans"] = [{"where": "a.mhd", "why": "is cut off", "more": more} for more in (1, "two", [3])]
    (folder / "manifest.parquet").write_bytes(manifest_bytes(found.table.to_pylist(), meta, version=2))


def read_tables(folder: Path) -> None:
    """As training reads such a manifest, and every list of it; its checksum is put right, so that all rests on the rules."""
    from p2w.shards.manifest import SEAL, UNSEALED, _sealed, open_manifest  # noqa: PLC0415
    from p2w.stream.local import ShardSet  # noqa: PLC0415

    path = folder / "manifest.parquet"
    data = path.read_bytes()
    at = data.rfind(SEAL) + len(SEAL)
    if at >= len(SEAL):
        data = _sealed(data[:at] + UNSEALED + data[at + len(UNSEALED) :])
    manifest = open_manifest(data)
    shards = ShardSet(manifest, "fuzzed")
    assert len(shards.ids("train")) + len(shards.ids("val")) <= len(shards)
    assert len(manifest.keys.to_pylist()) == len(shards)
    for name in ("shards", "sources", "bad_scans"):
        assert len(list(manifest.meta.get(name, []))) == len(manifest.meta.get(name, []))


def read_manifest(folder: Path) -> None:
    """Read a manifest as training does."""
    from p2w.shards.manifest import open_manifest  # noqa: PLC0415
    from p2w.stream.local import ShardSet  # noqa: PLC0415

    shards = ShardSet(open_manifest((folder / "manifest.parquet").read_bytes()), "fuzzed")
    assert len(shards.ids("train")) + len(shards.ids("val")) <= len(shards)


def read_set(folder: Path) -> None:
    """p2w verify, and every sub-scan as training reads it."""
    from p2w.errors import UserError  # noqa: PLC0415
    from p2w.shards import verify  # noqa: PLC0415
    from p2w.shards.manifest import open_manifest  # noqa: PLC0415
    from p2w.stream.stream import open_set  # noqa: PLC0415

    with contextlib.redirect_stdout(io.StringIO()):
        manifest = open_manifest(folder)
        faults = [verify.verify_shard(manifest, shard) for shard in manifest.meta["shards"]]
    lines = [fault.line(str(folder)) for fault in faults if fault]
    try:
        shards = open_set(str(folder))
        for sub_scan in range(len(shards)):
            shards.read_into(sub_scan, np.empty(shards.shape, np.int16))
    except UserError as error:
        assert lines, f"training found what verify did not: {error}"
    if lines:
        raise UserError(lines[0])


def read_tar_stream(folder: Path) -> None:
    """A remote shard, from a file in the place of curl."""
    from stream_sets import write_set  # noqa: PLC0415

    from p2w.shards.manifest import open_manifest  # noqa: PLC0415
    from p2w.stream import tar  # noqa: PLC0415

    tar._PAUSE, tar.logging.disable = 0.0, tar.logging.disable
    with tempfile.TemporaryDirectory() as sound:
        write_set(Path(sound), "tar", train=(3,), val=(2,))
        shards = tar.TarSet(open_manifest(sound), "http://nowhere")

    @contextlib.contextmanager
    def opened(url: str):
        with open(folder / "1.2.0000.tar", "rb") as file:
            yield file

    before, tar.open_stream = tar.open_stream, opened
    try:
        for sub_scan in range(3):
            shards.read_into(sub_scan, np.empty(shards.shape, np.int16))
    finally:
        tar.open_stream = before


def make_checkpoint(folder: Path) -> None:
    """Write a small checkpoint, step 3."""
    import torch  # noqa: PLC0415

    from p2w.train.checkpoint import Checkpoints, Snapshot  # noqa: PLC0415

    model = {"a.weight": torch.ones(3, 5), "a.bias": torch.zeros(3)}
    state = {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "skipped": 0, "schedule": {"bad": 1}}
    Checkpoints(folder).save(Snapshot(3, model, state, 0.5))


def read_checkpoint(folder: Path, reseal: bool = False) -> None:
    """Read the checkpoint as a resumed run does; with `reseal`, after its checksums were made to fit the damage."""
    from p2w.train import checkpoint  # noqa: PLC0415

    if reseal:  # what someone writes who knows how
        meta = folder / "step-00000003" / "meta.json"
        with contextlib.suppress(ValueError, LookupError, TypeError, OSError):
            told = json.loads(meta.read_text())
            told["crc32c"] = {name: checkpoint._checksum(meta.parent / name) for name in checkpoint.FILES}
            meta.write_bytes(checkpoint.seal(told))
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.best()
    checkpoints.load(3)


def make_safetensors(folder: Path) -> None:
    """Write a file of two tensors."""
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file({"encoder.a": torch.ones(3, 5), "decoder.b": torch.zeros(7)}, folder / "model.safetensors")


def read_safetensors(folder: Path) -> None:
    """Weights as checkpoints and their users read them."""
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    from p2w.errors import UserError  # noqa: PLC0415

    try:
        load_file(folder / "model.safetensors")
    except (SafetensorError, ValueError) as error:
        raise UserError("no weights") from error


def make_config(folder: Path) -> None:
    """Write the config.json of a run with every default."""
    from p2w.config import Config, config_to_json  # noqa: PLC0415

    (folder / "config.json").write_text(config_to_json(Config()))


def read_config(folder: Path) -> None:
    """Read the config.json as training does."""
    from p2w import config  # noqa: PLC0415

    config.flatten(config.read_config(folder / "config.json"))


def make_settings(folder: Path) -> None:
    """Write a folder of shards that is being cut, with its settings and records."""
    from ct_files import ct, write  # noqa: PLC0415

    from p2w.ct.discover import find_scans  # noqa: PLC0415
    from p2w.shards.build import cut_source  # noqa: PLC0415
    from p2w.shards.build_folder import JobShare  # noqa: PLC0415
    from p2w.shards.scan_shards import ScanFolder, ShardingSettings  # noqa: PLC0415
    from p2w.shards.tiling import Tiling  # noqa: PLC0415

    write(folder / "scans" / "a.mha", ct((16, 16, 16)))
    out = ScanFolder(str(folder / "set"), ShardingSettings(Tiling((8, 8, 8), 0, 0.0)))
    with out.share_lock(JobShare()):
        out.prepare(JobShare())
        for source in find_scans([str(folder / "scans")], "").sources:
            cut_source(source, out, JobShare())


def read_settings(folder: Path) -> None:
    """settings.json and scans/*.json, as a run that goes on reads them, and the merge."""
    from p2w.ct.discover import find_scans  # noqa: PLC0415
    from p2w.shards.build import merge_records, unfinished_sources  # noqa: PLC0415
    from p2w.shards.build_folder import JobShare  # noqa: PLC0415
    from p2w.shards.scan_shards import ScanFolder, ShardingSettings  # noqa: PLC0415
    from p2w.shards.tiling import Tiling  # noqa: PLC0415

    out = ScanFolder(str(folder / "set"), ShardingSettings(Tiling((8, 8, 8), 0, 0.0)))
    found = find_scans([str(folder / "scans")], str(folder / "set"))
    with out.share_lock(JobShare()):
        out.prepare(JobShare())
        out.refuse_other_sources(found.sources, found.bad)
        for source in found.sources:
            out.finished(source)
    with out.merge_lock():
        if not unfinished_sources(found, out):
            merge_records(found, out)

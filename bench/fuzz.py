"""Do the readers survive whatever bytes they are given?

    python bench/fuzz.py --minutes 10            # results/fuzz.json; goes on behind the last run's cases, tries its
                                                 # findings again first and lists those that are none any more as fixed
    python bench/fuzz.py --seconds 5 --out X     # a slice, as the tests take it
    python bench/fuzz.py --case shard-tar 1234   # one case again, in this process

Valid files of every kind are mutated, by bytes (flips, cuts, runs, insertions, numbers at the limits) and by structure
(header fields, JSON values), and read as the product reads them. A case is a function of (kind, number). It must end
`read` or `refused` (a UserError of one line) within 20 s, in memory below 2 x the files + what they may unpack to +
320 MiB. Anything else is a finding: another exception, a crash or a hang (a worker process is watched), memory, or a
change that a checksum should have found.
"""

import contextlib
import io
import json
import os
import platform
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "tests" / "data")]

RESULT = Path(__file__).parent / "results" / "fuzz.json"
SHAPE = (8, 24, 20)  # z, y, x of the scans
HANG_S, SLACK = 20.0, 320 << 20
LIMITS = [0, 1, -1, 127, 255, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, -(2**63), 10**30]
WORDS = [
    "",
    "0",
    "-1",
    "nan",
    "inf",
    "1e999",
    "..",
    "/",
    "../../x",
    "[]",
    "{}",
    "null",
    "true",
    "9" * 40,
    "NaN",
    "%d",
    "LIST",
]


@dataclass(frozen=True)
class Kind:
    """`make` writes valid files; `read` reads them; `sealed` names files of which no byte may change unnoticed."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    sealed: tuple[str, ...] = ()
    expands: int = 0  # bytes that a file may unpack to, for each of its bytes


def kinds() -> dict[str, Kind]:
    """Everything that is read from a disk or a line."""
    from ct_files import ct, dicom, write  # noqa: PLC0415

    def scan(name: str) -> Callable[[Path], None]:
        return lambda folder: write(folder / name, ct(SHAPE)) and None

    def series(folder: Path) -> None:
        dicom(folder / "ct", ct((4, 24, 20)), "1.2.3")

    def packed_series(folder: Path) -> None:
        dicom(folder / "ct", ct((4, 24, 20)), "1.2.3", compressor="JPEG2000")

    names = (
        "a.mhd",
        "packed.mhd",
        "a.mha",
        "packed.mha",
        "a.nii",
        "a.nii.gz",
        "a.nrrd",
        "packed.nrrd",
        "a.nhdr",
    )
    table = {f"scan-{name}": Kind(scan(name), read_scans, expands=1032) for name in names}
    return table | {
        "scan-dicom": Kind(series, read_scans),
        "scan-dicom-packed": Kind(packed_series, read_scans, expands=1032),
        "shard-tar": Kind(make_set("tar"), read_set, ("1.2.0000.tar", "1.2.0001.tar")),
        "shard-arrow": Kind(make_set("arrow"), read_set, ("1.2.0000.arrow", "1.2.0001.arrow")),
        "manifest": Kind(make_set("tar", only="manifest.parquet"), read_manifest, ("manifest.parquet",)),
        "manifest-unsealed": Kind(make_unsealed, read_manifest, expands=64),
        "tar-stream": Kind(make_set("tar", only="1.2.0000.tar"), read_tar_stream),
        "checkpoint": Kind(
            make_checkpoint, read_checkpoint, ("step-00000003/model.safetensors", "step-00000003/state.pt")
        ),
        "checkpoint-resealed": Kind(make_checkpoint, lambda folder: read_checkpoint(folder, reseal=True)),
        "safetensors": Kind(make_safetensors, read_safetensors),
        "config": Kind(make_config, read_config),
        "settings": Kind(make_settings, read_settings),
    }


def read_scans(folder: Path) -> None:
    """As preprocess/shard_scans.py finds, forecasts and reads."""
    from p2w.data.cut import _read  # noqa: PLC0415
    from p2w.data.find import find_scans  # noqa: PLC0415
    from p2w.data.folder import Settings  # noqa: PLC0415
    from p2w.data.grid import BadScan  # noqa: PLC0415
    from p2w.data.run import forecast  # noqa: PLC0415
    from p2w.errors import UserError  # noqa: PLC0415

    found = find_scans([str(folder)], str(folder / "out"))
    forecast(found.sources, Settings())
    reasons = [why for _, why in found.bad]
    for source in found.sources:
        try:
            _read(source)
        except BadScan as error:
            reasons.append(str(error))
    if reasons:
        raise UserError("; ".join(reasons))


def make_set(form: str, only: str = "") -> Callable[[Path], None]:
    from stream_sets import write_set  # noqa: PLC0415

    def make(folder: Path) -> None:
        write_set(folder, form, train=(3,), val=(2,))
        for path in folder.iterdir():
            if only and path.name != only:
                path.unlink()

    return make


def make_unsealed(folder: Path) -> None:
    """A manifest of an earlier time, without its own checksum: all rests on the rules."""
    import pyarrow.parquet as pq  # noqa: PLC0415

    make_set("tar", "manifest.parquet")(folder)
    table = pq.read_table(folder / "manifest.parquet")
    meta = json.loads(table.schema.metadata[b"p2w"])
    meta.pop("seal")
    table = table.replace_schema_metadata({b"p2w": json.dumps(meta).encode()})
    pq.write_table(table, folder / "manifest.parquet", compression="zstd")


def read_manifest(folder: Path) -> None:
    from p2w.data.local import ShardSet  # noqa: PLC0415
    from p2w.data.manifest import open_manifest  # noqa: PLC0415

    shards = ShardSet(open_manifest((folder / "manifest.parquet").read_bytes()), "fuzzed")
    assert len(shards.ids("train")) + len(shards.ids("val")) <= len(shards)


def read_set(folder: Path) -> None:
    """p2w verify, and every sub-scan as training reads it."""
    from p2w.data import verify  # noqa: PLC0415
    from p2w.data.manifest import open_manifest  # noqa: PLC0415
    from p2w.data.stream import open_set  # noqa: PLC0415
    from p2w.errors import UserError  # noqa: PLC0415

    with contextlib.redirect_stdout(io.StringIO()):
        manifest = open_manifest(folder)
        faults = [verify.check_shard(manifest, shard) for shard in manifest.meta["shards"]]
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

    from p2w.data import remote  # noqa: PLC0415
    from p2w.data.manifest import open_manifest  # noqa: PLC0415

    remote._PAUSE, remote.logging.disable = 0.0, remote.logging.disable
    with tempfile.TemporaryDirectory() as sound:
        write_set(Path(sound), "tar", train=(3,), val=(2,))
        shards = remote.RemoteSet(open_manifest(sound), "http://nowhere")

    @contextlib.contextmanager
    def opened(url: str):
        with open(folder / "1.2.0000.tar", "rb") as file:
            yield file

    before, remote._opened = remote._opened, opened
    try:
        for sub_scan in range(3):
            shards.read_into(sub_scan, np.empty(shards.shape, np.int16))
    finally:
        remote._opened = before


def make_checkpoint(folder: Path) -> None:
    import torch  # noqa: PLC0415

    from p2w.train.checkpoint import Checkpoints, Snapshot  # noqa: PLC0415

    model = {"a.weight": torch.ones(3, 5), "a.bias": torch.zeros(3)}
    state = {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "skipped": 0, "schedule": {"bad": 1}}
    Checkpoints(folder).save(Snapshot(3, model, state, 0.5))


def read_checkpoint(folder: Path, reseal: bool = False) -> None:
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
    from p2w.config import Config, to_json  # noqa: PLC0415

    (folder / "config.json").write_text(to_json(Config()))


def read_config(folder: Path) -> None:
    from p2w import config  # noqa: PLC0415

    config.flatten(config.read(folder / "config.json"))


def make_settings(folder: Path) -> None:
    from ct_files import ct, write  # noqa: PLC0415

    from p2w.data.cut import cut_scan  # noqa: PLC0415
    from p2w.data.find import find_scans  # noqa: PLC0415
    from p2w.data.folder import Folder, Settings, Share  # noqa: PLC0415
    from p2w.data.subscan import Tiling  # noqa: PLC0415

    write(folder / "scans" / "a.mha", ct((16, 16, 16)))
    out = Folder(str(folder / "set"), Settings(Tiling((8, 8, 8), 0, 0.0)))
    with out.share_lock(Share()):
        out.prepare(Share())
        for source in find_scans([str(folder / "scans")], "").sources:
            cut_scan(source, out, Share())


def read_settings(folder: Path) -> None:
    """settings.json and scans/*.json, as a run that goes on reads them, and the merge."""
    from p2w.data.find import find_scans  # noqa: PLC0415
    from p2w.data.folder import Folder, Settings, Share  # noqa: PLC0415
    from p2w.data.merge import merge, unfinished  # noqa: PLC0415
    from p2w.data.subscan import Tiling  # noqa: PLC0415

    out = Folder(str(folder / "set"), Settings(Tiling((8, 8, 8), 0, 0.0)))
    found = find_scans([str(folder / "scans")], str(folder / "set"))
    with out.share_lock(Share()):
        out.prepare(Share())
        out.check_strangers(found.sources, found.bad)
        for source in found.sources:
            out.finished(source)
    with out.merge_lock():
        if not unfinished(found, out):
            merge(found, out)


def mutate(rng: np.random.Generator, folder: Path, kind: str) -> set[str]:
    """Change one or two files in place; names of those changed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if kind == "settings":
        files = [path for path in files if path.suffix == ".json"]
    changed = set()
    for _ in range(1 + int(rng.random() < 0.2)):
        path = files[rng.integers(len(files))]
        data = path.read_bytes()
        new = _structure(rng, data) if rng.random() < 0.5 else _bytes(rng, data)
        if new != data:
            path.write_bytes(new)
            changed.add(str(path.relative_to(folder)))
    return changed


def _bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """A change that knows nothing of what the bytes mean."""
    out = bytearray(data)
    early = rng.random() < 0.6  # headers stand at the beginning, footers at the end
    for _ in range(int(rng.integers(1, 5))):
        near = min(len(out), 400) if early else len(out)
        at = int(rng.integers(max(1, near)))
        if not early and rng.random() < 0.3:
            at = max(0, len(out) - 1 - int(rng.integers(1, 400)))
        way, count = int(rng.integers(6)), int(2 ** rng.uniform(0, 9))
        if way == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << int(rng.integers(8))
        elif way == 1:
            del out[at:]
        elif way == 2:
            out[at : at + count] = bytes([int(rng.integers(256))]) * count
        elif way == 3:
            out[at:at] = rng.bytes(count)
        elif way == 4:
            del out[at : at + count]
        else:
            number = LIMITS[rng.integers(len(LIMITS))] % 2**64
            size = int(rng.choice([2, 4, 8]))
            out[at : at + size] = number.to_bytes(8, "little")[:size][:: int(rng.choice([1, -1]))]
    return bytes(out)


def _structure(rng: np.random.Generator, data: bytes) -> bytes:
    """Another value in the place of a JSON value, of a number in a text header, or of a word."""
    with contextlib.suppress(ValueError):
        tree = json.loads(data)
        places = list(_places(tree))
        holder, key = places[rng.integers(len(places))]
        values = [*LIMITS, *WORDS, [], {}, None, True, 1.5, [[1]], {"a": 1}, "x" * 1000]
        holder[key] = values[rng.integers(len(values))]
        return json.dumps(tree).encode()
    import re  # noqa: PLC0415

    spots = list(re.finditer(rb"-?\d+(\.\d+)?|[A-Za-z]{3,}", data[:4096]))
    if not spots:
        return _bytes(rng, data)
    spot = spots[rng.integers(len(spots))]
    words = [str(number) for number in LIMITS] + WORDS
    return data[: spot.start()] + words[rng.integers(len(words))].encode() + data[spot.end() :]


def _places(tree: object):
    """Every (container, key) of a JSON tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield tree, key
        yield from _places(value)


def peak_memory(reset: bool = False) -> int:
    """Highest resident memory of this process since the last reset, bytes (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def one(kind: str, number: int, table: dict[str, Kind], valid: Path) -> tuple[str, str]:
    """Outcome of a case, and what it said."""
    from p2w.errors import UserError  # noqa: PLC0415

    entry = table[kind]
    rng = np.random.default_rng([number, *kind.encode()])
    with tempfile.TemporaryDirectory(dir=valid.parent) as work:
        folder = Path(work) / "case"
        shutil.copytree(valid / kind, folder)
        changed = mutate(rng, folder, kind)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        before = peak_memory(reset=True)
        said, outcome = "", "read"
        try:
            entry.read(folder)
        except UserError as error:
            said, outcome = str(error), "refused" if "\n" not in str(error) else "more than a line"
        except Exception as error:
            said, outcome = f"{type(error).__name__}: {error}", "exception"
        memory = peak_memory() - before
    if memory > 2 * size * (1 + entry.expands) + SLACK:
        return "memory", f"{memory >> 20} MiB for files of {size:,} bytes; {said}"
    if outcome == "read" and changed & set(entry.sealed):
        return "unnoticed", f"{changed} changed"
    return outcome, said


def work(valid: Path) -> None:
    """A worker: `KIND NUMBER` in, an outcome out."""
    import resource  # noqa: PLC0415

    from p2w.data.scan import quiet  # noqa: PLC0415

    quiet(1)
    table = kinds()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    for kind in table:  # imports, and every reader reads what is valid
        table[kind].read(shutil.copytree(valid / kind, valid / "warm" / kind))
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        kind, number = line.split()
        print(json.dumps(one(kind, int(number), table, valid)), file=answers)


class Worker:
    """A process that may crash, hang or starve."""

    def __init__(self, valid: Path) -> None:
        shutil.rmtree(valid / "warm", ignore_errors=True)
        command = [sys.executable, __file__, "--worker", str(valid)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._answer(120) != "ready":
            raise SystemExit("a reader does not read what is valid")

    def _answer(self, seconds: float) -> object:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.process.kill()
            return ["hang", f"no answer in {seconds:.0f} s"]
        line = self.process.stdout.readline()
        return json.loads(line) if line else ["crash", f"exit code {self.process.wait()}"]

    def ask(self, kind: str, number: int) -> tuple[str, str]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kind} {number}\n")
        self.process.stdin.flush()
        outcome, said = self._answer(HANG_S)  # type: ignore[misc]
        return outcome, said


@dataclass(frozen=True)
class Options:
    """Do the readers survive whatever bytes they are given?"""

    minutes: float = 10.0
    seconds: float = 0.0
    """Instead of minutes."""
    out: Path = RESULT
    only: tuple[str, ...] = ()
    """Kinds to fuzz; all."""
    case: tuple[str, ...] = ()
    """KIND NUMBER: do this one and say what came."""
    worker: Path | None = None
    """For the program's own use."""


def main() -> int:
    """Fuzz, one case of each kind after the other."""
    options = tyro.cli(Options, description=__doc__)
    if options.worker:
        work(options.worker)
        return 0
    table = kinds()
    with tempfile.TemporaryDirectory() as root:
        valid = Path(root) / "valid"
        for kind, entry in table.items():
            (valid / kind).mkdir(parents=True)
            entry.make(valid / kind)
        if options.case:
            print(*one(options.case[0], int(options.case[1]), table, valid))
            return 0
        return fuzz(options, options.only or tuple(table), valid)


def fuzz(options: Options, names: tuple[str, ...], valid: Path) -> int:
    """Until the time is over; the exit code is 1 when there is a finding."""
    result = json.loads(options.out.read_text()) if options.out.exists() else {"cases": 0, "seconds": 0.0}
    counts = {kind: Counter(result.get("outcomes", {}).get(kind, {})) for kind in names}
    findings, number = result.get("findings", []), result["cases"]
    fixed, worker = result.get("fixed", []), Worker(valid)
    for finding in list(findings):  # of earlier runs: what has become of them
        if worker.ask(finding["kind"], finding["number"])[0] in ("read", "refused"):
            findings.remove(finding)
            fixed.append(finding)
        if worker.process.poll() is not None:
            worker = Worker(valid)
    began = said_at = time.monotonic()
    limit = options.seconds or options.minutes * 60
    while time.monotonic() - began < limit:
        kind = names[number % len(names)]
        outcome, said = worker.ask(kind, number)
        counts[kind][outcome] += 1
        if outcome not in ("read", "refused"):
            findings.append({"kind": kind, "number": number, "outcome": outcome, "said": said[:300]})
            print(f"finding: {kind} {number}: {outcome}: {said[:300]}", flush=True)
        if worker.process.poll() is not None or outcome in ("hang", "crash"):
            worker = Worker(valid)
        number += 1
        if time.monotonic() - said_at > 10:
            said_at = time.monotonic()
            rate = (number - result["cases"]) / (said_at - began)
            print(
                f"{number} cases, {rate:.0f}/s, {len(findings)} findings, {limit - said_at + began:.0f} s left",
                flush=True,
            )
    worker.process.kill()
    seconds = result["seconds"] + time.monotonic() - began
    record = {
        "cases": number, "seconds": round(seconds, 1), "findings": findings, "fixed": fixed,
        "outcomes": {kind: dict(sorted(counts[kind].items())) for kind in names},
        "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "system": platform.platform()},
    }  # fmt: skip
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{number} cases in {seconds:.0f} s, {len(findings)} findings: {options.out}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

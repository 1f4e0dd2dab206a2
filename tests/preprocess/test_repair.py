"""`p2w verify --repair` on sets that the commands cut from real files."""

import os
import shutil
import sys

import processes
from ct_files import KEEP_ALL, SCANS, ct, dicom, write


def verify(*argv, **env):
    """Exit code and output of `p2w verify`."""
    done = processes.run(
        [sys.executable, "-m", "p2w", "verify", *map(str, argv)],
        capture_output=True, text=True, timeout=120, env={**os.environ, **env},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_damaged_shards_are_cut_again_from_luna16(command, luna, whole, tmp_path):
    out = tmp_path / "a set"
    shutil.copytree(whole, out)
    names = [f"{uid}.tar" for uid in sorted(SCANS)]
    flip(out / names[0], 1_000_000)
    os.truncate(out / names[1], 777)
    (out / names[2]).unlink()
    flip(out / names[3], 3)
    code, said = verify(out)
    assert code == 1 and f"p2w verify '{out}' --repair --luna FOLDER" in said
    code, said = verify(out, "--repair", "--luna", luna, "--workers", 1)
    assert (
        code == 0 and "4 of 4 damaged shards are repaired" in said and said.count("as in the manifest") == 4
    )
    assert command.contents(out) == command.contents(whole)
    assert verify(out)[0] == 0


def test_a_scan_that_is_gone_or_has_changed_is_one_line_and_nothing_is_lost(luna, whole, tmp_path):
    out, scans = tmp_path / "set", tmp_path / "luna"
    shutil.copytree(whole, out)
    shutil.copytree(luna, scans)
    first, second, third = (next(scans.glob(f"*/{uid}.mhd")) for uid in ("1.3.1", "1.3.2", "1.3.3"))
    before = {}
    for uid in ("1.3.1", "1.3.2", "1.3.3"):
        flip(out / f"{uid}.tar", 600)
        before[uid] = (out / f"{uid}.tar").read_bytes()
    first.unlink()
    write(second, ct((64, 128, 140), 99))
    third.with_suffix(".raw").write_bytes(b"short")
    code, said = verify(out, "--repair", "--luna", scans, "--workers", 1)
    lines = [line for line in said.splitlines() if line.startswith("not repaired")]
    assert code == 1 and len(lines) == 3 and "0 of 3" in said
    assert any("subset0/1.3.1.mhd is not below" in line for line in lines)
    assert any("subset0/1.3.2.mhd has changed since it was cut" in line for line in lines)
    assert any(
        ("subset1/1.3.3.mhd" in line and "wrong size" in line) or "truncated" in line for line in lines
    )
    for uid, data in before.items():
        assert (out / f"{uid}.tar").read_bytes() == data
    assert not (out / ".repair").exists() and not (out / ".run").exists()
    code, said = verify(out, "--repair", "--luna", tmp_path / "nowhere")
    assert code == 2 and "no such folder" in said


def test_damaged_arrow_shards_are_cut_again_from_any_folder(command, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "set"
    write(scans / "one" / "a.nii.gz", ct((64, 128, 128), 1))
    dicom(scans / "two", ct((70, 128, 128), 2), "1.2.3", skip=(67,))
    options = ("--scans", scans, "--out", out, "--format", "arrow", "--allow-gaps", *KEEP_ALL)
    assert command.call("shard_scans", *options)[0] == 0
    whole = command.contents(out)
    for path in out.glob("*.arrow"):
        flip(path, path.stat().st_size - 20)
    code, said = verify(out)
    assert code == 1 and "2 shards are damaged" in said and "--scans FOLDER" in said
    code, said = verify(out, "--repair", "--scans", scans, "--workers", 1)
    assert code == 0, said
    assert command.contents(out) == whole

"""Scans are found whatever the names and links in a folder."""

import errno
import os

import pytest
from ct_files import ct, write

from p2w.ct.discover import find_luna, find_scans, parse_subsets
from p2w.ct.scan_folders import walk
from p2w.errors import UserError

SHAPE = (9, 16, 12)


def find(*roots, **options):
    return find_scans([str(root) for root in roots], "/no/such/out", **options)


def test_names_links_and_hidden_files(tmp_path):
    root = tmp_path / "my scans"
    write(root / "patient 1" / "胸部 CT.nii.gz", ct(SHAPE))
    write(root / "patient 1" / "腹部 CT.nii.gz", ct(SHAPE))
    write(root / "plain" / "a.b.mha", ct(SHAPE))
    write(root / ".hidden" / "c.mha", ct(SHAPE))
    (root / "loop").symlink_to(root)
    (root / "broken.mha").symlink_to(root / "nowhere.mha")
    (tmp_path / "link").symlink_to(root)
    for start in (root, tmp_path / "link"):
        found = find(start)
        uids = [source.uid for source in found.sources]
        assert found.bad == [("broken.mha", "a link to a file that is not there")]
        assert len(set(uids)) == 3 and "plain_a.b" in uids
        assert found.passed_over["hidden files and folders (names that begin with a dot)"] == 1
        assert all(uid.isascii() and " " not in uid and "/" not in uid for uid in uids)


def test_invalid_file_names_and_special_files(tmp_path):
    write(tmp_path / "ok.mha", ct(SHAPE))
    write(tmp_path / "two\nlines.mha", ct(SHAPE))
    write(tmp_path / "raw.mha", ct(SHAPE)).rename(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.mha"))
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "folder.mha").mkdir()
    found = find(tmp_path, tmp_path)  # and a folder given twice is read once
    assert [source.name for source in found.sources] == ["ok.mha", "two\\nlines.mha"]
    assert found.bad == [("b\\udcff.mha", "its path is not UTF-8, which ITK cannot open: rename it")]
    assert found.not_images == 1
    with pytest.raises(UserError, match="shards get a folder of their own"):
        find_scans([str(tmp_path)], str(tmp_path))


def test_equal_uids_are_named(tmp_path):
    write(tmp_path / "a.nii.gz", ct(SHAPE))
    write(tmp_path / "a.mha", ct(SHAPE))
    found = find(tmp_path)
    assert [source.name for source in found.sources] == ["a.mha"]
    assert found.bad == [("a.nii.gz", "has the same uid as a.mha, which is cut: rename or remove one")]


def test_several_roots_and_exclude(tmp_path):
    for name in ("one/ct.nii.gz", "two/ct.nii.gz", "two/ct_mask.nii.gz"):
        write(tmp_path / name, ct(SHAPE))
    found = find(tmp_path / "one", tmp_path / "two", exclude=("*_mask*",))
    assert [source.uid for source in found.sources] == ["one_ct", "two_ct"]


def test_roots_of_one_name_are_two_sets_of_scans(tmp_path):
    for site in ("siteA", "siteB"):
        write(tmp_path / site / "ct" / "scan1.nii.gz", ct(SHAPE))
    found = find(tmp_path / "siteA" / "ct", tmp_path / "siteB" / "ct")
    assert [source.uid for source in found.sources] == ["siteA_ct_scan1", "siteB_ct_scan1"] and not found.bad


def test_every_file_is_accounted_for(tmp_path):
    write(tmp_path / "a.mhd", ct(SHAPE))
    write(tmp_path / "b.nii.gz", ct(SHAPE))
    for name in (
        "notes.txt",
        "c.raw",
        "study.zip",
        "pair.hdr",
        "pair.img",
        "x.tar.gz",
        "p.png",
        "what",
        "v.npy",
    ):
        (tmp_path / name).write_bytes(b"something else" * 20)
    found = find(tmp_path, exclude=("*.npy",))
    assert found.files == 12 and found.bad == []
    assert found.passed_over == {
        "Analyze or NIfTI pairs (.hdr, .img): convert them to .nii": 2,
        "archives: unpack them": 1,
        "excluded (--exclude)": 1,
        "files that are no images": 1,
        "packed files: unpack them": 1,
        "pictures": 1,
        "tables, notes and programs": 1,
        "voxels without a header (.raw)": 1,  # a.raw belongs to a.mhd
    }
    assert found.table()[:2] == ["files seen     12", "  read         3 files of 2 scans"]
    assert len(found.table()) == 10


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Root can read every folder, so the system's refusal is played."""
    write(tmp_path / "a.mha", ct((8, 16, 16)))
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_scans([str(tmp_path)], "")
    assert len(found.sources) == 1
    assert found.bad == [("locked", "the folder cannot be read (Permission denied), nor what is in it")]
    with pytest.raises(UserError, match="locked: the folder cannot be read"):
        list(walk(str(tmp_path), ""))


def test_nested_roots_give_no_scan_twice(tmp_path):
    """Two names of one scan would be two scans for the split, perhaps one in training and one in validation."""
    top = tmp_path / "D"
    for name in ("a/one.mha", "a/deep/two.mha", "three.mha", ".kept/four.mha"):
        write(top / name, ct(SHAPE))
    alone = [(source.uid, source.files) for source in find(top).sources]
    for roots in ((top, top / "a"), (top / "a", top), (top / "a" / "deep", top, top / "a")):
        assert [(source.uid, source.files) for source in find(*roots).sources] == alone
    found = find(top, top / ".kept")  # hidden: not looked into from above
    names = {".kept/four.mha", "D/a/deep/two.mha", "D/a/one.mha", "D/three.mha"}
    assert {source.name for source in found.sources} == names
    found = find_scans(
        [str(top), str(top / "a" / "deep")], str(top / "a")
    )  # below --out: not looked into from above
    assert {source.name for source in found.sources} == {"D/three.mha", "deep/two.mha"}


def test_a_file_with_two_names_is_one_scan(tmp_path):
    """Links to a file, in one root or in two, and a folder that two roots reach by links."""
    write(tmp_path / "store" / "scan.mha", ct(SHAPE))
    for name in ("one/a.mha", "one/b.mha", "two/a.mha"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "store" / "scan.mha")
    (tmp_path / "two" / "store").symlink_to(tmp_path / "store")
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "store").symlink_to(tmp_path / "store")
    found = find(tmp_path / "one", tmp_path / "two", tmp_path / "three")
    assert [source.name for source in found.sources] == ["one/a.mha"]
    again = ["one/b.mha", "two/a.mha", "two/store/scan.mha"]
    assert found.left_out == [(name, "the same file as one/a.mha") for name in again]


def test_out_inside_scans_is_not_read(tmp_path):
    write(tmp_path / "a.mha", ct(SHAPE))
    write(tmp_path / "out" / "b.mha", ct(SHAPE))
    found = find_scans([str(tmp_path)], str(tmp_path / "out"))
    assert [source.uid for source in found.sources] == ["a"]


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"no MetaImage, NIfTI, NRRD or DICOM there \(1 other files\)"):
        find(tmp_path)
    with pytest.raises(UserError, match=r"no such folder.*--scans DIR"):
        find(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "subsets"),
    [("0-6", [0, 1, 2, 3, 4, 5, 6]), ("0,2,5-6", [0, 2, 5, 6]), (" 3 , 1 ", [1, 3]), ("9", [9])],
)
def test_subsets(text, subsets):
    assert parse_subsets(text) == subsets


@pytest.mark.parametrize("text", ["", "a", "6-0", "10", "0-", "0;1", "-1"])
def test_wrong_subsets(text):
    with pytest.raises(UserError, match="--subsets"):
        parse_subsets(text)


def test_luna_layout(tmp_path):
    write(tmp_path / "subset0" / "1.3.6.mhd", ct(SHAPE))
    write(tmp_path / "subset2" / "1.3.7.mhd", ct(SHAPE))
    write(tmp_path / "subset2" / "1.3.6.mhd", ct(SHAPE))
    found, missing = find_luna(str(tmp_path), [0, 1, 2])
    assert [(source.uid, source.subset) for source in found.sources] == [("1.3.6", 0), ("1.3.7", 2)]
    assert missing == [1]
    assert found.bad == [
        ("subset2/1.3.6.mhd", "has the same uid as subset0/1.3.6.mhd, which is cut: rename or remove one")
    ]
    with pytest.raises(UserError, match=r"no subset\*/UID\.mhd there for subsets 5"):
        find_luna(str(tmp_path), [5])
    with pytest.raises(UserError, match=r"no such folder.*--luna DIR"):
        find_luna(str(tmp_path / "none"), [5])

"""What an export tells of the data set: no absolute path, and enough for the leak check without the set."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from ct_sets import write_structured_set
from target_sets import write_target_set

import p2w
from p2w.ct.dicom import salted_hash
from p2w.errors import UserError
from p2w.finetune.init import init_leak, resolve_init
from p2w.shards import training_scans
from p2w.shards.grouping import identity_in_set
from p2w.shards.manifest import data_fingerprint, manifest_bytes, open_manifest
from p2w.shards.privacy import suspects
from p2w.stream.stream import open_set
from p2w.tasks.leak import check_shards
from p2w.tasks.reader import open_target
from p2w.weights import export, load, prepare_nnunet
from p2w.weights.card import command_without_paths, portable_shards
from p2w.weights.hub import HubName

SALT = "00ff"


def write_pretraining_set(folder, *scans, **split):
    """A set that trains on scans (uid, bytes of the file, patient); `split` goes into the manifest's entry of that name."""
    write_structured_set(folder, train=1, val=1, per=2)
    geometry = {
        "shape": [1] * 3, "spacing_mm": [1.0] * 3, "origin_xyz_mm": [0.0] * 3, "direction_xyz": [1.0] * 9,
    }  # fmt: skip
    sources = []
    for uid, nbytes, patient in scans:
        told = {
            "uid": uid,
            "file": "a.nii",
            "nbytes": nbytes,
            "checksum": "00000000",
            "subset": -1,
            "left_out": 0,
        }
        hashed = {"patient": identity_in_set(salted_hash(patient, ""), SALT)} if patient else {}
        sources.append(told | geometry | hashed)
    manifest = open_manifest(folder)
    meta = manifest.meta | {"sources": sources}
    meta["split"] = {"rule": "scan", "train_scans": [one[0] for one in scans], "salt": SALT} | split
    (folder / "manifest.parquet").write_bytes(manifest_bytes(manifest.table.to_pylist(), meta))
    return folder


OTHER = ("other", 2, "patient0")  # no scan that is tested on, and a patient who is trained on
UNSEEN = [OTHER, ("another", 3, "")]


@pytest.fixture
def project(trained_run, tmp_path):
    """A folder with a run that was started with absolute paths; give it the sets, get the exported weights."""
    root = tmp_path / "project"

    def made(*parts, to="safetensors", out=None, of=trained_run, **split):
        """`parts`: the scans of each set; more than one set are a mixture."""
        folders = [
            write_pretraining_set(root / "data" / f"set{n}", *one, **split) for n, one in enumerate(parts)
        ]
        shards = str(folders[0]) if len(folders) == 1 else " + ".join(f"{one}:0.5" for one in folders)
        run = root / "runs" / "small"
        if not run.exists():
            shutil.copytree(of, run)
        told = json.loads((run / "run.json").read_text())
        told["starts"][-1] |= {
            "shards": shards,
            "data": data_fingerprint(open_set(shards).meta),
            "cwd": str(root),
            "command": f"{root}/launch/train.py demo --shards {shlex.quote(shards)} --run-dir={run} --model.width 2",
        }
        told["starts"][-1]["data_set"] |= {
            "mixture": [{"shards": str(one), "weight": 0.5} for one in folders]
        }
        (run / "run.json").write_text(json.dumps(told))
        config = json.loads((run / "config.json").read_text())
        config["model"]["init"] = f"{root}/first/model.safetensors"
        (run / "config.json").write_text(json.dumps(config))
        out = out or root / "exports" / "small.safetensors"
        assert export.main([str(run), "--to", to, "--out", str(out)]) == 0
        return out

    made.root = root
    return made


@pytest.fixture
def target(tmp_path):
    """Of patient2 and patient3, scans scan002 and scan003 are tested on."""
    return open_target(write_target_set(tmp_path / "target", counts=(1, 1, 2), each=1))


def leak(weights, target, allow=False):
    return init_leak(resolve_init(str(weights)), target, allow, None)


def without_set(project):
    """Take the sets out of reach."""
    (project.root / "data").rename(project.root.parent / "elsewhere")


@pytest.mark.parametrize("to", ["safetensors", "hub-folder", "models-genesis"])
def test_an_export_holds_no_absolute_path(project, to, tmp_path):
    place = tmp_path / "given"
    out = project(
        UNSEEN, to=to, out=place / {"safetensors": "w.safetensors", "models-genesis": "w.pt"}.get(to, ".")
    )
    assert "absolute paths" not in suspects(place)
    files = [one for one in place.rglob("*") if one.is_file()]
    assert files and not any(str(tmp_path).encode() in one.read_bytes() for one in files)
    if to == "models-genesis":
        return
    training = load.exported(out)[1]["training"]
    assert training["data"]["shards"] == "data/set0"
    assert training["command"] == "train.py demo --shards set0 --run-dir=small --model.width 2"
    assert training["config"]["model"]["init"] == "model.safetensors"
    assert training["data_set"]["mixture"] == [{"shards": "set0", "weight": 0.5}]
    assert training["data_set"]["shape"] == [64, 128, 128]


@pytest.mark.parametrize(
    ("scan", "said"),
    [
        (("scan003", 2, ""), "pretraining trained on test scan scan003: pretrain on"),
        (
            ("renamed", 1, ""),
            r"trained on test scan scan002: its file scan002\.nii is (a scan|scan renamed) there",
        ),
        (
            ("other2", 2, "patient3"),
            "trained on (a scan|scan other2) of a patient who is tested on, in scan scan003",
        ),
    ],
)
def test_a_leak_is_found_from_the_card_alone(project, target, scan, said):
    weights = project([OTHER, scan])
    with pytest.raises(UserError, match=said):
        leak(weights, target)  # the set is there, below a folder above the weights
    without_set(project)
    with pytest.raises(UserError, match=said):
        leak(weights, target)
    assert "warning: pretraining trained" in leak(weights, target, allow=True)


@pytest.mark.parametrize("to", ["safetensors", "hub-folder", "models-genesis", "nnunet"])
def test_every_format_carries_what_the_leak_check_needs(
    project, target, to, resencl_run, trained_run, tmp_path
):
    """Also where the file of weights was moved alone; of nnU-Net's, also turned to a dataset's axes."""
    out = project.root / f"exports/weights{export.FORMATS[to].ending}"
    of = resencl_run if to == "nnunet" else trained_run
    project([OTHER, ("scan003", 2, "")], to=to, out=out, of=of)
    without_set(project)
    file = load.exported(out)[0]
    places = [out, shutil.copy(file, tmp_path / file.name)]
    if to == "nnunet":
        turned = prepare_nnunet.turn(torch.load(file, weights_only=True), [1, 0, 2])
        torch.save(turned, tmp_path / "p2w_axes_102.pth")
        places.append(tmp_path / "p2w_axes_102.pth")
    encoder = p2w.load(out).state_dict()
    for place in places:
        with pytest.raises(UserError, match="pretraining trained on test scan scan003: pretrain on"):
            leak(place, target)
        again = p2w.load(place).state_dict()
        assert p2w.card(place) == p2w.card(out) and all(torch.equal(again[k], encoder[k]) for k in encoder)
        record = resolve_init(str(place))
        assert record.step == 10 and record.pretext == "parts2whole"


def test_of_weights_without_a_card_the_line_says_that_nothing_was_checked(project, target, tmp_path):
    out = project(UNSEEN, to="models-genesis", out=tmp_path / "small.pt")
    torch.save({"state_dict": torch.load(out, weights_only=True)["state_dict"]}, tmp_path / "stripped.pt")
    said = leak(tmp_path / "stripped.pt", target)
    assert said.startswith("not checked whether pretraining saw test scans: ") and "\n" not in said


def test_a_patient_is_found_by_the_hash_of_the_patient_id(project, target):
    weights = project([("other", 2, "PID 7")])
    without_set(project)
    assert "no patient who is tested on is among theirs" in leak(weights, target)
    target.meta["sources"][-1]["patient_hash"] = salted_hash("PID 7", "")
    with pytest.raises(UserError, match="a scan of a patient who is tested on, in scan scan003"):
        leak(weights, target)


def test_a_set_without_a_leak_passes_with_and_without_it(project, target, capsys):
    weights = project(UNSEEN)
    assert "hashes" not in capsys.readouterr().out
    assert f"the 2 scans that {project.root}/data/set0 trains on, and no patient" in leak(weights, target)
    without_set(project)
    said = leak(weights, target)
    assert said == (
        f"no test scan is among the 2 scans that the data set of {weights} (by the hashes in its card) trains on, and no "
        "patient who is tested on is among theirs"
    )
    text = json.dumps(load.exported(weights)[1])
    assert "another" not in text and "patient0" not in text


def test_scans_that_only_validate_are_no_leak():
    meta = {"split": {"train_scans": ["a"], "salt": SALT}, "shards": [], "sources": [
        {"uid": uid, "nbytes": nbytes, "checksum": "c", "patient": patient}
        for uid, nbytes, patient in (("a", 1, "p"), ("b", 2, "q"))
    ]}  # fmt: skip
    (read,) = training_scans.read_hashed_scans(training_scans.hashed_training_scans([meta]), "w")
    assert (
        read.has_scan("a")
        and read.scan_of_file(1, "c")
        and not read.has_scan("b")
        and not read.scan_of_file(2, "c")
    )
    assert (len(read.uids), len(read.files), len(read.patients), read.count) == (1, 1, 1, 1)
    assert read.scan_of_patient("") is None


def test_a_secret_salt_stays_secret(project, target):
    weights = project([*UNSEEN, ("more", 4, "patient3")], secret=True)
    without_set(project)
    (entry,) = load.exported(weights)[1]["training"]["data"]["seen"]
    assert "patients" not in entry and "salt" not in entry
    assert "(patients were not compared, it hashes them with a secret salt)" in leak(weights, target)


def test_beyond_the_limit_the_set_is_needed(project, target, monkeypatch, capsys):
    monkeypatch.setattr(training_scans, "SEEN_BYTES", 250)
    weights = project(UNSEEN)
    assert "hashes of 2 training scans take more than 0 KiB" in capsys.readouterr().out
    assert "seen" not in load.exported(weights)[1]["training"]["data"]
    assert "no test scan is among the 2 scans" in leak(weights, target)
    without_set(project)
    with pytest.raises(
        UserError,
        match=r"data/set0: no such folder.*cannot be ruled out: put the set back, or pass --allow-leak",
    ):
        leak(weights, target)
    assert "not checked" in leak(weights, target, allow=True)


def test_the_limit_is_some_thousands_of_scans():
    def meta(count):
        return {
            "split": {"train_scans": [f"1.2.{n}" for n in range(count)], "salt": SALT},
            "sources": [
                {"uid": f"1.2.{n}", "nbytes": n, "checksum": "c", "patient": str(n)} for n in range(count)
            ],
            "shards": [],
        }

    entries = training_scans.hashed_training_scans([meta(5000)])
    assert len(json.dumps(entries)) <= 256 << 10 and len(entries[0]["patients"].split()) == 5000
    assert not any(map(str.isdigit, entries[0]["scans"] + entries[0]["files"] + entries[0]["patients"]))
    for metas in ([meta(5400)], [meta(2700)] * 2, [meta(20_000)]):
        with pytest.raises(UserError, match="training scans take more than 256 KiB"):
            training_scans.hashed_training_scans(metas)


def test_of_a_mixture_every_set_is_compared(project, target):
    weights = project(UNSEEN, [("elsewhere", 2, "patient2")])
    assert load.exported(weights)[1]["training"]["data"]["shards"] == "data/set0:0.5 + data/set1:0.5"
    with pytest.raises(
        UserError, match="trained on scan elsewhere of a patient who is tested on, in scan scan002"
    ):
        leak(weights, target)
    without_set(project)
    with pytest.raises(UserError, match="trained on a scan of a patient who is tested on, in scan scan002"):
        leak(weights, target)


def test_another_set_in_its_place_is_not_taken_for_it(project, target):
    weights = project([("scan003", 2, "")])
    without_set(project)
    write_pretraining_set(project.root / "data" / "set0", *UNSEEN)
    with pytest.raises(UserError, match="pretraining trained on test scan scan003"):
        leak(weights, target)


@pytest.mark.parametrize(
    "change",
    [
        lambda seen: "text",
        lambda seen: [],
        lambda seen: [{**seen[0], "scans": ["a"]}],
        lambda seen: [{**seen[0], "salt": 7}],
        lambda seen: [{key: value for key, value in seen[0].items() if key != "patients"}],
        lambda seen: [{**seen[0], "rule": "MD5"}],
    ],
)
def test_hashes_that_make_no_sense_rule_nothing_out(target, change):
    meta = {"split": {"train_scans": ["a"], "salt": SALT}, "shards": [], "sources": []}
    seen = training_scans.hashed_training_scans([meta])
    assert "no test scan" in check_shards(target, "w", {"seen": seen})
    with pytest.raises(UserError, match=r"w: the hashes of scans in its card .*cannot be ruled out") as error:
        check_shards(target, "w", {"seen": change(seen)})
    assert "\n" not in str(error.value)


def test_what_is_published_has_hashes_of_scans_and_none_of_patients(project, target, monkeypatch):
    project(UNSEEN)
    run = project.root / "runs" / "small"
    options = export.PushOptions(run, "org/name", "mit", "ours")
    files, _ = export.files_to_publish(options, HubName("org/name"))
    assert not [line for name, data in files.items() for line in export.private_text(name, data)]
    data = json.loads(files["card.json"])["training"]["data"]
    (entry,) = data["seen"]
    assert "shards" not in data and "patients" not in entry and "salt" not in entry
    assert "(patients were not compared, a published card has no hashes of them)" in check_shards(
        target, "hf://org/name", data
    )
    monkeypatch.setattr(export, "_own_names", lambda: {"this user's name": entry["scans"].split()[0]})
    files, _ = export.files_to_publish(options, HubName("org/name"))
    assert "seen" not in json.loads(files["card.json"])["training"]["data"]


@pytest.mark.parametrize(
    ("where", "cwd", "portable"),
    [
        ("/home/jane/p/data/shards", "/home/jane/p", "data/shards"),
        ("/scratch/jane/shards/", "/home/jane/p", "shards"),
        ("/scratch/jane/shards", "", "shards"),
        ("data/./shards", "/home/jane/p", "data/shards"),
        ("../jane/shards", "/home/jane/p", "shards"),
        ("a/../../jane/shards", "/home/jane/p", "shards"),
        ("file:///home/jane/shards", "/x", "shards"),
        ("https://jane:secret@host:80/data/shards?token=1#a", "/x", "https://host:80/data/shards"),
        ("s3://bucket/shards", "/x", "s3://bucket/shards"),
        ("/p/a:0.7 + /q/b:0.3", "/p", "a:0.7 + b:0.3"),
        ("/home/jane/shards:0.7 + /home/joe/shards:0.3", "/p", "shards:0.7 + shards (2):0.3"),
        ("/home/jane/shards + https://u:p@h/b?c=d", "/p", "shards + https://h/b"),
    ],
)
def test_sets_are_named_without_the_machine(where, cwd, portable):
    assert portable_shards(where, cwd) == portable


@pytest.mark.parametrize(
    ("command", "cut"),
    [
        ("launch/train.py demo --shards /data/a:0.7 'my set/b:0.3'", "train.py demo --shards a:0.7 b:0.3"),
        ("-m p2w train /home/jane/c.json --x=/home/jane/y --lr=1e-3", "-m p2w train c.json --x=y --lr=1e-3"),
        ("-m p2w train /home/jane=1/c.json", "-m p2w train c.json"),
        ("-m p2w train demo --shards https://u:p@h/a?t=1 --init hf://org/name@v1", "-m p2w train demo --shards a --init hf://org/name@v1"),
        ("train.py 'it ends /not", "train.py ''\"'\"'it' ends not"),
    ],
)  # fmt: skip
def test_commands_are_told_without_paths(command, cut):
    assert command_without_paths(command) == cut


def test_the_run_itself_may_name_its_set_in_full(project):
    project(UNSEEN)
    run = project.root / "runs" / "small"
    assert Path(load.read_weights(run).data["shards"]) == project.root / "data" / "set0"

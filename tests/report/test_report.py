"""report.html against the files that it shows, with damaged and hostile files, and in a real browser."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from processes import REPO

from p2w import report
from p2w.config import Config, changed_from, config_to_json, read_config
from p2w.errors import UserError
from p2w.report import curves, markup, page, results_section

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '</script><script>document.title="broken in"</script><img src=x onerror=alert(1)> $x_{$'
W, S, D, H, X = 2, 3, 6, 8, 10


def write_run(run, key="1.2.3/z0000"):
    """A run of two starts with an analysis, volumes of random voxels and one picture."""
    (run / "analysis").mkdir(parents=True)
    (run / "figures").mkdir()
    (run / "config.json").write_text(config_to_json(Config()).replace('"lr": 0.001', '"lr": 0.25'))
    (run / "status.json").write_text(json.dumps({"state": "told to stop", "step": 40, "why": "SIGTERM"}))
    data_set = {"shape": [64, 128, 128], "spacing_mm": [[1, 0.5, 0.5], [2.5, 0.7, 0.7], [3, 0.9, 0.9]]}
    data_set |= {"train": {"sub_scans": 128, "scans": 16}, "val": {"sub_scans": 32, "scans": 4}}
    start = {"time": "2026-01-01T10:00:00+0000", "data": "abcd", "shards": "my shards", "host": "node1"}
    start |= {
        "world_size": 8,
        "nodes": 2,
        "torch": "2.13",
        "command": "launch/train.py paper --optim.lr 0.25",
    }
    again = start | {"time": "2026-01-01T11:00:00+0000", "from_step": 20, "redone": 7, "data_set": data_set}
    (run / "run.json").write_text(json.dumps({"starts": [start, again]}))
    epoch = 1767261600  # the first start
    records = [{"step": 0, "val/loss": 0.1455, "val/loss_mean_image": 0.0475, "similarity/auc": 0.632}]
    for at in range(1, 9):
        norm = float("inf") if at == 3 else 0.1 * at
        records.append({"step": 5 * at, "train/loss": 0.1 / at, "train/lr": 0.25, "train/grad_norm": norm})
        records[-1] |= {"speed/samples_per_s": 10.0 * at, "speed/waiting_share": 0.02}
    records.append({"step": 40, "val/loss": 0.0297, "similarity/auc": 0.819, "checkpoint/stall_s": 0.25})
    lines = [json.dumps(r | {"time": epoch + 60 + 600 * at}) for at, r in enumerate(records)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    network = {"kind": "run", "step": 40, "contrastive_loss": 6.5, "retrieval": {"top_1": 0.75}}
    network["similarity"] = {"auc": 0.951, "d_prime": 2.31, "positive_mean": 0.97, "negative_mean": 0.81}
    network["by_scale"] = {"scale": [0.25, 1.0], "auc": [0.9, 0.99], "d_prime": [1.5, 3.5]}
    over = {"steps": [0, 20, 40], "contrastive_loss": [8, 7, 6], "val_mse": [3, 2, 1]}
    over |= {"pearson_r": 0.912, "ci95": [0.8, 0.97], "p_value": 0.001, "n": 3}
    summary = {
        "step": 40,
        "networks": {"Parts2Whole": network},
        "over_checkpoints": over,
        "settings": {"t": 0.7},
    }
    (run / "analysis" / "summary.json").write_text(json.dumps(summary))
    save_volumes(run, key)
    return run


def save_volumes(run, key="k", wholes=W, shape=(D, H, X)):
    rng = np.random.default_rng(3)
    voxels = rng.integers(0, 256, (wholes, 1 + 2 * S, *shape), np.uint8)
    arrays = {"whole": voxels[:, 0], "part": voxels[:, 1 : 1 + S], "output": voxels[:, 1 + S :]}
    keys = np.array([f"{key}{row}" for row in range(wholes)])
    np.savez(run / "analysis" / "reconstructions.npz", **arrays, scale=np.array([0.1, 0.5, 1.0]), keys=keys)
    return arrays


class Page(HTMLParser):
    """Text, scripts and outside references of a page."""

    def __init__(self, text):
        super().__init__()
        self.text, self.scripts, self.tags, self.outside, self._inside = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        self.outside += [
            v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("data:", "#"))
        ]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            attrs, before = self.scripts[-1]
            self.scripts[-1] = (attrs, before + data)
        elif self._inside != "style":
            self.text.append(data)

    @property
    def said(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture
def no_charts(monkeypatch):
    """Pages without curves: to draw them takes most of the time, and is what two other tests are about."""
    monkeypatch.setattr(curves, "CHARTS", {})


def unpacked(text, shape=(D, H, X)):
    """What the page's script does, slowly."""
    rows = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(shape)
    return np.cumsum(rows.astype(np.int64), axis=2) % 256


def test_the_page_says_what_the_files_say(tmp_path):
    run = write_run(tmp_path / "my run")
    assert report.write_report(run) == run / "report.html"
    page = Page((run / "report.html").read_text())
    for said in (
        "my run", "told to stop", "SIGTERM", "0.1455 → 0.0297", "always the mean image: 0.0475", "0.632 → 0.819",
        "40 of 1,000", "640 samples of 16 a step, 5.0 epochs", "45.0 samples/s, best 80.0", "2.0 %", "0.25 s",
        "optim.lr 0.25 0.001", "128 sub-scans of 16 scans", "32 sub-scans of 4 scans", "2.50 (1.00 to 3.00) mm", "abcd",
        "Of 8 logged steps, 1 had a gradient", "2026-01-01 11:00 +0000 20 7 node1",
        "torchrun --nnodes=2 --nproc_per_node=4", "launch/train.py paper --optim.lr 0.25", "--shards 'my shards'",
        "Parts2Whole run 40 0.951 2.31 0.970 0.810 6.500 0.750", "r = 0.912 (95 % interval 0.800 to 0.970, p = 0.001)",
    ):  # fmt: skip
        assert said in page.said, said
    assert page.outside == [] and "Not on this page" not in page.said
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    first = ("Loss.", "Separability:", "Contrastive", "Learning", "Gradient", "Throughput,", "Time")
    assert tuple(label.split()[0] for label in labels) == first


def test_the_page_serves_narrow_screens_keyboards_and_screen_readers(tmp_path):
    run = write_run(tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    facts["starts"][-1]["data_set"]["tiling"] = {"tile": [64, 128, 128], "min_std_hu": 50.0, "left_out": 3}
    (run / "run.json").write_text(json.dumps(facts))
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": at, "val/position_loss": 1.0 / at}) + "\n" for at in (50, 60))
    text = report.write_report(run).read_text()
    page = Page(text)
    # Titles tell runs apart, times have one format, no key of a file stands for words, nothing is said twice.
    assert f"<title>{tmp_path.name}/run: told to stop at step 40 · p2w</title>" in text
    assert (
        not re.search(r"\d{4}-\d\d-\d\dT", page.said)
        and len(set(re.findall(r"\d\d:\d\d ([+-]\d{4})", page.said))) == 1
    )
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert "Position loss, validation." in captions and not any("_" in one or "/" in one for one in captions)
    assert (
        "tiling:" not in page.said
        and page.said.count("64 \u00d7 128 \u00d7 128") == 1
        and "sub-scans left out 3" in page.said
    )
    # A number stays with its unit, and a command breaks between words.
    assert "0.25\u00a0s" in text and "2.0\u00a0%" in text and "2.50 (1.00 to 3.00)\u00a0mm" in text
    blocks = re.findall(r'<pre class="command">(.*?)</pre>', text, re.DOTALL)
    assert len(blocks) == 3 and all("<span>--run-dir</span>" in one for one in blocks[1:2])
    assert not any("\u00a0" in one for one in blocks)
    # What scrolls can be reached by the keyboard and has a name; every control, picture and section has one.
    attributes = [(tag, attrs) for tag, attrs in page.tags]
    scrolling = [attrs for _, attrs in attributes if "scroll" in attrs.get("class", "").split()]
    assert all(
        one.get("tabindex") == "0" and one.get("aria-label")
        for one in scrolling
        if "facts" not in one["class"]
    )
    ids = {attrs["id"] for _, attrs in attributes if "id" in attrs}
    sections = [attrs for tag, attrs in attributes if tag == "section"]
    assert (
        all(one.get("aria-label") or one.get("aria-labelledby") in ids for one in sections)
        and len(sections) > 6
    )
    assert all(attrs.get("alt") for tag, attrs in attributes if tag == "img")
    assert all(
        attrs.get("aria-label")
        for tag, attrs in attributes
        if attrs.get("role") in ("img", "group", "region")
    )
    labelled = re.findall(r"<label>[^<]*<(?:select|input)", text)
    assert (
        len(labelled) == 5
        and '<input type="range" name="slice" min="0" value="0" step="1" aria-label="Slice">' in text
    )
    headings = [int(tag[1]) for tag, _ in attributes if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))


def test_the_text_of_a_command_block_is_the_command():
    block = markup.command_lines("p2w report 'a  b' \\\n  --run-dir <x>")
    assert html.unescape(re.sub(r"</?\w+[^>]*>", "", block)) == "p2w report 'a  b' \\\n  --run-dir <x>"


@pytest.mark.parametrize("count", range(1, 9))
def test_no_tile_is_alone_in_its_row(count, monkeypatch):
    monkeypatch.setattr(results_section, "TILES", tuple(lambda _: ("name", "1 s", "") for _ in range(count)))
    columns = int(re.search(r"tiles of(\d)", results_section.headline_tiles(None))[1])
    assert count == 1 or count % columns != 1 or columns == 1


def test_the_volumes_of_the_page_are_those_of_the_file(tmp_path, no_charts):
    run = write_run(tmp_path / "run")
    arrays = np.load(run / "analysis" / "reconstructions.npz")
    scripts = Page(report.write_report(run).read_text()).scripts
    (data,) = [json.loads(text) for attrs, text in scripts if attrs.get("id") == "volumes"]
    assert data["shape"] == [D, H, X] and data["scale"] == [0.1, 0.5, 1.0] and len(data["keys"]) == W
    assert data["extent"][0] == pytest.approx(
        [160, 89.6, 89.6]
    )  # of the data set, since the file does not say
    for row in range(W):
        assert (unpacked(data["whole"][row]) == arrays["whole"][row]).all()
        for scale in range(S):
            assert (unpacked(data["part"][row][scale]) == arrays["part"][row, scale]).all()
            assert (unpacked(data["output"][row][scale]) == arrays["output"][row, scale]).all()


def test_volumes_beyond_the_limit_are_left_out_and_said(tmp_path, monkeypatch, no_charts):
    run = write_run(tmp_path / "run")
    save_volumes(run, wholes=4, shape=(8, 16, 16))
    found = page.find_volumes(run, [])
    least = page.payload(found, 1)
    assert len(least["whole"]) == 1 and least["scale"] == [1.0]
    one = len(json.dumps(least))
    few = page.payload(found, 3 * one)
    assert len(few["whole"]) < 4 and few["scale"][-1] == 1.0
    assert len(page.payload(found)["whole"]) == 4
    monkeypatch.setattr(page.payload, "__defaults__", (1,))
    assert "1 of 4 wholes and 1 of 3 scales are here" in Page(report.write_report(run).read_text()).said


def test_text_of_a_run_cannot_become_markup(tmp_path):
    run = write_run(tmp_path / "<b>run", key=EVIL)
    (run / "status.json").write_text(json.dumps({"state": EVIL, "step": EVIL, "why": EVIL + "\ud800"}))
    (run / "config.json").write_text(json.dumps({EVIL: {EVIL: EVIL}, "train": EVIL, "data": {"batch": EVIL}}))
    hostile = {
        name: EVIL for name in ("time", "data", "shards", "host", "command", "cwd", "device", "precision")
    }
    hostile |= {
        "world_size": EVIL,
        "data_set": {"shape": EVIL, "tiling": {EVIL: EVIL}, "spacing_mm": [[EVIL]] * 3},
    }
    (run / "run.json").write_text(json.dumps({"starts": [EVIL, hostile]}))
    summary = {"networks": {EVIL: {"kind": EVIL, "step": EVIL, "retrieval": {EVIL: 0.5}, "similarity": EVIL}}}
    (run / "analysis" / "summary.json").write_text(
        json.dumps(summary | {"wholes": EVIL, "settings": {EVIL: EVIL}})
    )
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step, EVIL: 1.0}) + "\n" for step in (41, 42))
    (run / "figures" / "x onerror=1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    page = Page(report.write_report(run).read_text("utf-8"))
    assert len(page.scripts) == 2  # the volumes and ours
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not any(tag == "img" and not attrs["src"].startswith("data:") for tag, attrs in page.tags)
    assert EVIL[:20] in page.said  # shown as the text it is


@pytest.mark.parametrize(
    "torn", ["config.json", "status.json", "run.json", "metrics.jsonl", "analysis/summary.json"]
)
@pytest.mark.parametrize("content", [b"", b'{"step": 1, "tra', b"[1, 2]", b"\xff\x00{", b"[" * 100_000])
def test_a_torn_file_costs_its_own_facts_only(tmp_path, torn, content, no_charts):
    run = write_run(tmp_path / "run")
    (run / torn).write_bytes(content)
    said = Page(report.write_report(run).read_text()).said
    assert torn == "metrics.jsonl" or f"{torn}: not read" in said
    assert torn == "status.json" or "told to stop" in said
    assert torn == "metrics.jsonl" or "0.1455 → 0.0297" in said
    assert "Reconstructions" in said


@pytest.mark.parametrize("damage", ["short", "text", "pickle", "shape"])
def test_volumes_that_cannot_be_read_are_named_and_others_taken(tmp_path, damage, no_charts):
    run = write_run(tmp_path / "run")
    path = run / "analysis" / "reconstructions.npz"
    shutil.copy(path, run / "figures" / "reconstruction.npz")
    if damage == "short":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "text":
        path.write_text("no volumes")
    elif damage == "pickle":
        np.savez(path, whole=np.array([object()]))
    else:
        np.savez(path, **{**np.load(path), "part": np.zeros((1, 1, 2, 2, 2), np.uint8)})
    said = Page(report.write_report(run).read_text()).said
    assert "analysis/reconstructions.npz: not read" in said and "Reconstructions" in said


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [True, False])
def test_the_defaults_are_those_that_the_run_wrote_down_and_need_no_torch(tmp_path, recorded):
    """A run of an earlier version wrote none down; they are then collected from the pretexts' files."""
    write_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["mae"]["ratio"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    if recorded:
        run = json.loads((tmp_path / "run.json").read_text())
        run["starts"][-1]["changed_from"] = changed_from(read_config(tmp_path / "config.json"))
        assert run["starts"][-1]["changed_from"] == {"optim.lr": 0.001, "mae.ratio": 0.75}
        (tmp_path / "run.json").write_text(json.dumps(run))
    code = "import sys\nfrom p2w import report\nfrom p2w.report import curves\n"
    code += "" if recorded else "curves.CHARTS = {}\n"  # drawing them without torch is tried once
    code += "report.main(sys.argv[1:])\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == str(not recorded)
    said = Page((tmp_path / "report.html").read_text()).said
    differing = said.partition("setting this run default")[2].partition("All ")[0]
    assert differing.split() == ["optim.lr", "0.25", "0.001", "mae.ratio", "0.5", "0.75"], differing


def test_what_is_missing_is_named_with_its_command(tmp_path):
    (tmp_path / "config.json").write_text(config_to_json(Config()))
    said = Page(report.write_report(tmp_path).read_text()).said
    assert f"torchrun -m p2w analyze --run-dir {tmp_path}" in said and "Nothing is logged yet" not in said
    assert (
        "Curves" not in said.replace("Curves while it trains", "") and "Every setting has its default" in said
    )


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, capsys, no_charts):
    for folder, why in ((tmp_path, "holds no run"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=why):
            report.main([str(folder)])
    assert list(tmp_path.iterdir()) == []
    run = write_run(tmp_path / "run")
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run}/report.html  ")


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, no_charts):
    run = write_run(tmp_path / "run")
    (run / "report.html").write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"report\.html: not written \(No space left"):
        report.main([str(run)])
    assert (run / "report.html").read_text() == "old"
    assert not list(run.glob(".report*"))


PROBE = """
const show = (canvas) => Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data)
  .filter((_, at) => at % 4 === 0);
const state = () => ({drawn: document.getElementById("slider").dataset.drawn, hash: location.hash,
  size: [...document.querySelectorAll("canvas")].map((c) => [c.height, c.width]),
  ratio: document.querySelector("canvas").style.aspectRatio,
  pixels: Object.fromEntries([...document.querySelectorAll("canvas")].map((c) => [c.dataset.kind, show(c)]))});
const wait = async (part) => { for (let n = 0; n < 400; n++) {
  if ((document.getElementById("slider").dataset.drawn || "").includes(part)) return;
  await new Promise((r) => setTimeout(r, 10)); } };
const set = (name, value) => { const e = document.querySelector(`[name=${name}]`); e.value = value;
  e.dispatchEvent(new Event("input", {bubbles: true})); };
const errors = []; addEventListener("error", (e) => errors.push(e.message));
addEventListener("unhandledrejection", (e) => errors.push(String(e.reason)));
addEventListener("load", async () => { await wait("slice=2"); const states = [state()];
  set("slice", "5"); await wait("slice=5"); states.push(state());
  set("whole", "0"); await wait("whole=0"); set("scale", "2"); await wait("scale=2"); states.push(state());
  document.querySelector("[value=axial]").click(); await wait("plane=axial"); states.push(state());
  document.body.dataset.result = JSON.stringify({states, errors}); });
"""


def slices(arrays, whole, scale, plane, at):
    """The three pictures a reader should see: head at the top in coronal and sagittal planes."""
    for kind, volume in (("part", arrays["part"][whole, scale]), ("output", arrays["output"][whole, scale]),
                         ("whole", arrays["whole"][whole])):  # fmt: skip
        cut = {"axial": volume[at], "coronal": volume[::-1, at], "sagittal": volume[::-1, :, at]}
        yield kind, cut[plane]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_in_a_browser_the_slider_shows_the_slices_of_the_file(tmp_path, plane, no_charts):
    run = write_run(tmp_path / "run")
    arrays = np.load(run / "analysis" / "reconstructions.npz")
    text = report.write_report(run).read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text)[0]
    probed = (
        tmp_path / "probed.html"
    )  # the page as it is, but for our script and the policy that would refuse it
    probed.write_text(text.replace(policy, "").replace("<main>", f"<script>{PROBE}</script><main>"))
    dump, log = browse(tmp_path, f"file://{probed}#whole=1&scale=1&plane={plane}&slice=2")
    result = json.loads(html.unescape(re.search(r'data-result="([^"]*)"', dump)[1]))
    assert result["errors"] == [] and "CONSOLE" not in log
    half = (0, 2, plane, 5)
    for state, shown in zip(
        result["states"], [(1, 1, plane, 2), (1, 1, plane, 5), half, (0, 2, "axial", D // 2)], strict=True
    ):
        whole, scale, kind_of_plane, at = shown
        address = f"whole={whole}&scale={scale}&plane={kind_of_plane}&slice={at}"
        assert state["drawn"] == address and state["hash"] == f"#{address}"
        for kind, picture in slices(arrays, *shown):
            assert state["pixels"][kind] == picture.ravel().tolist(), (kind, shown)
            assert list(picture.shape) in state["size"]
    wide, high = map(float, result["states"][0]["ratio"].split(" / "))
    assert wide / high == pytest.approx(89.6 / 160)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_under_its_own_policy_the_page_runs_and_says_nothing_on_the_console(tmp_path):
    path = report.write_report(write_run(tmp_path / "run", key=EVIL))
    dump, log = browse(tmp_path, f"file://{path}#whole=1&slice=99&plane=nonsense")
    assert f"whole=1&amp;scale={S - 1}&amp;plane=axial&amp;slice={D - 1}" in dump
    assert "CONSOLE" not in log and "broken in</title>" not in dump


def browse(folder, address):
    """The page's DOM after its scripts have run, and what the browser logged, with every host unreachable."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--enable-logging=stderr",
        "--v=0",
    ]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'chromium'}"]
    command += ["--virtual-time-budget=8000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr

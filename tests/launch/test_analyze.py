"""launch/analyze.py as users meet it: numbers, files, ranks, continuing, and what it refuses. Real processes throughout."""

import json
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from ct_sets import write_structured_set
from launch_runs import REPO, TINY, metrics, wait_for
from safetensors.torch import load_file

from p2w import config as settings
from p2w import pretext as p2w_pretext
from p2w.analysis import plots
from p2w.analysis.feature_sources import AnalysedRun, parse_against
from p2w.analysis.monitors import VALIDATION_SEED
from p2w.commands.analyze import build
from p2w.errors import UserError
from p2w.rng import SampleKeys
from p2w.stream.stream import open_set
from p2w.train.checkpoint import Checkpoints, Snapshot
from p2w.train.optim import choose_precision
from p2w.world import World

SMALL = """--parts 4 --pairs 6 --tests 3 --negatives 20 --scales 3 --scale-parts 3 --scatter-wholes 3
--scatter-parts 12 --batch 4""".split()  # noqa: SIM905
FIGURES = "tsne similarity_networks separability_by_scale contrastive reconstruction_scales retrieval".split()  # noqa: SIM905
SCRIPT = "launch/analyze.py"


@pytest.fixture(scope="module")
def trained(forge, tiny_set, tmp_path_factory):
    """A run with checkpoints at 3, 6, 9, 12; step 3 was not validated. Copy it, do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    argv = [*TINY, "--train.steps", "12", "--train.checkpoint-every", "3", "--train.keep", "9"]
    argv += ["--train.validate-every", "6"]
    codes, _, err = forge.run(folder, "demo", *argv, "--shards", tiny_set, "--run-dir", folder / "run")
    assert codes == [0], err
    return folder / "run"


@pytest.fixture(scope="module")
def analyzed(forge, trained, tmp_path_factory):
    """The run analysed by one process."""
    return analyze(
        forge,
        trained,
        tmp_path_factory.mktemp("analyzed"),
        "--against",
        "random,histogram,pixels",
        draws=True,
    )


def analyze(forge, trained, folder, *argv, ranks=1, draws=False):
    run = folder / "run"
    if not run.exists():
        shutil.copytree(trained, run)
    codes, out, err = forge.run(
        folder, "--run-dir", run, *SMALL, *argv, ranks=ranks, script=SCRIPT, **drawing(draws)
    )
    assert codes == [0] * ranks, err
    assert "Traceback" not in err and "Warning" not in err, err
    return run, out, err


def drawing(draws):
    """How a run is started that draws, or that leaves out what takes most of its time."""
    return {} if draws else {"spies": (("draw_nothing",),)}


def summary(run):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads((run / "analysis" / "summary.json").read_text(), parse_constant=refuse)


def numbers(run):
    """All that was measured, without the label that the run's folder gives."""
    found = summary(run)
    return list(found["networks"].values()), found["over_checkpoints"]


def validation_mse(run, step, shards):
    """One whole at a time, in float64: part 0 of every validation whole, reconstructed."""
    config = settings.read_config(run / "config.json")
    pretext, model = p2w_pretext.build_pretext_and_network(config)
    model.load_state_dict(Checkpoints(run / "checkpoints").load(step).model)
    model.eval()
    opened, errors = open_set(str(shards)), []
    for sub_scan in opened.ids("val").tolist():
        voxels = torch.empty(1, *opened.shape, dtype=torch.int16)
        opened.read_into(sub_scan, voxels[0])
        views = pretext.sample(voxels, SampleKeys(VALIDATION_SEED, 0, torch.tensor([sub_scan])))
        with torch.no_grad():
            errors.append(float((model(views.input).double() - views.target.double()).square().mean()))
    return sum(errors) / len(errors)


def test_numbers_and_files(analyzed, trained, tiny_set):
    run, out, _ = analyzed
    found = summary(run)
    assert (found["step"], found["split"], found["wholes"], found["shards"]) == (12, "val", 8, str(tiny_set))
    kinds = {label: one["kind"] for label, one in found["networks"].items()}
    last = list(kinds)[-1]
    assert list(kinds.values()) == ["random", "histogram", "pixels", "run"]
    for one in found["networks"].values():
        assert one["similarity"]["n_pairs"] == 48 and 0 <= one["similarity"]["auc"] <= 1
        assert len(one["by_scale"]["auc"]) == len(one["by_scale"]["scale"]) == 3
        assert one["retrieval"]["n_queries"] == 32 and one["retrieval"]["another_part"]["gallery"] == 8
        assert 0 < one["contrastive_loss"] < math.log(1 + 20 * math.exp(2 / 0.7))
    over = found["over_checkpoints"]
    assert over["steps"] == [3, 6, 9, 12] and over["n"] == 4
    assert over["contrastive_loss"][-1] == found["networks"][last]["contrastive_loss"]
    logged = {record["step"]: record["val/loss"] for record in metrics(trained) if "val/loss" in record}
    assert over["val_mse"][1] == logged[6] and over["val_mse"][3] == logged[12]
    assert 3 not in logged and over["val_mse"][0] == pytest.approx(
        validation_mse(trained, 3, tiny_set), abs=1e-6
    )
    assert (
        found["settings"]["volume_fraction"] == [1 / 16, 1 / 4]
        and "replacement" in found["settings"]["negatives_drawn"]
    )
    for name in FIGURES:
        assert (run / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (run / "figures" / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
    with np.load(run / "analysis" / "reconstructions.npz") as saved:
        assert saved["part"].shape == saved["output"].shape == (4, 5, 8, 16, 16)
        assert saved["whole"].shape == (4, 8, 16, 16) and saved["whole"].dtype == np.uint8
        assert (saved["part"][:, -1] == saved["whole"]).all() and saved["keys"].shape == (4,)
        assert saved["scale"].tolist() == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
        assert saved["extent_mm"].tolist() == [[16 * 2.5, *[pytest.approx(32 * 0.7)] * 2]] * 4
    page = (run / "report.html").read_text()
    assert "histogram" in page and "separability by scale" in page
    assert "<td>chance</td>" in page and "chance top1" not in page and "contrast/loss, as logged" not in page
    assert "chance" in out and str(run / "figures") in out


def test_the_page_of_evidence_takes_what_an_analysis_writes(analyzed, tmp_path, monkeypatch):
    """`make evidence` ends with it, after an hour: the summary and the figures are an analysis' own."""
    monkeypatch.syspath_prepend(str(REPO / "bench" / "evidence"))
    import evidence_page

    run = shutil.copytree(analyzed[0], tmp_path / "evidence" / "runs" / "phantom-parts2whole-seed0")
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(REPO / "docs" / "evidence.md", docs)
    evidence_page.write(docs, tmp_path / "evidence", [])
    block = (docs / "evidence.md").read_text().partition("<!-- phantom scales -->")[2]
    row = next(line for line in block.splitlines() if line.startswith("| **parts2whole** |"))
    auc = list(summary(run)["networks"].values())[-1]["by_scale"]["auc"]
    assert row == "| **parts2whole** | " + " | ".join(f"{one:.3f}" for one in auc) + " |"
    assert len(list((docs / "evidence").glob("phantom-*.png"))) == len(evidence_page.FIGURES)


def test_two_ranks_give_the_same_numbers(forge, analyzed, trained, tmp_path):
    run, _, _ = analyze(forge, trained, tmp_path, "--against", "random,histogram,pixels", ranks=2)
    assert summary(run)["world_size"] == 2 and numbers(run) == numbers(analyzed[0])


def test_what_is_gone_from_the_cache_is_made_again_and_nothing_else(forge, analyzed, tmp_path):
    before = numbers(analyzed[0])
    run = shutil.copytree(analyzed[0], tmp_path / "run")
    cache = sorted((run / "analysis" / "cache").iterdir())
    gone = next(path for path in cache if path.name.startswith("scales-"))
    gone.unlink()
    times = {path: path.stat().st_mtime_ns for path in cache if path != gone}
    _, out, _ = analyze(forge, run, tmp_path, "--against", "random,histogram,pixels")
    assert "72/72 parts encoded" in out  # 8 wholes, 9 parts each
    assert times == {path: path.stat().st_mtime_ns for path in times} and gone.exists()
    assert sorted((run / "analysis" / "cache").iterdir()) == cache
    assert numbers(run) == before


def test_other_runs_by_label_and_step_and_one_that_is_lost(forge, trained, tmp_path):
    """Weights that are not finite: that network is named and left out, the others are compared."""
    lost = shutil.copytree(trained, tmp_path / "lost")
    checkpoints = Checkpoints(lost / "checkpoints")
    snapshot = checkpoints.load(12)
    model = load_file(checkpoints.path(12) / "model.safetensors")
    model["encoder.down_tr512.ops.1.conv1.bias"].fill_(float("nan"))
    checkpoints.save(Snapshot(12, model, snapshot.state, None))
    other = f"early={trained}@3,{lost}@12"
    run, out, err = analyze(
        forge, trained, tmp_path, "--against", other, "--no-checkpoints", "--max-wholes", 5
    )
    found = summary(run)
    assert "warning: lost: its features are not finite; left out" in err
    assert {label: one["step"] for label, one in found["networks"].items()} == {
        "early": 3,
        list(found["networks"])[1]: 12,
    }
    assert found["wholes"] == 5 and found["over_checkpoints"] is None and "early" in out


BAD = {
    "no run": (["--run-dir", "{tmp}/none"], "{tmp}/none: no config.json there, so it is no run folder"),
    "no such step": (["--step", "7"], "no checkpoint of step 7; there are 3, 6, 9, 12"),
    "no such other": (["--against", "genesis"], "genesis: no config.json there"),
    "two of a name": (["--against", "random,random"], "two are called random"),
    "itself": (["--against", "{run}"], "is the run itself"),
    "other data": (["--shards", "{tmp}/other"], "the run was trained on"),
    "no data": (["--shards", "{tmp}/none"], "{tmp}/none: no such folder"),
    "no such split": (["--split", "test"], "0 sub-scan(s) in split 'test'"),
    "one whole": (["--max-wholes", "1"], "--max-wholes 1: parts of different wholes"),
    "one part": (["--parts", "1"], "--parts 1: must be at least 2"),
    "temperature": (["--temperature", "0"], "--temperature 0.0: must be above 0"),
    "scale": (["--volume-fraction", "0.5", "0.1"], "needs 0 < low <= high <= 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_starts(trained, tmp_path, case):
    argv, says = BAD[case]
    if case == "other data":
        write_structured_set(tmp_path / "other", train=3)
    before = sorted(trained.rglob("*"))
    words = [word.format(tmp=tmp_path, run=trained) for word in argv]
    with pytest.raises(UserError, match=re.escape(says.format(tmp=tmp_path, run=trained))) as refused:
        build(["--run-dir", str(trained), *words], World.from_env())
    assert len(str(refused.value).splitlines()) == 1
    assert sorted(trained.rglob("*")) == before


def test_a_refusal_is_one_line_and_exit_code_2(forge, trained, tmp_path):
    empty = shutil.copytree(trained, tmp_path / "empty")
    shutil.rmtree(empty / "checkpoints")
    codes, _, err = forge.run(tmp_path, "--run-dir", empty, script=SCRIPT)
    assert (
        codes == [2]
        and err == f"error: {empty}: no checkpoint there yet; train it: p2w train --run-dir {empty}\n"
    )


def test_what_cannot_be_written_or_is_of_another_network_is_one_line(forge, analyzed, trained, tmp_path):
    run = shutil.copytree(analyzed[0], tmp_path / "run")
    shutil.rmtree(run / "figures")
    (run / "figures").write_text("a file where a folder should be")
    codes, _, err = forge.run(
        tmp_path, "--run-dir", run, *SMALL, "--against", "histogram", "--no-checkpoints", script=SCRIPT
    )
    assert codes == [2] and "figures not written" in err and "Traceback" not in err
    other = shutil.copytree(trained, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["model"]["width"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    codes, _, err = forge.run(tmp_path, "--run-dir", other, *SMALL, "--against", "", script=SCRIPT)
    assert codes == [2] and "contains another network than" in err and "Traceback" not in err


def test_a_folder_may_have_any_name(trained, tmp_path):
    """`=` and `@` in a folder's name, with and without a label and a step; digits that int() does not read."""
    odd = tmp_path / "lr=0.1@2"
    shutil.copytree(trained, odd)
    run = AnalysedRun.open(trained)
    precision = choose_precision("fp32", torch.device("cpu"))
    words = f"{odd},a={odd},b={odd}@6,c={trained}@9"
    found = parse_against(words, run, World.from_env(), precision)
    assert [(one.label, one.step) for one in found] == [("lr=0.1@2", 12), ("a", 12), ("b", 6), ("c", 9)]
    with pytest.raises(UserError, match=r"no config\.json there"):
        parse_against(f"{trained}@²", run, World.from_env(), precision)


def test_the_scales_of_training_are_those_of_the_run():
    curve = {"scale": [0.25, 1.0], "auc": [0.9, 0.99], "d_prime": [1.5, 3.5]}
    parts, whole = (
        plots.scale_figure({"a": curve}, trained, "a") for trained in ((1 / 16, 1 / 4), (1.0, 1.0))
    )
    assert len(parts.axes[0].patches) == 1 and len(whole.axes[0].patches) == 0
    for figure in (parts, whole):
        assert "scales that a was trained on" in figure.axes[0].get_legend_handles_labels()[1]


def test_one_process_of_several_that_is_killed_ends_the_others_and_the_command_continues(
    forge, trained, tmp_path
):
    """A rank dies in the middle: nothing half-written is left, and the same command goes on from the cache."""
    run = shutil.copytree(trained, tmp_path / "run")
    cache = run / "analysis" / "cache"
    argv = ["--run-dir", run, *SMALL, "--against", "random", "--parts", "24", "--no-checkpoints"]
    pids = forge.start(tmp_path, *argv, ranks=2, script=SCRIPT, **drawing(False))
    wait_for(lambda: cache.is_dir() and any(cache.glob("*.npz")), "the first features")
    os.kill(pids[1], signal.SIGKILL)
    assert all(forge.wait()) and not (run / "analysis" / "summary.json").exists()
    times = {path: path.stat().st_mtime_ns for path in cache.glob("*.npz")}
    codes, _, err = forge.run(tmp_path, *argv, script=SCRIPT, **drawing(False))
    assert codes == [0], err
    assert times and times == {path: path.stat().st_mtime_ns for path in times}
    assert len(summary(run)["networks"]) == 2

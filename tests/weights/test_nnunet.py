"""The way into nnU-Net: the keys that it reads and no others, plain types, the same bits; its own code where installed."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from safetensors.torch import load_file

import p2w
from p2w.errors import UserError
from p2w.finetune.init import resolve_init
from p2w.model.resencl import ResEncL
from p2w.shards.privacy import suspects
from p2w.weights import export, nnunet
from p2w.weights import start as weights_start
from p2w.weights.nnunet import from_nnunet, to_nnunet
from p2w.weights.prepare_nnunet import intensities
from p2w.weights.start import load_start

CONFIGURATION = {
    "data_identifier", "preprocessor_name", "spacing_style", "normalization_schemes", "use_mask_for_norm",
    "resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_mask", "resampling_fn_mask_kwargs", "spacing",
    "patch_size",
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(resencl_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("nnunet") / "out"
    assert export.main([str(resencl_run), "--to", "nnunet", "--out", str(out)]) == 0
    return out


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool)


def test_the_keys_are_those_that_nnunet_reads(exported):
    held = torch.load(exported / "checkpoint_final.pth", weights_only=True)
    assert set(held) == {"network_weights", "nnssl_adaptation_plan", "p2w"}  # the last is our card
    plan = held["nnssl_adaptation_plan"]
    assert set(plan) == {
        "architecture_plans", "pretrain_plan", "pretrain_num_input_channels", "recommended_downstream_patchsize",
        "key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe",
    }  # fmt: skip
    assert set(plan["architecture_plans"]) == {
        "arch_class_name",
        "arch_kwargs",
        "arch_kwargs_requiring_import",
    }
    assert set(plan["pretrain_plan"]) == {
        "dataset_name", "plans_name", "original_median_spacing_after_transp", "image_reader_writer", "transpose_forward",
        "transpose_backward", "configurations", "experiment_planner_used",
    }  # fmt: skip
    ((_, configuration),) = plan["pretrain_plan"]["configurations"].items()
    assert set(configuration) == CONFIGURATION
    assert plain(plan) and json.loads((exported / "adaptation_plan.json").read_text()) == plan
    assert configuration["patch_size"] == plan["recommended_downstream_patchsize"] == [32, 64, 64]
    assert configuration["spacing"] == [1.25, 0.7, 0.7]  # 64 x 128 x 128 halved, parts of half an edge
    assert plan["pretrain_plan"]["original_median_spacing_after_transp"] == [1.25, 0.7, 0.7]
    assert plan["key_to_lpe"] is None
    weights = held["network_weights"]
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        assert any(name.startswith(key) for name in weights)
    assert all(f"{key}.weight" in weights for key in plan["keys_to_in_proj"])


def test_round_trip_is_exact_and_nothing_is_stored_twice(exported, resencl_run):
    state = load_file(resencl_run / "checkpoints" / "step-00000010" / "model.safetensors")
    state = {name: value for name, value in state.items() if name.startswith("encoder.")}
    back = from_nnunet(nnunet.read_nnunet(exported / "checkpoint_final.pth"))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    encoder = p2w.load(exported)
    file = p2w.load(exported / "checkpoint_final.pth")  # the card lies beside it
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), file.parameters(), strict=True))
    assert all(torch.equal(value, state[f"encoder.{name}"]) for name, value in encoder.state_dict().items())
    stored = sum(value.numel() * 4 for value in state.values())
    assert (
        exported / "checkpoint_final.pth"
    ).stat().st_size < 1.5 * stored + 500_000  # names, not tensors, are doubled


def test_the_file_alone_is_a_starting_point_as_its_folder_is(exported, tmp_path, capsys):
    """p2w.load, p2w inspect and --init take the same paths."""
    file = exported / "checkpoint_final.pth"
    loaded = p2w.load(file).state_dict()
    for path in (file, exported):
        start = load_start(str(path))
        assert start.network == "resencl" and set(start.pretrained_on) == {"fingerprint", "shards"}
        assert all(torch.equal(value, loaded[name]) for name, value in start.encoder.state_dict().items())
        assert weights_start.main_inspect([str(path)]) == 0 and "--init takes it" in capsys.readouterr().out
        assert resolve_init(str(path)).step == 10
    held = torch.load(file, weights_only=True)
    del held["p2w"]  # as early versions wrote it
    torch.save(held, tmp_path / "checkpoint_final.pth")
    alone = load_start(str(tmp_path / "checkpoint_final.pth"))
    assert alone.report.what == "nnU-Net's names, written by p2w: resencl, width 1"
    assert alone.encoder.input_norm == "unit" and alone.pretrained_on == {}
    assert all(torch.equal(value, loaded[name]) for name, value in alone.encoder.state_dict().items())


def test_the_published_width_goes_by_its_name(exported):
    card = json.loads((exported / "card.json").read_text())
    assert nnunet.nnunet_plan(card)["architecture_plans"]["arch_class_name"].endswith(
        ".unet.ResidualEncoderUNet"
    )
    card["encoder"] |= {"width": 32, "channels": list(ResEncL(1).channels)}
    assert nnunet.nnunet_plan(card)["architecture_plans"]["arch_class_name"] == "ResEncL"


def test_what_the_readme_says_of_normalisation_is_our_input(exported):
    """nnU-Net's CTNormalization is (clip(x, 0.5 %, 99.5 %) - mean) / std."""
    told = intensities([-1000.0, 1000.0])
    text = (exported / "README.md").read_text()
    assert json.dumps(told) in text and "\n## In nnU-Net\n" in text
    hu = np.array([-3000, -1000, -250, 0, 1000, 3071], np.float32)
    theirs = (hu.clip(told["percentile_00_5"], told["percentile_99_5"]) - told["mean"]) / told["std"]
    np.testing.assert_array_equal(theirs, [0, 0, 0.375, 0.5, 1, 1])


def test_the_folder_holds_no_absolute_path(exported):
    assert "absolute paths" not in suspects(exported)
    assert not any(str(exported.parent).encode() in one.read_bytes() for one in exported.iterdir())
    text = nnunet.readme(json.loads((exported / "card.json").read_text()), Path("/home/jane/my weights"))
    assert "jane" not in text and "in the folder that this one, `my weights`" in text
    assert "\npython 'my weights/prepare_nnunet.py' -d ID" in text
    assert "`-pc \"$PWD\"/'my weights/checkpoint_final.pth'`" in text


def test_damaged_folders_and_a_decoder_are_refused_in_a_line(exported, resencl_run, tmp_path):
    with pytest.raises(UserError, match="--what all: nnU-Net takes"):
        export.main([str(resencl_run), "--to", "nnunet", "--what", "all", "--out", str(tmp_path / "o")])
    (tmp_path / "checkpoint_final.pth").write_bytes((exported / "checkpoint_final.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"card\.json: no p2w card"):
        p2w.load(tmp_path)
    (tmp_path / "card.json").write_text((exported / "card.json").read_text())
    with pytest.raises(UserError, match="holds no nnU-Net weights") as refused:
        p2w.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_nnunets_own_code_builds_the_network_and_takes_the_weights(exported):
    """Where nnunetv2 is installed: its network from our plan, stem and stages loaded strictly, as its trainer does."""
    plans = pytest.importorskip("nnunetv2.utilities.get_network_from_plans")
    schemes = pytest.importorskip("nnunetv2.preprocessing.normalization.default_normalization_schemes")
    held = torch.load(exported / "checkpoint_final.pth", weights_only=True)
    plan, weights = held["nnssl_adaptation_plan"], held["network_weights"]
    how = plan["architecture_plans"]
    network = plans.get_network_from_plans(
        how["arch_class_name"], how["arch_kwargs"], how["arch_kwargs_requiring_import"],
        plan["pretrain_num_input_channels"], 3, allow_init=True, deep_supervision=False,
    )  # fmt: skip
    assert (network.key_to_encoder, network.key_to_stem) == (plan["key_to_encoder"], plan["key_to_stem"])
    assert list(network.keys_to_in_proj) == plan["keys_to_in_proj"]
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        part = {
            name.removeprefix(f"{key}."): value
            for name, value in weights.items()
            if name.startswith(f"{key}.")
        }
        network.get_submodule(key).load_state_dict(part)
    mine = {f"encoder.{name}": value for name, value in network.encoder.state_dict().items()}
    assert all(torch.equal(value, mine[name]) for name, value in to_nnunet(from_nnunet(weights)).items())
    x = torch.rand(1, 1, 32, 64, 64)
    ours = p2w.load(exported)
    assert all(torch.equal(a, b) for a, b in zip(ours(x), network.encoder(x), strict=True))
    assert network(x).shape == (1, 3, 32, 64, 64)
    hu = np.random.default_rng(0).integers(-2000, 3000, (8, 8, 8)).astype(np.float32)
    told = intensities([-1000.0, 1000.0])
    scheme = schemes.CTNormalization(intensityproperties=told)
    np.testing.assert_allclose(scheme.run(hu.copy()), (hu.clip(-1000, 1000) + 1000) / 2000, rtol=0, atol=1e-7)


BASE = {
    "plans_name": "nnUNetResEncUNetLPlans", "transpose_forward": [1, 0, 2],
    "foreground_intensity_properties_per_channel": {"0": {"mean": 40.0, "std": 90.0, "max": 3000.0}},
    "configurations": {
        "3d_fullres": {
            "spacing": [0.8, 0.5, 0.8], "patch_size": [96, 160, 96], "batch_size": 2,
            "normalization_schemes": ["CTNormalization"], "data_identifier": "nnUNetPlans_3d_fullres",
            "architecture": {"network_class_name": "x", "arch_kwargs": {"features_per_stage": [32, 64]}},
        }
    },
}  # fmt: skip


def prepared(exported, tmp_path, *options, **changes):
    """The script of the exported folder, as its README runs it, on a dataset of nnU-Net whose plan is BASE."""
    folder = tmp_path / "preprocessed" / "Dataset007_Thin"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nnUNetResEncUNetLPlans.json").write_text(json.dumps({**BASE, **changes}))
    script = [sys.executable, str(exported / "prepare_nnunet.py"), "-d", "7", str(folder.parent), *options]
    return folder, processes.run(script, capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.slow
def test_thin_slices_turn_kernels_spacing_and_patch(exported, resencl_run, tmp_path):
    folder, done = prepared(exported, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    plans = json.loads((folder / "ptPlans__p2w.json").read_text())
    told = plans["configurations"]["3d_fullres"]
    assert (told["spacing"], told["patch_size"]) == ([0.7, 1.25, 0.7], [64, 32, 64])
    assert plans["foreground_intensity_properties_per_channel"]["0"] == {
        **intensities([-1000.0, 1000.0]), "max": 3000.0,
    }  # fmt: skip
    file = Path(plans["pretrain_info"]["checkpoint_path"])
    assert file.is_absolute() and file.parent == folder
    turned = torch.load(file, weights_only=True)["network_weights"]
    plain_weights = torch.load(exported / "checkpoint_final.pth", weights_only=True)["network_weights"]
    for name, value in plain_weights.items():
        assert torch.equal(turned[name], value.transpose(2, 3) if value.ndim == 5 else value), name
    back = from_nnunet(nnunet.read_nnunet(file))  # read by p2w, kernels are z, y, x again
    assert all(torch.equal(value, plain_weights[name]) for name, value in back.items())
    commands = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    readme = (exported / "README.md").read_text().replace("ID", "7")
    assert len(commands) == 2 and all(f"\n{line}\n" in readme for line in commands)
    plain_axes, done = prepared(exported, tmp_path, transpose_forward=[0, 1, 2])
    plans = json.loads((plain_axes / "ptPlans__p2w.json").read_text())
    assert plans["pretrain_info"]["checkpoint_path"] == str((exported / "checkpoint_final.pth").resolve())


@pytest.mark.slow
def test_a_plan_that_does_not_fit_is_one_line(exported, tmp_path):
    mr = json.loads(json.dumps(BASE["configurations"]))
    mr["3d_fullres"]["normalization_schemes"] = ["ZScoreNormalization"]
    for options, changes, told in (
        ((), {"configurations": mr}, "normalised by ZScoreNormalization"),
        ((), {"configurations": {"2d": {}}}, "has no 3d_fullres"),
        ((), {"transpose_forward": [0, 0, 1]}, "each must hold 0, 1 and 2 once"),
        (("--plan", "dataset"), {}, r"its network has \[32, 64\] channels"),
        (("--base", "other"), {}, "no such plan; make it with"),
        (("-d", "8"), {}, "0 folders Dataset008"),
    ):
        _, done = prepared(exported, tmp_path, *options, **changes)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert re.search(told, done.stderr), done.stderr


def test_the_export_turns_for_a_named_dataset(resencl_run, tmp_path):
    """Then nnU-Net's own commands find spacing, patch and kernels in the dataset's axes; p2w reads z, y, x back."""
    (tmp_path / "plans.json").write_text(json.dumps(BASE))
    out = tmp_path / "out"
    given = ["--to", "nnunet", "--nnunet-plans", str(tmp_path / "plans.json"), "--out", str(out)]
    assert export.main([str(resencl_run), *given]) == 0
    plan = json.loads((out / "adaptation_plan.json").read_text())
    configuration = plan["pretrain_plan"]["configurations"]["p2w"]
    assert (configuration["spacing"], configuration["patch_size"]) == ([0.7, 1.25, 0.7], [64, 32, 64])
    assert plan["pretrain_plan"]["transpose_forward"] == [1, 0, 2] and plan[
        "recommended_downstream_patchsize"
    ] == [64, 32, 64]
    ours = p2w.load(resencl_run).state_dict()
    held = torch.load(out / "checkpoint_final.pth", weights_only=True)["network_weights"]
    first = "stem.convs.0.conv.weight"
    assert torch.equal(held[f"encoder.{first}"], ours[first].transpose(2, 3))
    assert all(torch.equal(value, ours[name]) for name, value in p2w.load(out).state_dict().items())
    with pytest.raises(UserError, match="only --to nnunet is for nnU-Net"):
        export.main([str(resencl_run), "--to", "safetensors", *given[2:4]])
    (tmp_path / "plans.json").write_text("{}")
    with pytest.raises(UserError, match="no plans of nnU-Net"):
        export.main([str(resencl_run), *given])

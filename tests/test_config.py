"""Settings: from recipe, file and command line into frozen dataclasses, and nothing but a UserError on the way."""

import dataclasses
import json
import sys

import hypothesis
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2w import config as settings
from p2w.commands.train import RENAMED, parse
from p2w.config import MAY_CHANGE, Config, check_config, config_to_json, flatten, read_config
from p2w.errors import UserError


def changed(name: str, value) -> Config:
    group, field = name.split(".")
    config = Config()
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **{field: value})}
    )


def test_overrides_reach_the_dataclass():
    argv = "demo --train.steps 7 --optim.lr 5e-4 --pretext.size 8 16 24 --train.precision fp32"
    argv += " --pretext.skips --train.channels-last off"
    args, recipe = parse(argv.split())
    assert recipe == "demo"
    assert args.config.train.steps == 7
    assert args.config.optim.lr == 5e-4
    assert args.config.pretext.size == (8, 16, 24)
    assert args.config.train.precision == "fp32"
    assert args.config.pretext.skips and args.config.train.channels_last == "off"
    assert args.config.model.width == 8  # untouched: the recipe's


def test_an_option_of_an_earlier_version_is_refused_with_its_new_name():
    for old, new in RENAMED.items():
        assert new[2:].partition(" ")[0].replace("-", "_").replace(".no_", ".") in flatten(Config())
        with pytest.raises(UserError, match=f"^{old}: is named {new} now; pass that$"):
            parse(["demo", f"{old}=7"])
        with pytest.raises(UserError, match=old):
            parse([old.replace("on-", "on_", 1), "7"])


def test_without_a_recipe_it_is_the_paper_in_runs_paper():
    args, recipe = parse([])
    assert recipe == "paper"
    assert (args.shards, str(args.folder)) == (("shards",), "runs/paper")


def test_json_round_trip_and_a_run_from_its_file(tmp_path):
    config = changed("pretext.size", (8, 16, 24))
    path = tmp_path / "first" / "config.json"
    path.parent.mkdir()
    path.write_text(config_to_json(config))
    assert read_config(path) == config
    args, _ = parse([str(path), "--optim.lr", "0.5"])
    assert args.config == dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))
    assert str(args.folder) == "runs/first-again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b'{"data": {"batch": 16', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "must be an object of settings, got list"),
        (b'{"data": 3}', "data: must be an object of settings, got int"),
        (b'{"date": {}}', "unknown setting date; known are data, pretext"),
        (b'{"data": {"bach": 3}}', "data: unknown setting bach; known are batch, seed, reader_threads"),
        (b'{"data": {"batch": "16"}}', "batch: '16' does not fit int"),
        (b'{"data": {"batch": 16.0}}', "batch: 16.0 does not fit int"),
        (b'{"data": {"batch": true}}', "batch: True does not fit int"),
        (b'{"pretext": {"skips": 1}}', "skips: 1 does not fit bool"),
        (b'{"pretext": {"size": [8, 8]}}', "size: [8, 8] does not fit"),
        (b'{"optim": {"name": "lion"}}', "name: 'lion' does not fit"),
        (b'{"optim": {"lr": null}}', "lr: None does not fit float"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(UserError) as error:
        read_config(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_an_older_version_loads(tmp_path):
    """Its groups of pretexts come in another order, and some settings have older names."""
    older = {
        "data": {"batch": 8, "readers": 3},
        "pretext": {"name": "mae", "size": [16, 32, 32], "volume_fraction": [0.0625, 0.25]},
        "intensity": {"strength": 0.5, "curve": 1.0, "gamma": 3.0},
        "contrast": {"temperature": 0.5, "queue": 64, "both": False},
        "position": {"weight": 0.1},
        "genesis": {"cube": "whole", "blocks": 200},
        "rubik": {"orders": 5, "grid": [1, 2, 2]},
        "mae": {"patch": [2, 4, 4], "ratio": 0.5, "fill": "zero"},
        "train": {"amp": "fp32", "look_every": 7},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(older))
    config = read_config(path)
    assert (config.data.reader_threads, config.train.precision, config.train.probe_every) == (3, "fp32", 7)
    flat = flatten(config)
    for group in ("intensity", "contrast", "position", "genesis", "rubik", "mae"):
        for name, value in older[group].items():
            assert flat[f"{group}.{name}"] == (tuple(value) if isinstance(value, list) else value)
    assert read_config(path) == config and type(config) is Config


@pytest.mark.parametrize(
    ("group", "older", "expected"),
    [
        ("pretext", {"aspect_range": [0.5, 2]}, {"max_aspect": 4.0}),
        ("pretext", {"aspect_range": [0.3, 0.7]}, {"max_aspect": 0.7 / 0.3}),
        ("pretext", {"aspect_range": [1e-300, 1e300]}, {"max_aspect": sys.float_info.max}),
        (
            "optim",
            {"name": "sgd", "betas": [0.8, 0.99]},
            {"name": "sgd", "sgd_momentum": 0.8, "betas": (0.9, 0.999)},
        ),
        ("train", {"channels_last": True}, {"channels_last": "auto"}),
        ("train", {"channels_last": False}, {"channels_last": "off"}),
        ("optim", {"name": "adam", "betas": [0.8, 0.99]}, {"betas": (0.8, 0.99), "sgd_momentum": 0.9}),
    ],
)
def test_older_settings_of_other_units_mean_the_same(tmp_path, group, older, expected):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({group: older}))
    config = read_config(path)
    found = dataclasses.asdict(getattr(config, group))
    assert expected.items() <= found.items()
    path.write_text(config_to_json(config))
    assert read_config(path) == config


@pytest.mark.parametrize("value", [[2, 0.5], [0, 1], 2, ["a", 1], [1, 10**400]])
def test_an_older_aspect_range_that_is_none_is_refused(tmp_path, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"pretext": {"aspect_range": value}}))
    with pytest.raises(UserError, match=r"pretext: unknown setting aspect_range; known are .*max_aspect"):
        read_config(path)


def test_betas_of_sgd_are_refused():
    """They were its momentum in earlier versions."""
    with pytest.raises(UserError, match=r"is Adam's, and optim\.name=sgd; pass --optim\.sgd-momentum 0\.8$"):
        parse(["demo", "--optim.name", "sgd", "--optim.betas", "0.8", "0.99"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: No such file.*name a recipe"):
        read_config(tmp_path / "none.json")


words = st.sampled_from(["", "adam", "torch", "batch", "0"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=4,
)
groups = {group: list(values) for group, values in dataclasses.asdict(Config()).items()}
trees = st.fixed_dictionaries(
    {},
    optional={
        group: json_values | st.dictionaries(st.sampled_from(names), json_values, max_size=3)
        for group, names in groups.items()
    },
)


@pytest.mark.slow
@hypothesis.settings(max_examples=200, deadline=None)
@given(tree=trees)
@example(tree={"optim": {"lr": 10**400}})
@example(tree={"optim": {"betas": [0.9, [0.9]]}})
def test_any_json_gives_a_config_or_a_user_error(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(tree))
    try:
        config = read_config(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert settings.flatten(config).keys() == flatten(Config()).keys()


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("data.batch", 0, "must be at least 1"),
        ("data.reader_threads", -1, "must be at least 0"),
        ("train.steps", -1, "must be at least 0"),
        ("train.validate_every", 0, "must be at least 1"),
        ("train.keep", 0, "must be at least 1"),
        ("train.keep_every", -1, "must be at least 0"),
        ("train.checkpoint_minutes", -0.5, "must be at least 0"),
        ("train.checkpoint_minutes", float("inf"), "must be finite"),
        ("optim.lr", -1e-3, "must be at least 0"),
        ("optim.lr", float("nan"), "must be at least 0"),
        ("optim.lr", float("inf"), "must be finite"),
        ("optim.accumulate", 0, "must be at least 1"),
        ("optim.betas", (0.9, 1.0), "0 <= beta < 1"),
        ("optim.betas", (float("nan"), 0.9), "0 <= beta < 1"),
        ("optim.sgd_momentum", 1.0, "0 <= momentum < 1"),
        ("optim.sgd_momentum", -0.1, "0 <= momentum < 1"),
        ("train.seed", -1, "must be at least 0"),
        ("train.seed", 2**64, "must be below"),
        ("model.width", 0, "must be at least 1"),
        ("pretext.volume_fraction", (0.5, 0.25), "0 < low <= high <= 1"),
        ("pretext.volume_fraction", (0.0, 0.25), "0 < low <= high <= 1"),
        ("pretext.max_aspect", 0.5, "must be at least 1; pass --pretext.max-aspect"),
        ("pretext.max_aspect", float("inf"), "must be finite"),
        ("pretext.window_hu", (1000.0, 1000.0), "first must be below the second"),
        ("pretext.window_hu", (-float("inf"), 1000.0), "first must be below the second"),
        ("intensity.gamma", 0.5, "must be from 1 to 10; pass --intensity.gamma"),
        ("contrast.weight", 2e6, "must be from 0 to 1000000.0; pass --contrast.weight"),
        ("contrast.sinkhorn_iterations", 0, "must be from 1 to 1000; pass --contrast.sinkhorn-iterations"),
        ("position.weight", -1.0, "must be from 0 to 1000; pass --position.weight"),
        ("genesis.blocks", 0, "must be from 1 to 1000000; pass --genesis.blocks"),
        ("rubik.gap", 0.6, "must be from 0 to 0.5; pass --rubik.gap"),
        ("rubik.grid", (2, 0, 2), "needs three numbers of at least 1; pass e.g. --rubik.grid 2 2 2"),
        ("mae.patch", (0, 8, 8), "needs three numbers of at least 1; pass e.g. --mae.patch 4 8 8"),
        ("mae.ratio", float("nan"), "must be finite; pass --mae.ratio"),
    ],
)
def test_each_check_names_value_rule_and_setting(name, value, rule):
    with pytest.raises(UserError) as error:
        check_config(changed(name, value))
    shown = str(error.value)
    assert shown.startswith(f"{name}=") and rule in shown and "\n" not in shown


def test_settings_that_may_change_exist():
    assert set(flatten(Config())) >= MAY_CHANGE

"""The Hub through its own client, against a server of its API: push, load, pin, offline, and what is never sent."""

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
from hub_server import TOKEN, hub_server

import p2w
from p2w.commands import train
from p2w.commands.finetune import label_of
from p2w.config import read_config
from p2w.errors import UserError
from p2w.finetune.init import resolve_init
from p2w.weights import export
from p2w.weights.hub import HubName, parse_hub_name, pin
from p2w.weights.start import load_start

LICENCES = ["--licence", "cc-by-4.0", "--data-licence", "LUNA16, CC BY 4.0"]


def fresh_client():
    """The client reads its environment when it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A server, and a client that knows it and a token."""
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("needs huggingface_hub: pip install 'parts2whole[hub]'")
    with hub_server() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.address)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.delenv("HF_HUB_CACHE", raising=False)
        fresh_client()
        yield hub
    fresh_client()


@pytest.fixture(scope="module")
def pushed(client, trained_run):
    """The run published: hash of the commit, and what the command wrote to its outputs."""
    assert export.main_push([str(trained_run), "org/small", *LICENCES]) == 0
    return client.branches["org/small"]["main"]


def equal(one, two):
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_what_is_pushed_is_what_is_loaded(client, pushed, trained_run):
    files = client.commits["org/small", pushed]
    assert set(files) == {".gitattributes", "model.safetensors", "card.json", "README.md"}
    assert client.private == {"org/small": True}
    assert any(asked.startswith("PUT /upload/") for asked in client.asked)
    encoder = p2w.load("hf://org/small")
    assert equal(encoder, p2w.load(trained_run)) and encoder.strides == (1, 2, 4, 8)
    assert equal(p2w.load(f"hf://org/small@{pushed}"), encoder)
    client.commit("org/other", {"sub/theirs.safetensors": files["model.safetensors"]})
    assert equal(p2w.load("hf://org/other/sub/theirs.safetensors"), encoder)
    told = p2w.card("hf://org/small")
    assert told == json.loads(files["card.json"])
    assert told["training"]["step"] == 10 and told["training"]["data"] == {"fingerprint": "0123456789abcdef"}
    page = files["README.md"].decode()
    assert page.startswith(
        "---\nlibrary_name: p2w\nlicense: cc-by-4.0\npipeline_tag: image-feature-extraction\n"
    )
    assert (
        "LUNA16, CC BY 4.0" in page and "patents 11,915,417" in page and 'p2w.load("hf://org/small")' in page
    )


def test_a_starting_point_is_pinned_to_its_commit(client, pushed, trained_run, tmp_path):
    init = resolve_init("hf://org/small")
    assert init.source == f"hf://org/small@{pushed}" and init.step == 10 and init.pretext == "parts2whole"
    assert label_of("hf://org/small") == "small" and label_of("hf://org/unet-1.5@v2/a.pth") == "unet-1.5"
    start = load_start(init.source)
    assert start.source == init.source and start.pretrained_on == {"fingerprint": "0123456789abcdef"}
    run = tmp_path / "run"
    argv = ["demo", "--model.width", "2", "--init", "hf://org/small", "--run-dir", str(run)]
    first = train.parse(argv)[0].config
    assert first.model.init == f"hf://org/small@{pushed}"
    run.mkdir()
    (run / "config.json").write_text(train.settings.config_to_json(first))
    newer = client.commit("org/small", {"card.json": b"{}"})
    try:
        assert train.parse(argv)[0].config == first  # a run keeps the commit that it began with
        assert read_config(run / "config.json") == first
        assert pin("hf://org/small") == f"hf://org/small@{newer}"
        assert pin("hf://org/small@main", first.model.init) == f"hf://org/small@{newer}"
        assert pin("runs/other", first.model.init) == "runs/other" and pin("random") == "random"
    finally:
        client.branches["org/small"]["main"] = pushed


def test_offline_it_comes_from_the_cache(client, pushed, monkeypatch):
    p2w.load("hf://org/small")
    asked = len(client.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fresh_client()
    try:
        assert resolve_init("hf://org/small").source == f"hf://org/small@{pushed}"
        assert p2w.load(f"hf://org/small@{pushed}").channels == (4, 8, 16, 32)
        with pytest.raises(UserError, match="hf://org/other: not in the local cache"):
            p2w.load("hf://org/other")
        assert len(client.asked) == asked
    finally:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        fresh_client()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf://org/absent", "hf://org/absent: no such repository, or a private one"),
        ("hf://org/small@v9", "hf://org/small@v9: no such revision"),
        ("hf://org/small/other.pt", "hf://org/small/other.pt: no such file in it"),
    ],
)
def test_what_is_not_there_is_one_line_without_the_token(client, pushed, name, said):
    with pytest.raises(UserError) as error:
        load_start(name)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", "its owner has to let you in: ask on its page"),
        (401, "RepoNotFound", "no such repository, or a private one; log in"),
        (404, "RepoNotFound", "no such repository, or a private one; log in"),
        (403, "", "the Hub says 403: log in with a token that may do this"),
        (410, "", "the Hub answers with status 410; try again later"),
    ],
)
def test_a_refusal_is_said_as_what_it_is(client, pushed, monkeypatch, status, code, said):
    """Not as a network that cannot be reached."""
    monkeypatch.setitem(client.refused, "org/theirs", (status, code))
    with pytest.raises(UserError) as error:
        p2w.load("hf://org/theirs@v1")
    assert str(error.value).startswith(f"hf://org/theirs@v1: {said}")
    assert "\n" not in str(error.value) and TOKEN not in str(error.value)


def test_without_a_token_nothing_is_published(client, trained_run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="hf://org/new: not published: the Hub says 401: log in") as error:
        export.main_push([str(trained_run), "org/new", *LICENCES])
    said = str(error.value) + "".join(capsys.readouterr())
    assert "hf_wrong" not in said and TOKEN not in said and "org/new" not in client.branches


def test_the_dry_run_sends_nothing(client, trained_run, capsys):
    asked = len(client.asked)
    assert export.main_push([str(trained_run), "org/dry", *LICENCES, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "nothing was sent" in said and "cc-by-4.0" in said and len(client.asked) == asked


def test_another_branch_leaves_main_alone(client, pushed, trained_run):
    assert (
        export.main_push([str(trained_run), "org/small", *LICENCES, "--branch", "late", "--step", "20"]) == 0
    )
    assert client.branches["org/small"]["main"] == pushed != client.branches["org/small"]["late"]
    assert not equal(p2w.load("hf://org/small@late"), p2w.load("hf://org/small"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("at /scratch/jdoe/scans", "an absolute path, '/scratch/jdoe/scans'"),
        (r"C:\Users\jdoe\scans", "an absolute path"),
        ("~/scans/ours", "an absolute path"),
        ("below /scans", "an absolute path, '/scans'"),
        ("by jane.doe@hospital.org", "an e-mail address, 'jane.doe@hospital.org'"),
        ("s3://bucket/scans", "an address on a network"),
        ("on 10.1.2.3", "an address on a network"),
        ("1.3.6.1.4.1.14519.5.2.1", "a DICOM uid"),
    ],
)
def test_whatever_names_a_person_or_a_machine_is_not_sent(trained_run, tmp_path, text, said):
    options = export.PushOptions(trained_run, "org/name", "mit", text)
    files, _ = export.files_to_publish(options, HubName("org/name"))
    found = [line for name, data in files.items() for line in export.private_text(name, data)]
    assert {line.partition(" has ")[0].partition(":")[0].partition(".data_licence")[0] for line in found} == {
        "model.safetensors", "card.json", "README.md",
    }  # fmt: skip
    assert all(said in line for line in found)
    with pytest.raises(UserError, match=r"not published: model.safetensors: p2w.data_licence has"):
        export.main_push([str(trained_run), "org/name", "--licence", "mit", "--data-licence", text])


def test_the_card_of_a_run_tells_no_path_or_start(trained_run):
    options = export.PushOptions(trained_run, "org/name", "mit", "ours")
    files, step = export.files_to_publish(options, HubName("org/name"))
    assert step == 10 and not [
        line for name, data in files.items() for line in export.private_text(name, data)
    ]
    card = json.loads(files["card.json"])
    assert "command" not in card["training"] and "shards" not in card["training"]["data"]
    card["training"]["config"]["model"]["init"] = "/home/jdoe/runs/first/weights.pt"
    card["training"]["data"]["shards"] = "/data/scans"
    assert export.public_card(card)["training"]["config"]["model"]["init"] == "weights.pt"
    assert "shards" not in export.public_card(card)["training"]["data"]
    card["training"]["config"]["model"]["init"] = "hf://org/small@0123"
    assert export.public_card(card)["training"]["config"]["model"]["init"] == "hf://org/small@0123"


def test_names_are_taken_apart():
    assert parse_hub_name("hf://org/name") == HubName("org/name")
    assert parse_hub_name("hf:/org/name@v1") == HubName("org/name", "v1")  # as a Path spells it
    whole = HubName("org/name", "v1", "sub/file.pth")
    assert (
        parse_hub_name("hf://org/name@v1/sub/file.pth") == whole
        and str(whole) == "hf://org/name@v1/sub/file.pth"
    )
    assert str(replace(whole, file="model.safetensors")) == "hf://org/name@v1"
    for wrong in ("hf://name", "hf://org/name@", "hf://org/name/../x", "hf://org/na me"):
        with pytest.raises(UserError, match="must be hf://organisation/name"):
            parse_hub_name(wrong)
    with pytest.raises(UserError, match="--licence CC BY"):
        export.main_push(["runs/x", "org/name", "--licence", "CC BY", "--data-licence", "ours"])
    with pytest.raises(UserError, match="runs/x: is no run of p2w train"):
        export.main_push(["runs/x", "org/name", *LICENCES])

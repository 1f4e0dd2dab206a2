"""Write the weights of a run for other programs.

    p2w export runs/paper --to safetensors       one file with its card inside: p2w.load(FILE), or safetensors alone
    p2w export runs/paper --to models-genesis    torch file for Models Genesis' class (--what all), kernels x, y, z
    p2w export runs/paper --to hub-folder        model.safetensors, card.json, README.md: upload it as it is
    p2w export runs/resencl --to nnunet          folder with nnU-Net's checkpoint_final.pth; of a run of --model.name resencl

The best checkpoint by validation, else the newest, unless --step names one.
"""

import contextlib
import copy
import functools
import getpass
import io
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import save
from torch import Tensor

from p2w.errors import UserError
from p2w.files import refuse_unwritable, write_atomic
from p2w.shards.training_scans import SEEN, without_patients
from p2w.train.checkpoint import Checkpoints
from p2w.weights import nnunet
from p2w.weights.card import exported_card, markdown, model_card
from p2w.weights.foreign import AXIS_ORDER, check_checkpoint, not_for_genesis_class, to_genesis
from p2w.weights.hub import WEIGHTS, HubName, hub_client, hub_problem, is_hub_name, parse_hub_name
from p2w.weights.load import filled_encoder, find_checkpoint

State = dict[str, Tensor]


@dataclass(frozen=True)
class ExportOptions:
    """Command line of `p2w export`."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    to: Literal["safetensors", "models-genesis", "nnunet", "hub-folder"]
    """The format to write."""
    out: Path | None = None
    """File or folder to write; default is in RUN/export."""
    step: int | None = None
    """The checkpoint; default is the best by validation, else the newest."""
    what: Annotated[Literal["encoder", "all"], tyro.conf.arg(aliases=["--holds"])] = "encoder"
    """The encoder alone, or all weights with the decoder."""
    nnunet_plans: Path | None = None
    """Plans of a dataset of nnU-Net, a JSON file: kernels, spacing and patch are turned to that dataset's axes."""


def main(argv: list[str]) -> int:
    """The command: read the checkpoint, check its tensors, write the export."""
    options = tyro.cli(ExportOptions, args=argv, prog="p2w export", description=__doc__)
    trained = find_checkpoint(options.run, options.step)
    model, form = trained.config.model, FORMATS[options.to]
    if form.takes and model.name != form.takes:
        raise UserError(f"{options.run}: trained {model.name}, and {form.why}; pass --to safetensors")
    if form.encoder_alone and options.what == "all":
        raise UserError(f"--what all: {form.why}, and its decoder is its own; leave it out")
    if options.nnunet_plans is not None and options.to != "nnunet":
        raise UserError(
            f"--nnunet-plans {options.nnunet_plans}: only --to nnunet is for nnU-Net; leave it out"
        )
    write = form.write
    if options.nnunet_plans is not None:
        write = functools.partial(_nnunet, axes=nnunet.axes_of(options.nnunet_plans))
    snapshot = Checkpoints(trained.run / "checkpoints").load(trained.step)
    check_checkpoint(snapshot.model, str(trained.folder))
    encoder = filled_encoder(model.name, model.width, snapshot.model, str(trained.folder))
    state = {
        k: v.contiguous()
        for k, v in snapshot.model.items()
        if options.what == "all" or k.startswith("encoder.")
    }
    card, unhashed = exported_card(model_card(trained, encoder, options.what), trained.run)
    out = options.out or trained.run / "export" / f"{trained.run.name}-step-{trained.step:08d}{form.ending}"
    with refuse_unwritable(out, "name another with --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write(out, state, card)
    print(
        f"{out}: {options.what} of step {trained.step}, {sum(v.numel() for v in state.values()) / 1e6:.2f} M values"
    )
    if unhashed:
        print(
            f"its card has no hashes of the training scans, so the leak check will need the set: {unhashed}"
        )
    return 0


def _safetensors(out: Path, state: State, card: dict[str, Any]) -> None:
    write_atomic(out, save(state, {"format": "pt", "p2w": json.dumps(card, sort_keys=True)}))


def _models_genesis(out: Path, state: State, card: dict[str, Any]) -> None:
    """In the form of Models Genesis' PyTorch code: names begin with `module.`, kernels are x, y, z as its arrays are.

    Loads with weights_only=True. Says so where its own class cannot load the file.
    """
    network = card["encoder"]["name"]
    if network != "unet3d":
        raise UserError(
            f"{out}: Models Genesis' names are for unet3d, not {network}; export --to safetensors"
        )
    packed = io.BytesIO()
    tensors = {f"module.{k}": v for k, v in to_genesis(state).items()}
    torch.save({"state_dict": tensors, AXIS_ORDER: "xyz", "p2w": json.dumps(card)}, packed)
    write_atomic(out, packed.getvalue())
    if why := not_for_genesis_class(state):
        print(f"{out}: Models Genesis' own class, UNet3D, cannot load this file: {why}")


def _hub_folder(out: Path, state: State, card: dict[str, Any]) -> None:
    with _folder(out) as temporary:
        _safetensors(temporary / "model.safetensors", state, card)
        write_atomic(temporary / "card.json", json.dumps(card, indent=2, sort_keys=True))
        write_atomic(temporary / "README.md", markdown(card))


def _nnunet(out: Path, state: State, card: dict[str, Any], axes: list[int] | None = None) -> None:
    with _folder(out) as temporary:
        nnunet.write_nnunet(temporary, state, card, axes)
        write_atomic(temporary / "card.json", json.dumps(card, indent=2, sort_keys=True))
        write_atomic(temporary / "README.md", markdown(card) + nnunet.readme(card, out, axes))


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A temporary folder, renamed to `out` at the end; an existing `out` is replaced only if it is an export."""
    if out.exists() and not (out / "card.json").is_file():
        raise UserError(f"{out}: exists and is no folder that p2w export wrote; name another with --out")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)


@dataclass(frozen=True)
class Format:
    """A format. `takes` is the only encoder that it supports, "" for any; `why` is the reason."""

    ending: str
    write: Callable[[Path, State, dict[str, Any]], None]
    takes: str = ""
    why: str = ""
    encoder_alone: bool = False


FORMATS = {
    "safetensors": Format(".safetensors", _safetensors),
    "models-genesis": Format(".pt", _models_genesis, "unet3d", "Models Genesis is the paper's U-Net, unet3d"),
    "nnunet": Format("-nnunet", _nnunet, "resencl", "nnU-Net takes its own residual encoder, resencl, alone", True ),
    "hub-folder": Format("", _hub_folder),
}  # fmt: skip


PUSH_USAGE = """Publish a run's encoder on the Hugging Face Hub, described; nothing in it names a person or a machine.

    p2w push runs/paper org/name --licence cc-by-4.0 --data-licence "LUNA16, CC BY 4.0"
    p2w push runs/paper org/name --licence other --data-licence "our own scans, not public" --dry-run
    p2w.load("hf://org/name")                                   what others type

model.safetensors with its card inside, card.json and README.md in one commit: what `p2w export --to hub-folder` writes, less
the command, paths and addresses of data sets. They are searched for absolute paths, addresses, names and uids first; what is
found is named, and nothing is sent. The repository is made private unless --public. Needs the extra parts2whole[hub]; log in
with `hf auth login` or HF_TOKEN. The best checkpoint by validation, else the newest, unless --step names one.
"""
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
PIPELINE = "image-feature-extraction"


@dataclass(frozen=True)
class PushOptions:
    """Command line of `p2w push`."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    name: tyro.conf.Positional[str]
    """Repository, organisation/name; made where there is none."""
    licence: str
    """Licence of the weights, as the Hub names it: apache-2.0, cc-by-4.0, cc-by-nc-4.0, …, other."""
    data_licence: str
    """Which scans the weights were trained on and under what licence, in words; it stands in the card."""
    step: int | None = None
    """The checkpoint; default is the best by validation, else the newest."""
    branch: str = "main"
    """Branch to commit to."""
    public: tyro.conf.FlagCreatePairsOff[bool] = False
    """Make a new repository public."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the page that people would see to standard output, and send nothing."""


def main_push(argv: list[str]) -> int:
    """The command: read the checkpoint, describe it, search what would be sent, send it."""
    options = tyro.cli(PushOptions, args=argv, prog="p2w push", description=PUSH_USAGE)
    repo = parse_hub_name(options.name if is_hub_name(options.name) else f"hf://{options.name}")
    if repo.revision is not None or repo.file != WEIGHTS:
        raise UserError(f"{options.name}: must be organisation/name; --branch names a branch")
    if not LICENCE.fullmatch(options.licence) or not options.data_licence.strip():
        raise UserError(
            f"--licence {options.licence} --data-licence {options.data_licence!r}: a name of the Hub's, such as cc-by-4.0; "
            "and words on the training data"
        )
    if not (options.run / "checkpoints").is_dir():
        raise UserError(f"{options.run}: is no run of p2w train; its encoders are what can be published")
    files, step = files_to_publish(options, repo)
    if found := [said for name, data in files.items() for said in private_text(name, data)]:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(
            f"{options.run}: not published: {found[0]}{more}; what goes up must name no person, path or machine"
        )
    if options.dry_run:
        print(files["README.md"].decode())
        print(
            f"{repo}: nothing was sent; {', '.join(f'{name} {len(data):,} bytes' for name, data in files.items())}"
        )
        return 0
    pinned = upload(repo, files, options, f"step {step}, by p2w push")
    print(f"{pinned}: step {step}, {sum(map(len, files.values())) / 2**20:.1f} MiB")
    return 0


def files_to_publish(options: PushOptions, repo: HubName) -> tuple[dict[str, bytes], int]:
    """The files by name, and the step of the checkpoint. Raises UserError for a run without one."""
    trained = find_checkpoint(options.run, options.step)
    model = trained.config.model
    snapshot = Checkpoints(trained.run / "checkpoints").load(trained.step)
    encoder = filled_encoder(model.name, model.width, snapshot.model, str(trained.folder))
    state = {
        name: value.contiguous() for name, value in snapshot.model.items() if name.startswith("encoder.")
    }
    card, _ = exported_card(model_card(trained, encoder, "encoder"), trained.run)
    card = public_card(card)
    card |= {"repository": str(repo), "pipeline_tag": PIPELINE}
    card |= {"licence": options.licence, "data_licence": options.data_licence.strip()}
    said = json.dumps(card, sort_keys=True)
    files = {
        WEIGHTS: save(state, {"format": "pt", "p2w": said}),
        "card.json": json.dumps(card, indent=2, sort_keys=True).encode(),
        "README.md": markdown(card).encode(),
    }
    return files, trained.step


def public_card(card: dict[str, Any]) -> dict[str, Any]:
    """The card without the command, and without where its data set and its starting point lay; their names stay.

    Hashes of training scans stay too, those of patients do not.
    """
    card = copy.deepcopy(card)
    training = card["training"]
    training.pop("command", None)
    data = training["data"]
    data.pop("shards", None)
    if SEEN in data:
        # Identifiers of patients are few: whoever knows the salt can try them out, and a page on the Hub is for everybody.
        data[SEEN] = without_patients(data[SEEN], "a published card has no hashes of them")
        if any(private_text("card.json", json.dumps(data[SEEN]).encode())):
            del data[SEEN]
    if isinstance(training.get("data_set"), dict):
        training["data_set"].pop("mixture", None)
    model = training["config"].get("model", {})
    init = str(model.get("init", ""))
    if init and not is_hub_name(init):
        model["init"] = PurePath(init.rpartition("/")[2]).name
    return card


PRIVATE = {
    "an absolute path": re.compile(r"(?<![\w.:/<-])/[\w.+@-]+[\w+@-](?:/[\w.+@-]*[\w+@-])*|\b[A-Za-z]:\\[\w\\.-]+|(?<!\w)~/[\w./-]+|\bfile://\S+"),
    "an address on a network": re.compile(r"\b(?:https?|s3|gs|ftp|ssh)://(?!huggingface\.co\b)\S+|\b\d{1,3}(?:\.\d{1,3}){3}\b(?!\.\d)"),
    "an e-mail address": re.compile(r"\b[\w.+-]+@[\w-]+\.[a-zA-Z][\w.-]*\b"),
    "a DICOM uid": re.compile(r"\b[0-2](?:\.\d+){5,}\b"),
}  # fmt: skip


def private_text(name: str, data: bytes) -> Iterator[str]:
    """One phrase for every piece of text in a file of weights, JSON or Markdown that names a person, a path or a machine."""
    for where, text in _texts(name, data):
        for what, pattern in PRIVATE.items():
            for found in pattern.finditer(text):
                yield f"{where} has {what}, {found[0][:60]!r}"
        for what, word in _own_names().items():
            if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text):
                yield f"{where} has {what}, {word!r}"


def _texts(name: str, data: bytes) -> Iterator[tuple[str, str]]:
    """(where, text) for every text that people could read in a file."""
    if name.endswith(".safetensors"):
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        for key, text in header["__metadata__"].items():
            yield from _strings(json.loads(text) if key == "p2w" else text, f"{name}: {key}")
    elif name.endswith(".json"):
        yield from _strings(json.loads(data), name)
    else:
        yield name, data.decode()


def _strings(tree: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every string in a JSON value, keys too, with its dotted path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield where, str(key)
            yield from _strings(value, f"{where}.{key}")
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value, where)
    elif isinstance(tree, str):
        yield where, tree


def _own_names() -> dict[str, str]:
    """The names of this user and this machine, where they identify anything: `root` and `localhost` do not."""
    names = {"this machine's name": socket.gethostname()}
    with contextlib.suppress(KeyError, OSError):  # a user without a name
        names["this user's name"] = getpass.getuser()
    return {what: name for what, name in names.items() if len(name) > 3 and name not in COMMON}


COMMON = frozenset(
    {"root", "user", "ubuntu", "debian", "admin", "docker", "localhost", "data", "train", "paper"}
)


def upload(repo: HubName, files: dict[str, bytes], options: PushOptions, message: str) -> HubName:
    """Make the repository where there is none, and commit the files at once; the name pinned to the commit.

    Raises UserError in one line where the Hub refuses or cannot be reached.
    """
    hub = hub_client()
    try:
        api = hub.HfApi()
        api.create_repo(repo.repo, private=not options.public, exist_ok=True)
        if options.branch != "main":
            api.create_branch(repo.repo, branch=options.branch, exist_ok=True)
        added = [
            hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()
        ]
        done = api.create_commit(repo.repo, added, commit_message=message, revision=options.branch)
    except (
        Exception
    ) as error:  # the client raises errors of its own, of its HTTP client and of the file system
        raise UserError(f"{repo}: not published: {hub_problem(error)}") from error
    return HubName(repo.repo, str(done.oid))

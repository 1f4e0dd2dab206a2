"""Write the weights of a run for other programs.

    p2w export runs/paper --to safetensors       one file with its card inside: p2w.load(FILE), or safetensors alone
    p2w export runs/paper --to models-genesis    torch file for Models Genesis' class (--what all), kernels x, y, z
    p2w export runs/paper --to hub-folder        model.safetensors, card.json, README.md: upload it as it is
    p2w export runs/resencl --to nnunet          folder with nnU-Net's checkpoint_final.pth; of a run of --model.name resencl

The best checkpoint by validation, else the newest, unless --step names one.
"""

import contextlib
import functools
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import save
from torch import Tensor

from p2w.errors import UserError
from p2w.files import write_atomic
from p2w.train.checkpoint import Checkpoints
from p2w.weights import nnunet
from p2w.weights.card import exported_card, markdown, model_card
from p2w.weights.foreign import AXIS_ORDER, check_tensors, not_for_genesis_class, to_genesis
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
    check_tensors(snapshot.model, str(trained.folder))
    encoder = filled_encoder(model.name, model.width, snapshot.model, str(trained.folder))
    state = {
        k: v.contiguous()
        for k, v in snapshot.model.items()
        if options.what == "all" or k.startswith("encoder.")
    }
    card, unhashed = exported_card(model_card(trained, encoder, options.what), trained.run)
    out = options.out or trained.run / "export" / f"{trained.run.name}-step-{trained.step:08d}{form.ending}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(out, state, card)
    except OSError as error:
        raise UserError(f"{out}: not written ({error.strerror or error}); name another with --out") from error
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
    torch.save(
        {
            "state_dict": {f"module.{k}": v for k, v in to_genesis(state).items()},
            AXIS_ORDER: "xyz",
            "p2w": json.dumps(card),
        },
        packed,
    )
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
    "nnunet": Format(
        "-nnunet", _nnunet, "resencl", "nnU-Net takes its own residual encoder, resencl, alone", True
    ),
    "hub-folder": Format("", _hub_folder),
}

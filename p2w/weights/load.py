"""`p2w.load`: the encoder from a run, a checkpoint or an exported file, ready to be fine-tuned."""

import contextlib
import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from p2w import config as settings
from p2w.errors import UserError
from p2w.files import no_duplicate_keys
from p2w.model import Encoder, build_encoder
from p2w.model.conv import let_train
from p2w.model.encoder import InputNorm
from p2w.shards.training_scans import SEEN
from p2w.train.checkpoint import Checkpoints
from p2w.weights import nnunet
from p2w.weights.card import Trained, data_of, model_card
from p2w.weights.foreign import UNREADABLE, check_archive, check_checkpoint, check_tensors, genesis_state
from p2w.weights.hub import download, is_hub_name
from p2w.weights.nnunet import from_nnunet

HEADER = 100_000_000  # bytes: safetensors' own limit


@dataclass(frozen=True)
class LoadedWeights:
    """The weights of a run, a checkpoint or an exported file; names are `encoder.…` and, in some, `decoder.…`."""

    name: str
    width: int
    state: dict[str, Tensor]
    where: str
    data: dict[str, str]
    """`fingerprint` and `shards` of the set it was trained on."""
    in_channels: int = 1
    input_norm: InputNorm = "unit"
    """How the network's input is normalised: "unit", [0, 1], after our pretraining; published weights may need another."""


def load(path: str | Path) -> Encoder:
    """The encoder in a run folder (its best checkpoint, else the newest), a checkpoint, an exported file or folder, or on
    the Hugging Face Hub: "hf://org/name", "hf://org/name@revision".

    It is in training mode, float32 on the CPU, with `.channels` and `.strides`. Biases that a batch norm cancels are frozen,
    all other weights are trainable. Executes no code from the file.
    Raises UserError when it is none of these, or tensors are missing or of another shape.
    """
    weights = read_weights(Path(path))
    encoder = filled_encoder(weights.name, weights.width, weights.state, weights.where, weights.in_channels)
    encoder.input_norm = weights.input_norm
    return encoder


def card(path: str | Path) -> dict[str, Any]:
    """The model card of what `load` takes: input (window, axes, size, spacing), encoder, training; plain JSON values.

    Raises UserError when there is none.
    """
    path = download(path)[0] if is_hub_name(path) else Path(path)
    step = None
    if (path / "meta.json").is_file():
        path, step = path.resolve().parent.parent, int(path.resolve().name.removeprefix("step-"))
    if not (path / "checkpoints").is_dir():
        return exported(path)[1]
    trained = find_checkpoint(path, step)
    with torch.device("meta"):
        encoder = build_encoder(trained.config.model.name, trained.config.model.width)
    return model_card(trained, encoder, "all")


def read_weights(path: Path) -> LoadedWeights:
    """All weights at a path that `load` accepts. Raises UserError as `load` does."""
    if is_hub_name(path):
        found, pinned = download(path)
        return replace(read_weights(found), where=str(pinned))
    if path.is_dir() and (path / "checkpoints").is_dir():
        path = find_checkpoint(path).folder
    if path.is_dir() and (path / "meta.json").is_file():
        path = path.resolve()  # checkpoints/latest is a link
        number = path.name.removeprefix("step-")
        if not number.isdecimal():
            raise UserError(
                f"{path}: is no checkpoint of a run, whose name is step-NUMBER; name its run folder"
            )
        trained = find_checkpoint(path.parent.parent, int(number))
        snapshot = Checkpoints(path.parent).load(trained.step)
        check_checkpoint(snapshot.model, str(path))
        model = trained.config.model
        return LoadedWeights(model.name, model.width, snapshot.model, str(path), data_of(trained.run))
    file, card = exported(path)
    try:
        name, width = str(card["encoder"]["name"]), int(card["encoder"]["width"])
        in_channels = int(card["encoder"].get("in_channels", 1))
        input_norm = next(one for one in get_args(InputNorm) if one == card["encoder"].get("feeding", "unit"))
    except (LookupError, TypeError, ValueError, StopIteration) as error:
        raise UserError(
            f"{file}: its card does not say which encoder ({error}); export the run again"
        ) from error
    try:
        state = _state(file)
        return LoadedWeights(name, width, state, str(file), trained_on(card), in_channels, input_norm)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{file}: cannot be read ({error}); copy it again") from error


def _state(file: Path) -> dict[str, Tensor]:
    """The tensors of an exported file of any format, under our names, those of floats as float32. Raises UserError."""
    if file.name != nnunet.CHECKPOINT and not is_torch_file(file):
        return _sound(load_file(file), file)
    if file.name == nnunet.CHECKPOINT or "network_weights" in _torch_file(file):
        return _sound(from_nnunet(nnunet.read_nnunet(file)), file)
    return _sound(genesis_state(_torch_file(file)), file)


def _sound(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors, those of floats as float32: others may have halved their precision. Raises UserError."""
    check_archive(file)
    floats = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    check_tensors(floats, str(file))
    return floats


def exported(path: Path) -> tuple[Path, dict[str, Any]]:
    """The exported file of weights at `path`, or in the folder `path`, and its card. Raises UserError when there is none.

    In nnU-Net's folder the card is a file beside the weights; a file that was moved alone has it inside.
    """
    file = path
    if path.is_dir():
        file = path / (nnunet.CHECKPOINT if (path / nnunet.CHECKPOINT).is_file() else "model.safetensors")
    if file.name == nnunet.CHECKPOINT and file.is_file():
        try:
            return file, read_json(file.with_name("card.json"))
        except UserError as error:
            with contextlib.suppress(UserError):
                return file, read_card(file)
            raise error
    return file, read_card(file)


def trained_on(card: dict[str, Any]) -> dict[str, str]:
    """Fingerprint and location of the data set that a card names; empty when it names none."""
    return {str(k): str(v) for k, v in _data_entry(card).items() if k != SEEN}


def _data_entry(card: dict[str, Any]) -> dict[str, Any]:
    """What a card says of the data set; empty where it says nothing."""
    training = card.get("training")
    data = training.get("data") if isinstance(training, dict) else None
    return data if isinstance(data, dict) else {}


def hashed_scans_of(init: str) -> Any:
    """The hashes of training scans in the card of an exported file, or of one on the Hub; None where it has none."""
    try:
        return _data_entry(exported(download(init)[0] if is_hub_name(init) else Path(init))[1]).get(SEEN)
    except UserError:
        return None


def find_checkpoint(run: Path, step: int | None = None) -> Trained:
    """A checkpoint of a run: the one asked for, else the best, else the newest. Raises UserError when there is none."""
    config = settings.read_config(run / "config.json")
    settings.refuse_edited_config(run, config)
    checkpoints = Checkpoints(run / "checkpoints")
    there = checkpoints.steps()
    if step is None:
        best = checkpoints.best()
        step = best if best in there else (there[-1] if there else None)
    if step is None or step not in there:
        has = f"it has {', '.join(map(str, there))}" if there else "it has none"
        raise UserError(f"{run}: no checkpoint{'' if step is None else f' of step {step}'}; {has}")
    return Trained(run, step, config)


def filled_encoder(
    name: str, width: int, state: dict[str, Tensor], where: str, in_channels: int = 1
) -> Encoder:
    """The encoder with the tensors `encoder.…` of `state`. Raises UserError for missing, unknown or misshapen ones."""
    with torch.device("meta"):
        encoder = build_encoder(name, width, in_channels)
    wanted = encoder.state_dict()
    given = {
        key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")
    }
    wrong = [key for key in wanted if key not in given or given[key].shape != wanted[key].shape]
    unknown = sorted(set(given) - set(wanted))
    if wrong or unknown:
        first = f"encoder.{(wrong + unknown)[0]}"
        raise UserError(
            f"{where}: {len(wrong)} of {len(wanted)} tensors of {name} (width {width}) are missing or of another shape, "
            f"{len(unknown)} are unknown, first {first}; these are weights of another network"
        )
    encoder.load_state_dict(given, assign=True)
    encoder.input_norm = "unit"  # the input range of our pretraining
    let_train(encoder)
    return encoder


def read_json(file: Path) -> dict[str, Any]:
    """Read a card.json. Raises UserError when there is none."""
    try:
        card = json.loads(file.read_text(), object_pairs_hook=no_duplicate_keys)
        if not isinstance(card, dict):
            raise ValueError("it is no object")
        return card
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: no p2w card ({error}); copy the folder whole, or export the run again"
        ) from error


def is_torch_file(file: Path) -> bool:
    """Whether a file is one that torch.save wrote, which is a zip archive. Raises OSError where it cannot be read."""
    with open(file, "rb") as opened:
        return opened.read(4) == b"PK\3\4"


def read_card(file: Path) -> dict[str, Any]:
    """Read the card in a safetensors header, or in a torch file of ours. Raises UserError when there is none."""
    try:
        card = _torch_card(file) if is_torch_file(file) else json.loads(_header(file)["__metadata__"]["p2w"])
        if not isinstance(card, dict):
            raise ValueError("its card is no object")
        return card
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}; name a run, a checkpoint or a file made by p2w export"
        ) from error
    except (*UNREADABLE, UnpicklingError, RecursionError, struct.error) as error:
        raise UserError(
            f"{file}: no weights with a p2w card ({error}); make one: p2w export RUN --to safetensors"
        ) from error


def _torch_card(file: Path) -> Any:
    """The card in a torch file. Raises one of UNREADABLE where it has none, or one that names no encoder.

    Those are files of early versions, or of others: `p2w.weights.foreign` reads them.
    """
    card = json.loads(_torch_file(file)["p2w"])
    card["encoder"]["width"]
    return card


def _torch_file(file: Path) -> dict[str, Any]:
    """The dict in a torch file, its tensors still on the disk. Raises one of UNREADABLE."""
    try:
        whole = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except OSError as error:  # raised by mmap for an archive that was cut off
        raise ValueError("the archive is damaged") from error
    if not isinstance(whole, dict):
        raise ValueError("no tensors by name")
    return whole


def _header(file: Path) -> Any:
    """The JSON in a safetensors file's header. Raises ValueError or struct.error where there is none."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > min(HEADER, file.stat().st_size):
            raise ValueError("its header is longer than the file")
        return json.loads(opened.read(length))

"""Where pretraining starts: weights of a run, or published ones, that a pretext's network has before its first step.

    torchrun -m p2w train paper --init runs/other          one's own run: encoder, and decoder or heads where they fit
    torchrun -m p2w train genesis --init Genesis_Chest_CT.pt
    torchrun -m p2w train --model.name resencl --init checkpoint_final.pth    nnssl's, such as OpenMind's

The encoder must be there whole. A run that has a checkpoint continues from that, and does not read the file again.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from p2w.config import Config
from p2w.errors import UserError
from p2w.model import Network
from p2w.pretext.protocol import Pretext
from p2w.train.checkpoint import Checkpoints
from p2w.weights.start import RANDOM, StartingPoint, load_start


def read_init(config: Config, run: Path) -> StartingPoint | None:
    """The weights of `config.model.init`; None where the run starts at random, or has a checkpoint to continue from.

    Raises UserError when they are not whole, or of another network or width than the run's.
    """
    init, model = config.model.init, config.model
    if init in ("", RANDOM) or Checkpoints(run / "checkpoints").steps():
        return None
    with torch.random.fork_rng(devices=[]):  # a run that continues draws the same numbers without the file
        start = load_start(init)
    if (start.network, start.width) != (model.name, model.width):
        raise UserError(
            f"--init {init}: weights of {start.network}, width {start.width}, and the run is of {model.name}, width "
            f"{model.width}; pass --model.name {start.network} --model.width {start.width}"
        )
    return start


def initialise(
    pretext: Pretext, network: Network, config: Config, run: Path, say: Callable[[str], None]
) -> Network:
    """The pretext's network with the weights of `config.model.init`, or `network` where there are none to load.

    The network is built round the loaded encoder, so that copies of it, such as MoCo's, are copies of these weights. A part
    behind it (decoder, heads) is loaded where all of its tensors are there in its shapes, and is new otherwise. `say` is
    given the report, a line at a time. Raises UserError as `read_init` does.
    """
    start = read_init(config, run)
    if start is None:
        return network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        made = pretext.build(start.encoder)
    for line in start.report.table().splitlines():
        say(line)
    given = {
        f"decoder.{name}": value for name, value in (start.decoder_state or {}).items()
    } | start.other_state
    wanted = made.state_dict()
    taken: dict[str, Tensor] = {}
    for part in sorted({name.partition(".")[0] for name in wanted} - {"encoder"}):
        its = {name: value for name, value in wanted.items() if name.partition(".")[0] == part}
        fits = all(name in given and given[name].shape == value.shape for name, value in its.items())
        taken |= {name: given[name] for name in its} if fits else {}
        say(f"  {part:10} {len(its):5}  {'loaded' if fits else 'new'}")
    made.load_state_dict(taken, strict=False)
    if start.encoder.input_norm != "unit":
        say(
            f"  note: pretraining feeds [0, 1]; the input of these weights was normalised as {start.encoder.input_norm}"
        )
    return made

"""Which weights a file holds, and how many of their tensors fit: what `--init FILE` would do, without training.

    p2w inspect Genesis_Chest_CT.pt
    p2w inspect models/model.ckpt-3000 --in-channels 4

Exit code 1 when a part of the network would be missing, 2 when the file cannot be read.
"""

from dataclasses import dataclass

import tyro

from p2w.weights.start import examine


@dataclass(frozen=True)
class Options:
    """What to look at."""

    init: tyro.conf.Positional[str]
    """A run, a checkpoint, a hub folder, or a file of weights, as `--init` takes it."""
    network: str | None = None
    """Refuse weights of another network."""
    width: int | None = None
    """Refuse weights of another width."""
    in_channels: int = 1
    """Of the volumes that the network will see."""


def main(argv: list[str]) -> int:
    """Read, fit, print the report."""
    options = tyro.cli(Options, args=argv, prog="p2w inspect", description=__doc__)
    start = examine(options.init, options.network, options.width, options.in_channels)
    encoder = start.encoder
    print(start.report.table())
    parameters = sum(p.numel() for p in encoder.parameters())
    print(
        f"  encoder    {parameters / 1e6:.2f} M parameters, channels {encoder.channels}, strides {encoder.strides}"
    )
    print(f"  fed        {encoder.feeding}, {encoder.in_channels} channels")
    print(f"  decoder    {'is there too' if start.decoder_state else 'none'}")
    for key, value in start.pretrained_on.items():
        print(f"  {key:10} {value}")
    print("whole: --init takes it" if start.report.whole else "not whole: --init refuses it")
    return 0 if start.report.whole else 1

"""What an encoder is: all that decoders, heads and pretexts may know of one."""

from torch import Tensor, nn

Output = Tensor | tuple[Tensor, ...]  # of a network; every tensor has one entry a sample along its first axis


class Encoder(nn.Module):
    """`forward((B, C, D, H, W)) -> list of features, fine to coarse`, described by `channels` and `strides`."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def pooled(self, x: Tensor) -> Tensor:
        """Global average pool of the coarsest features, (B, channels[-1]) float32: the representation analysed."""
        features: list[Tensor] = self(x)
        return features[-1].float().mean(dim=(2, 3, 4))


class Network(nn.Module):
    """What a pretext builds: any module that keeps the encoder as `.encoder`.

    `forward(input, *beside) -> Output`. Called with the input alone it runs as well: that is how it is checked and drawn.
    """

    encoder: Encoder

"""What an encoder is: all that decoders, heads and pretexts may know of one."""

from torch import Tensor, nn

from p2w.model.conv import let_train
from p2w.model.feeding import Feeding

Output = Tensor | tuple[Tensor, ...]  # of a network; every tensor has one entry a sample along its first axis


class Encoder(nn.Module):
    """`forward((B, C, D, H, W)) -> list of features, fine to coarse`, described by `channels` and `strides`.

    `strides` are those of rows and columns; `slice_strides` of slices, where they shrink later (I3D).
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    slice_strides: tuple[int, ...] = ()
    in_channels: int = 1
    least_voxels: int = 1
    """How many voxels the coarsest features need: instance norm takes two."""
    feeding: Feeding = "unit"
    """What `p2w.model.feeding.feed` makes of a batch in [0, 1] for it."""
    sees_input: tuple[str, ...] = ()
    """Weights of the convolutions whose first `in_channels` inputs are the image: they adapt when the channels differ."""
    norms_input: tuple[str, ...] = ()
    """Tensors with one value for each image channel."""
    channels_last: bool = True
    """Which memory layout is the faster one for it, where the settings leave that open."""
    beside_pooled: tuple[str, ...] = ()
    """Prefixes of parameters that `pooled` does not depend on."""

    @property
    def multiples(self) -> tuple[int, int, int]:
        """What the edges (D, H, W) of an input are multiples of."""
        return ((self.slice_strides or self.strides)[-1], self.strides[-1], self.strides[-1])

    def only_pooled(self) -> None:
        """Freeze what `pooled` does not depend on: no gradient reaches it, and DDP would wait for it for ever."""
        let_train(self, but=self.beside_pooled)

    def pooled(self, x: Tensor) -> Tensor:
        """Global average pool of the coarsest features, (B, channels[-1]) float32: the representation analysed."""
        features: list[Tensor] = self(x)
        return features[-1].float().mean(dim=(2, 3, 4))


class Network(nn.Module):
    """What a pretext builds: any module that keeps the encoder as `.encoder`.

    `forward(input, *beside) -> Output`. Called with the input alone it runs as well: that is how it is checked and drawn.
    """

    encoder: Encoder

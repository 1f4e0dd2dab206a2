"""Masked volumes: restore the patches that were hidden. SimMIM on any encoder, MAE on a transformer.

In both, the whole is resized and `mae.ratio` of its patches are hidden. Target: the whole. Loss: mean squared error over the
hidden voxels alone.

SimMIM (Xie et al. 2022): hidden patches are filled, and the encoder computes on all of them. There the fill is a learned
token, here one grey, which every encoder takes; and there the decoder is one layer, here any.

MAE (He et al. 2022): the transformer sees the other patches alone, a quarter of the tokens; a small transformer behind it
sees these and a learned token at each hidden position, and predicts voxels. Convolutions before the tokens (see ViT3d) see
the fill at the edges of a patch. Voxels are predicted as they are, not normalised by patch, so that the output is a volume.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from p2w import rng
from p2w.errors import UserError
from p2w.geometry import Size
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.encoder import Encoder, Network, Output
from p2w.model.vit3d import PATCH, TransformerBlock, positions
from p2w.pretext.protocol import Pretext, Views, check_size
from p2w.pretext.settings import Bounds, PretextConfig, Shows
from p2w.pretext.volume_ops import resized_whole
from p2w.rng import SampleKeys


@dataclass(frozen=True)
class MaeConfig:
    """Settings of simmim and mae: the mask, and mae's decoder."""

    patch: Annotated[tuple[int, int, int], Bounds(1, usual="4 8 8")] = (4, 8, 8)
    """simmim: voxels z y x of a patch [?]; divides pretext.size. mae: a patch is a token of the transformer."""
    ratio: Annotated[float, Bounds(0, 1)] = 0.75
    """Share of the patches that are hidden [P: He et al. 2022]."""
    fill: Literal["mean", "zero"] = "mean"
    """Value of hidden patches: the mean of the visible voxels of that whole, or 0 [?]."""
    decoder_depth: Annotated[int, Bounds(1, 64)] = 4
    """mae: blocks of the decoder [?: 8 for a ViT-L]."""
    decoder_width: Annotated[int, Bounds(6, 65536)] = 192
    """mae: channels of the decoder, a multiple of 6 [?: 512 for a ViT-L]."""


class MaskConfig(Protocol):
    """What is hidden, and what stands there: see MaeConfig."""

    @property
    def patch(self) -> tuple[int, int, int]:
        """Voxels z, y, x of a patch."""

    @property
    def ratio(self) -> float:
        """Share of the patches that are hidden."""

    @property
    def fill(self) -> Literal["mean", "zero"]:
        """What stands in hidden patches."""


class SimMim(Pretext):
    """Which patches are hidden is a function of (seed, epoch, id) alone; as many in every whole.

    SparK (p2w.pretext.spark) hides in the same way, with settings of its own.
    """

    summary = "a whole with three quarters of its patches hidden -> these"
    group: ClassVar[str] = "mae"
    """The group of settings that `mask` is."""
    usual_patch: ClassVar[str] = "4 8 8"
    usual_ratio: ClassVar[float] = 0.75
    groups: ClassVar = {"mae": MaeConfig}
    reconstructs = True
    capturable = True
    shows: Shows = "whole"

    def __init__(self, config: PretextConfig, mask: MaskConfig) -> None:
        self.config, self.mask_config, self.patch = config, mask, self.patch_of(mask)
        grid = [edge // patch for edge, patch in zip(config.size, self.patch, strict=True)]
        self.grid = (grid[0], grid[1], grid[2])
        if any(edge % patch for edge, patch in zip(config.size, self.patch, strict=True)):
            raise UserError(
                f"{self.group}.patch={self.patch}: must divide pretext.size={config.size}; pass e.g. "
                f"--{self.group}.patch {self.usual_patch}"
            )
        patches = grid[0] * grid[1] * grid[2]
        self.hidden = round(mask.ratio * patches)
        if not 0 < self.hidden < patches:
            raise UserError(
                f"{self.group}.ratio={mask.ratio}: hides {self.hidden} of {patches} patches, some must be hidden and some "
                f"seen; the usual ratio is {self.usual_ratio}, smaller patches are more"
            )

    def patch_of(self, mask: MaskConfig) -> Size:
        """Voxels z, y, x of a patch."""
        return mask.patch

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> masked and whole, (B, 1, d, h, w) in [0, 1], and the mask, True where hidden."""
        whole = resized_whole(batch_BDHW, self.config, keys.real)
        mask = self.mask(keys)
        seen = torch.where(mask, 0.0, whole)
        if self.mask_config.fill == "mean":
            mean = seen.sum((1, 2, 3, 4), keepdim=True) / (~mask).sum((1, 2, 3, 4), keepdim=True)
            seen = torch.where(mask, mean, seen)
        return Views(seen, whole, mask)

    def mask(self, keys: SampleKeys) -> Tensor:
        """(B, 1, d, h, w) bool: the patches with the lowest draws."""
        mask = self.hidden_patches(keys).unflatten(1, self.grid)[:, None]
        for axis, patch in enumerate(self.patch):
            mask = mask.repeat_interleave(patch, 2 + axis)
        return mask

    def hidden_patches(self, keys: SampleKeys) -> Tensor:
        """(B, N) bool, as many in every row."""
        u = rng.uniforms(keys, 0, self.grid[0] * self.grid[1] * self.grid[2])
        return u.argsort(1).argsort(1) < self.hidden

    def build(self, encoder: Encoder) -> Network:
        """Encoder, decoder (skips off unless asked), sigmoid."""
        check_size(self.config.size, encoder)
        return EncoderDecoder(encoder, build_decoder(encoder, self.config.skips))

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error over hidden voxels, in float32."""
        assert views.mask is not None
        error = (cast(Tensor, output).float() - views.target.float()) ** 2
        return (error * views.mask).sum() / views.mask.sum(), {}

    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """The visible patches, and the whole."""
        return {"masked": views.input, "whole": views.target}


class Mae(SimMim):
    """Hidden patches, as many in every whole, are left out of the transformer's tokens."""

    summary = "a quarter of a whole's patches, the only ones the transformer computes -> the others"
    capturable = False

    def __init__(self, config: PretextConfig, mae: MaeConfig) -> None:
        super().__init__(config, mae)
        self.mae = mae

    def patch_of(self, mask: MaskConfig) -> Size:
        """A patch is a token."""
        return (PATCH, PATCH, PATCH)

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """As for SimMIM, with the mask of hidden patches (B, N) bool as an extra input."""
        views = super().sample(batch_BDHW, keys, step)
        return replace(views, extra_inputs=(self.hidden_patches(keys),))

    def build(self, encoder: Encoder) -> Network:
        """The transformer and a small one behind it. Raises UserError for an encoder without tokens to leave out."""
        if encoder.token_edge != PATCH:
            raise UserError(
                f"pretext.name={self.config.name}: leaves hidden patches out, which takes a transformer; pass --model.name "
                "vit3d or primus, or --pretext.name simmim, which fills them and takes any encoder"
            )
        if self.mae.decoder_width % 6:
            raise UserError(
                f"mae.decoder_width={self.mae.decoder_width}: must be a multiple of 6; pass --mae.decoder-width 192"
            )
        check_size(self.config.size, encoder)
        return MaskedAutoencoder(encoder, self.mae, self.hidden)


class MaskedAutoencoder(Network):
    """(B, 1, D, H, W) and which patches are hidden (B, N), `count` of each row -> the volume (B, 1, D, H, W) in [0, 1].

    With the input alone every patch counts as seen.
    """

    def __init__(self, encoder: Encoder, mae: MaeConfig, count: int) -> None:
        super().__init__()
        width = mae.decoder_width
        self.encoder, self.count = encoder, count
        self.narrow = nn.Linear(encoder.channels[-1], width)
        self.blocks = nn.ModuleList(TransformerBlock(width) for _ in range(mae.decoder_depth))
        self.norm, self.to_voxels = nn.LayerNorm(width), nn.Linear(width, PATCH**3)
        for module in (self.narrow, self.to_voxels, *self.blocks.modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.hidden_token = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.hidden_token, std=0.02)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Visible tokens go through the encoder, then all positions through the decoder."""
        grid = tuple(edge // PATCH for edge in x.shape[2:])
        count = grid[0] * grid[1] * grid[2]
        if hidden is None:
            hidden = torch.zeros(len(x), count, dtype=torch.bool, device=x.device)
            kept = torch.arange(count, device=x.device).expand(len(x), -1)
        else:
            kept = hidden.int().argsort(dim=1, stable=True)[:, : count - self.count]
        seen = self.narrow(self.encoder.visible_tokens(x, kept))
        tokens = self.hidden_token.to(seen.dtype).expand(len(x), count, -1)
        tokens = tokens.scatter(1, kept[:, :, None].expand_as(seen), seen)
        tokens = tokens + positions(grid, tokens.shape[2], tokens.device).to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        voxels = self.to_voxels(self.norm(tokens)).view(len(x), *grid, PATCH, PATCH, PATCH)
        volume = voxels.permute(0, 1, 4, 2, 5, 3, 6).reshape(len(x), 1, *x.shape[2:])
        return torch.sigmoid(volume.float())

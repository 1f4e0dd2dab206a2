"""A transformer for volumes: convolutions down to patches of 8 x 8 x 8 voxels, then a plain ViT (Dosovitskiy et al. 2021).

The first levels are convolutions instead of one large patch projection (Xiao et al. 2021, "Early convolutions help
transformers see better"): they stand on the way to the tokens, so that decoders with skips find fine features and every
parameter has a gradient where only the coarsest are used. Positions are fixed sines (Vaswani et al. 2017) along each axis,
counted in patches from the input's corner: any size goes, and nothing of them is stored.

Shapes: B, C, D, H, W = batch, channel, slice, row, column; N = tokens, d * h * w of them.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from p2w.errors import UserError
from p2w.model.conv import Conv3d
from p2w.model.encoder import Encoder
from p2w.model.norm import BatchNorm3d, ConvBatchNorm
from p2w.model.unet3d import ConvNormAct

HEADS, DEPTH, PERIOD = 6, 12, 10_000.0
PATCH = 8  # voxels


class Attention(nn.Module):
    """Self-attention over all tokens, in HEADS heads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        batch, count, channels = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, HEADS, channels // HEADS).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, count, channels))


class TransformerBlock(nn.Module):
    """Attention, then two layers on each token, each with a residual connection and layer norm before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = Attention(channels)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(gelu(self.wide(self.norm2(x))))


class ViT3d(Encoder):
    """`width` 32 is a ViT-S: 12 blocks of 384 channels in 6 heads, 21 M parameters; others scale.

    There `channels` are (16, 32, 64, 384) and `strides` (1, 2, 4, 8): a 32 x 64 x 64 part becomes 256 tokens, and these
    384 x 4 x 8 x 8. `depth` is the number of blocks (`--model.name vit3d:depth=6`).
    """

    input_convs = ("stem.0.conv1.weight",)
    token_edge = PATCH

    def __init__(self, width: int = 32, in_channels: int = 1, *, depth: int = DEPTH) -> None:
        super().__init__()
        if depth < 1:
            raise UserError(f"model.name=vit3d:depth={depth}: must be at least 1")
        fine = max(1, width // 2)
        self.channels = (fine, 2 * fine, 4 * fine, 12 * width)
        self.strides = (1, 2, 4, PATCH)
        self.in_channels = in_channels
        self.stem = nn.ModuleList(
            (
                ConvNormAct(in_channels, fine),
                ConvNormAct(fine, 2 * fine, 2),
                ConvNormAct(2 * fine, 4 * fine, 2),
            )
        )
        self.to_tokens = ConvBatchNorm(
            Conv3d(4 * fine, 12 * width, kernel_size=2, stride=2),
            # As large as the positions that are added, or it would be negligible beside them
            BatchNorm3d(12 * width),
        )
        self.blocks = nn.ModuleList(TransformerBlock(12 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(12 * width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, D, H, W), edges divisible by 8 -> list of features, fine to coarse.

        Raises UserError for other edges.
        """
        check_edges(x)
        features, tokens, grid = self._embed(x)
        return [*features, self._transform(tokens).transpose(1, 2).unflatten(2, grid)]

    def visible_tokens(self, x: Tensor, kept: Tensor) -> Tensor:
        """As `Encoder.visible_tokens`: the blocks see the kept tokens alone. The convolutions before them see all of x, so
        what is not to be seen must not be in it."""
        tokens = self._embed(x)[1]
        return self._transform(tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2])))

    def _embed(self, x: Tensor) -> tuple[list[Tensor], Tensor, tuple[int, ...]]:
        """Features of the stem, tokens with positions (B, N, C), and their grid (d, h, w)."""
        features = []
        for level in self.stem:
            x = level(x)
            features.append(x)
        x = self.to_tokens(x)
        grid = tuple(x.shape[2:])
        tokens = x.flatten(2).transpose(1, 2)
        return features, tokens + positions(grid, tokens.shape[2], tokens.device).to(tokens.dtype), grid

    def _transform(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        for block in self.blocks:
            tokens = block(tokens)
        normed: Tensor = self.norm(tokens)
        return normed


def check_edges(x: Tensor) -> None:
    """Raises UserError where an edge of (B, C, D, H, W) is no multiple of a patch."""
    if any(edge % PATCH for edge in x.shape[2:]):
        raise UserError(
            f"input {tuple(x.shape[2:])}: each edge must be a multiple of {PATCH}; pad or crop it"
        )


def positions(grid: tuple[int, ...], channels: int, device: torch.device) -> Tensor:
    """(d * h * w, channels) float32: for each axis a third of the channels, sines and cosines of the position in patches.

    `channels` is a multiple of 6. Wavelengths grow from 2 pi patches to 2 pi * PERIOD.
    """
    count = channels // 6
    rates = PERIOD ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
    along = []
    for axis, edge in enumerate(grid):
        angles = torch.arange(edge, device=device, dtype=torch.float32)[:, None] * rates
        waves = torch.cat((angles.sin(), angles.cos()), 1)
        shape = [edge if other == axis else 1 for other in range(3)]
        along.append(waves.view(*shape, 2 * count).expand(*grid, 2 * count))
    return torch.cat(along, -1).flatten(0, 2)

"""A transformer for volumes almost without convolutions, after Primus (Wald et al. 2025, arXiv 2503.01835).

One convolution cuts the input into patches of 8 x 8 x 8 voxels; blocks as in EVA-02 (Fang et al. 2023) follow: rotary
positions along three axes, SwiGLU, a further norm before each projection back, and LayerScale; transposed convolutions lead
from the tokens to voxels. It differs from the published network in two ways: positions are added as fixed sines instead of
learned ones, so that any size goes; and there is no stochastic depth, whose draws would follow no sample's key.

Shapes: B, C, D, H, W = batch, channel, slice, row, column; N = tokens, d * h * w of them, in the order z, y, x.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from p2w.errors import UserError
from p2w.model.conv import Conv3d, scale_channels
from p2w.model.encoder import Encoder
from p2w.model.vit3d import PATCH, PERIOD, check_edges, positions

LAYER_SCALE = 0.1  # what a branch is multiplied by at first
PAIRS = 11  # rotated pairs of channels along each axis of a head at width 32: heads of 66 channels
Angles = tuple[Tensor, Tensor]
"""Cosines and sines, (B or 1, 1, N, channels of a head / 2)."""


def rotary_angles(grid: tuple[int, ...], pairs: int, device: torch.device) -> Tensor:
    """(d * h * w, 3 * pairs) float32: for each axis `pairs` angles, the position in patches times PERIOD ** (-k / pairs)."""
    rates = PERIOD ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    along = []
    for axis, edge in enumerate(grid):
        shape = [edge if other == axis else 1 for other in range(3)]
        angles = torch.arange(edge, device=device, dtype=torch.float32)[:, None] * rates
        along.append(angles.view(*shape, pairs).expand(*grid, pairs))
    return torch.cat(along, -1).flatten(0, 2)


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate channel k of each head with channel k + half: (B, heads, N, channels of a head), computed in float32."""
    cosine, sine = angles
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, a * sine + b * cosine), dim=-1).to(x.dtype)


class RotaryAttention(nn.Module):
    """Self-attention whose scores depend on the distance of two tokens along z, y and x; a norm before the projection."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm, self.out = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        batch, count, channels = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        return self.out(self.norm(mixed.transpose(1, 2).reshape(batch, count, channels)))


class SwiGlu(nn.Module):
    """Two layers on each token, the first one gated (Shazeer 2020): as many weights as with four times the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels * 8 // 3
        self.gate, self.value = nn.Linear(channels, hidden), nn.Linear(channels, hidden)
        self.norm, self.out = nn.LayerNorm(hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.out(self.norm(silu(self.gate(x)) * self.value(x)))


class EvaBlock(nn.Module):
    """Attention, then SwiGLU, each with a layer norm before it and a residual connection around it, scaled by channel."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention, self.mlp = RotaryAttention(channels, heads), SwiGlu(channels)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((channels,), LAYER_SCALE)) for _ in range(2))

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.scale1 * self.attention(self.norm1(x), angles)
        return x + self.scale2 * self.mlp(self.norm2(x))


class Primus(Encoder):
    """`width` 32 with the defaults is Primus-S: 12 blocks of 396 channels in 6 heads; `primus:heads=12` is Primus-B.

    `primus:heads=12,depth=16` at width 35 is Primus-M, `primus:heads=16,depth=24` at width 32 is Primus-L. It has features
    of one level, of stride 8: a decoder with skips is the same as one without.
    """

    input_convs = ("patches.weight",)
    token_edge = PATCH

    def __init__(self, width: int = 32, in_channels: int = 1, *, depth: int = 12, heads: int = 6) -> None:
        super().__init__()
        for name, value in (("depth", depth), ("heads", heads)):
            if value < 1:
                raise UserError(f"model.name=primus:{name}={value}: must be at least 1")
        self.pairs = scale_channels(PAIRS, width)
        channels = heads * 6 * self.pairs
        self.channels, self.strides, self.in_channels = (channels,), (PATCH,), in_channels
        self.patches = Conv3d(in_channels, channels, kernel_size=PATCH, stride=PATCH)
        self.blocks = nn.ModuleList(EvaBlock(channels, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def build_decoder(self, skips: bool, out_channels: int = 1) -> nn.Module:
        """Three transposed convolutions."""
        return PrimusDecoder(self.channels[-1], skips, out_channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, D, H, W), edges divisible by 8 -> [(B, channels, D / 8, H / 8, W / 8)].

        Raises UserError for other edges.
        """
        tokens, angles, grid = self._embed(x)
        cosine, sine = angles.cos()[None, None], angles.sin()[None, None]
        return [self._transform(tokens, (cosine, sine)).transpose(1, 2).unflatten(2, grid)]

    def visible_tokens(self, x: Tensor, kept: Tensor) -> Tensor:
        """As `Encoder.visible_tokens`: before the blocks no patch sees another, so x may hold them all."""
        tokens, angles, _ = self._embed(x)
        tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
        angles = angles[kept][:, None]
        return self._transform(tokens, (angles.cos(), angles.sin()))

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Tokens with positions (B, N, C), their angles (N, channels of a head / 2), and their grid (d, h, w)."""
        check_edges(x)
        x = self.patches(x)
        grid = tuple(x.shape[2:])
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + positions(grid, tokens.shape[2], tokens.device).to(tokens.dtype)
        return tokens, rotary_angles(grid, self.pairs, tokens.device), grid

    def _transform(self, tokens: Tensor, angles: Angles) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        for block in self.blocks:
            tokens = block(tokens, angles)
        normed: Tensor = self.norm(tokens)
        return normed


class PrimusDecoder(nn.Module):
    """Doubles the edges three times, with a norm over channels and GELU between.

    The channels fall to a quarter each time, which is our choice.
    """

    def __init__(self, channels: int, skips: bool, out_channels: int = 1) -> None:
        super().__init__()
        self.skips = skips
        middle = (channels, max(1, channels // 4), max(1, channels // 16))
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(cin, cout, kernel_size=2, stride=2)
            for cin, cout in zip(middle, (*middle[1:], out_channels), strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(cout) for cout in middle[1:])

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features of a Primus -> logits (B, out_channels, D, H, W)."""
        x: Tensor = self.ups[0](features[-1])
        for norm, up in zip(self.norms, self.ups[1:], strict=True):
            x = up(gelu(norm(x.movedim(1, -1)).movedim(-1, 1)))
        return x

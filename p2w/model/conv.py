"""The 3D convolution of every network here: torch's, except where torch's is known to be wrong."""

import torch
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, (B, Cin, D, H, W) -> (B, Cout, D', H', W'), that leaves bf16 on a CPU for maps of two slices.

    oneDNN 3.12 (torch 2.13, AMX) reads memory that it never wrote when it computes the weights' gradient of a bf16
    convolution of 3 slices over a map of D = 2: of 15 sizes tried, all five with D = 2 gave values up to infinity, all
    others the right ones. `p2w.train.selfcheck` compares the run's own network with fp32 at start, should there be more.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, in float32 where bf16 is not to be trusted."""
        if x.device.type == "cpu" and x.shape[2] == 2 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)

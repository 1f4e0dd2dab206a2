"""Counter-based random numbers: SplitMix64 streams selected by keys, the same on every device, rank and restart.

The numbers for part p of sub-scan k in epoch e depend on (seed, e, k, p) alone, not on batch, rank or restarts.
Tensors and NumPy arrays, both int64, go through the same finaliser (Steele, Lea, Flood: Fast splittable pseudorandom number
generators, OOPSLA 2014).
"""

import functools
import importlib.util
import math
import sys
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.errors import UserError

Ids = NDArray[np.int64]
Int64 = TypeVar("Int64", Tensor, Ids)
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment: the odd integer nearest to 2^64 / golden ratio
_STRATA = 0x57A7A  # first word of the key that `stratified_ids` draws with
_MIX = (
    (30, 0xBF58476D1CE4E5B9),
    (27, 0x94D049BB133111EB),
)  # SplitMix64's finaliser (Steele et al. 2014, Vigna)


@dataclass(frozen=True)
class SampleKeys:
    """What samples follow from, besides voxels: the run's seed, the epoch, and the ids (B,) int64 of the sub-scans.

    `real` (B, 3) float32 is how many voxels along z, y, x of each sub-scan are the scan's own; the others, behind them, are
    air that it was filled up with. None: all are its own.
    """

    seed: int
    epoch: int
    ids: Tensor
    real: Tensor | None = None


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def splitmix64(z: Int64) -> Int64:
    """SplitMix64's finaliser, a bijection, on int64 of any shape. Products wrap; masks undo the sign extension of `>>`."""
    for shift, factor in _MIX:
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def uniforms(keys: SampleKeys, part: int, count: int) -> Tensor:
    """Uniform numbers (B, count) float64 in [0, 1), 53 random bits each, for part `part` of every sub-scan.

    Each (seed, epoch, part, id) has its own SplitMix64 stream, which starts from a hash of the four. Integer arithmetic
    gives the same bits on CPU and GPU. On a GPU with Triton it is one kernel launch. Raises UserError unless ids are (B,)
    int64.
    """
    state = _state(keys, part)
    if keys.ids.is_cuda and backend(keys.ids.device)[0] == "triton":
        from p2w.kernels import sample_triton  # noqa: PLC0415  triton is optional and slow to import

        return sample_triton.uniforms(keys.ids, state, count)
    streams = splitmix64((keys.ids ^ _signed(state)) + _signed(_GOLDEN))
    counters = torch.arange(1, count + 1, device=keys.ids.device) * _signed(_GOLDEN)
    return _unit(splitmix64(streams[:, None] + counters[None, :]))


def _unit(bits: Tensor) -> Tensor:
    """The upper 53 of 64 random bits as float64 in [0, 1)."""
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def _state(keys: SampleKeys, part: int) -> int:
    """64-bit hash of seed, epoch and part; with the id, it gives the start of the stream of a sub-scan."""
    if keys.ids.ndim != 1 or keys.ids.dtype != torch.int64:
        raise UserError(
            f"keys: ids must be (B,) int64, got {tuple(keys.ids.shape)} {keys.ids.dtype}; "
            "pass the manifest's row numbers"
        )
    state = 0
    for word in (keys.seed, keys.epoch, part):
        mixed = ((state ^ (word & _MASK64)) + _GOLDEN) & _MASK64
        state = int(splitmix64(np.array([_signed(mixed)]))[0]) & _MASK64
    return state


def backend(device: torch.device | str) -> tuple[str, str]:
    """(name, reason): the implementation for sampling and crop-resize on this device, "triton" or "torch", and why.

    On CUDA the first call tries Triton, which may lack a C compiler or not fit its torch; the result is cached.
    """
    if torch.device(device).type != "cuda":
        return "torch", f"tensors are on {torch.device(device).type}, the kernels are for CUDA"
    return _backend_on_cuda()


@functools.lru_cache(maxsize=1)
def _backend_on_cuda() -> tuple[str, str]:
    if not torch.cuda.is_available():
        return "torch", "no CUDA device is available"
    return try_triton(torch.device("cuda", torch.cuda.current_device()))


def try_triton(device: torch.device) -> tuple[str, str]:
    """(name, reason) as `backend` gives, by compiling, launching and checking a small kernel on `device`.

    Any failure of Triton (no C compiler, an unsuitable version, a broken installation) is a reason to use torch, not an
    error; the reason is one line.
    """
    if importlib.util.find_spec("triton") is None:
        return "torch", "triton is not installed beside this torch"
    ids = torch.arange(3)
    try:
        from p2w.kernels import sample_triton  # noqa: PLC0415  triton is optional and slow to import

        drawn = sample_triton.uniforms(ids.to(device), 1, 2).cpu()
    except Exception as error:  # whatever Triton raises, torch is used instead
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        words = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
        return "torch", f"triton is installed but does not work here ({words}); plain torch is slower"
    bits = splitmix64(
        splitmix64((ids ^ 1) + _signed(_GOLDEN))[:, None] + torch.arange(1, 3) * _signed(_GOLDEN)
    )
    if not torch.equal(drawn, _unit(bits)):
        return "torch", "triton is installed but computes wrong numbers here; plain torch is slower"
    return "triton", f"CUDA tensors, and triton {sys.modules['triton'].__version__} works here"


def uniform_integers(u: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1) of any shape -> uniform int64 from `low` to `high`, both included."""
    drawn = (u * (high - low + 1)).long()
    return drawn if isinstance(low, int) and low == 0 else low + drawn


def standard_normals(keys: SampleKeys, part: int, count: int) -> Tensor:
    """Standard normal numbers (B, count) float32, from the stream of part `part` of every sub-scan."""
    u = uniforms(keys, part, count).float().clamp_(2**-24, 1 - 2**-24)
    return torch.erfinv(2 * u - 1).mul_(math.sqrt(2))


def hash64(ids: Ids, *key: int) -> NDArray[np.uint64]:
    """Hash ids (any shape) and a key (seed, epoch, ...) to 64-bit words of the same shape; no two ids get the same word."""
    return hash64_from(key_state(*key), ids)


def stratified_ids(ids: Ids, most: int) -> Ids:
    """At most `most` of `ids` (N,), in their order: of each of `most` equal ranges the one whose id has the smallest hash.

    This spreads them over scans, since a manifest's rows are sorted by scan. A stride would too, but it can meet the period
    of the tiling: every second sub-scan of a set with two tiles a scan is the left half of a chest.
    """
    if len(ids) <= most:
        return ids
    words = hash64(ids, _STRATA)
    ranges = np.array_split(np.arange(len(ids)), most)
    return ids[[rows[words[rows].argmin()] for rows in ranges]]


def key_state(*key: int) -> Ids:
    """(1,): what a key (seed, epoch, ...) brings to `hash64`, for `hash64_from`."""
    state = np.zeros(1, np.int64)
    for part in key:  # integers of any size and sign count modulo 2**64
        state = splitmix64(state + np.array([_signed((part + _GOLDEN) & _MASK64)]))
    return state


def hash64_from(states: Ids, ids: Ids) -> NDArray[np.uint64]:
    """The words of `hash64` for the key of each of the `states`, of `key_state`; `states` and `ids` are broadcast."""
    return splitmix64(states + ids.astype(np.int64) * _signed(_GOLDEN)).view(np.uint64)

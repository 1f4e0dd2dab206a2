"""The reconstructions a browser leafs through: read from an npz, packed as text small enough for a page.

A volume is its uint8 voxels in C order (z, y, x), each row as differences from the voxel to its left (modulo 256), then
zlib, then base64. Browsers undo zlib themselves (DecompressionStream), and differences pack a CT a third smaller.
"""

import base64
import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIMIT = 9 << 20  # characters of volumes in a page; the rest of it takes a few MB at most
LARGEST = 4 << 30  # bytes an npz may unpack to: one that claims more is not ours
SLICE_TO_PIXEL = (
    2.5  # thickness of a slice over the width of a pixel in a chest CT, where the run does not know
)

Volume = NDArray[np.uint8]


@dataclass(frozen=True)
class Volumes:
    """`whole` (W, d, h, w); `part`, `output` (W, S, d, h, w), uint8; `scale` (S,), NaN where it is a part's own."""

    whole: Volume
    part: Volume
    output: Volume
    scale: NDArray[np.float64]
    keys: list[str]
    extent: NDArray[np.float64]  # (W, 3): edges z y x of each whole, in units of its own
    source: str


def find(run: Path, problems: list[str], edges: Sequence[float] = ()) -> Volumes | None:
    """Those of the analysis, else those of the end of training, else none. Adds to `problems` what cannot be read.

    `edges` (z, y, x) are the proportions of wholes whose file does not tell them.
    """
    for name in ("analysis/reconstructions.npz", "figures/reconstruction.npz"):
        if (run / name).exists():
            try:
                return _read(run / name, name, edges)
            except (OSError, ValueError, LookupError, EOFError, MemoryError, RuntimeError) as error:
                problems.append(
                    f"{name}: not read ({str(error).partition(chr(10))[0] or type(error).__name__})"
                )
            except (zipfile.BadZipFile, zlib.error, SyntaxError, NotImplementedError) as error:
                problems.append(f"{name}: not read ({error})")
    return None


def _read(path: Path, name: str, edges: Sequence[float]) -> Volumes:
    """Raises ValueError when the arrays do not fit together."""
    with zipfile.ZipFile(path) as listing:
        size = sum(member.file_size for member in listing.infolist())
    if size > LARGEST:
        raise ValueError(f"it says that it unpacks to {size:,} bytes")
    with np.load(path, allow_pickle=False) as file:
        saved = {key: np.asarray(file[key]) for key in file.files}
    whole, part, output = saved["whole"], saved["part"], saved["output"]
    if whole.ndim != 4 or part.ndim != 5 or 0 in part.shape:
        raise ValueError(
            f"whole {whole.shape} and part {part.shape} are not (W, d, h, w) and (W, S, d, h, w)"
        )
    expected = (len(whole), part.shape[1], *whole.shape[1:])
    if part.shape != expected or output.shape != expected:
        raise ValueError(f"part {part.shape} and output {output.shape} do not fit whole {whole.shape}")
    if any(array.dtype != np.uint8 for array in (whole, part, output)):
        raise ValueError("not all volumes are uint8")
    scale = np.full(part.shape[1], np.nan)
    if saved["scale"].shape == scale.shape:
        scale = saved["scale"].astype(np.float64)
    keys = [str(key) for key in saved["keys"].reshape(-1)]
    extent = np.asarray(saved.get("extent_mm", ()), np.float64)
    if extent.shape != (len(whole), 3) or not (np.isfinite(extent) & (extent > 0)).all():
        extent = np.tile(edges or np.array(whole.shape[1:]) * (SLICE_TO_PIXEL, 1, 1), (len(whole), 1))
    return Volumes(whole, part, output, scale, keys, extent, name)


def pack(volume: Volume) -> str:
    """One volume (d, h, w) as text, see above."""
    steps = np.diff(volume, axis=2, prepend=np.uint8(0))  # uint8 wraps round
    return base64.b64encode(zlib.compress(steps.tobytes(), 6)).decode()


def payload(volumes: Volumes, limit: int = LIMIT) -> dict[str, Any]:
    """What the page's script reads: as many wholes as fit into `limit` characters, at least one.

    Of a single whole that does not fit, scales are left out, the last one being kept.
    """
    scales, shown = list(range(len(volumes.scale))), 0
    data: dict[str, Any] = {"whole": [], "part": [], "output": []}
    used = 0
    for row in range(len(volumes.whole)):
        whole = pack(volumes.whole[row])
        if not shown:
            room = max(1, int((limit - len(whole)) // (2 * len(whole))))
            scales = np.linspace(len(scales) - 1, 0, min(room, len(scales))).astype(int)[::-1].tolist()
        pairs = [(pack(volumes.part[row, s]), pack(volumes.output[row, s])) for s in scales]
        size = len(whole) + sum(len(text) for pair in pairs for text in pair)
        if shown and used + size > limit:
            break
        used, shown = used + size, shown + 1
        data["whole"].append(whole)
        data["part"].append([part for part, _ in pairs])
        data["output"].append([output for _, output in pairs])
    scale = [float(volumes.scale[s]) for s in scales]
    return {
        **data,
        "shape": list(volumes.whole.shape[1:]),
        "extent": volumes.extent[:shown].tolist(),
        "keys": [volumes.keys[row] if row < len(volumes.keys) else "" for row in range(shown)],
        "scale": [s if math.isfinite(s) else None for s in scale],
    }


def script_json(data: object) -> str:
    """JSON that cannot end the script element it stands in, nor open a comment there."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

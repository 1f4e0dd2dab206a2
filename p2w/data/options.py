"""The options that both sharding commands share."""

import re
from dataclasses import dataclass
from typing import Literal

from p2w.data.folder import Settings, Share
from p2w.data.run import Job
from p2w.data.subscan import MIN_STD_HU, Tiling
from p2w.errors import UserError


@dataclass(frozen=True)
class Cutting:
    """How to cut, and how to go about it."""

    format: Literal["tar", "arrow"] = "tar"
    """tar opens with webdataset, arrow with pyarrow; training reads both alike."""
    z_margin: int = 0
    """Slices to leave out at each end of a scan; 25 gives the paper's number of sub-scans."""
    min_std: float = MIN_STD_HU
    """Leave out sub-scans whose standard deviation (HU) is below: nearly constant air. 0 keeps all."""
    val_fraction: float = 0.1
    """Share of the scans set aside for validation, at least one of two. Never parts of a scan."""
    split_seed: int = 0
    """Another seed sets other scans aside."""
    workers: int = 0
    """Scans cut at the same time; 0: one for each core, as far as memory goes (2 GiB each)."""
    shard_of: str = "0/1"
    """i/n: cut the i-th of n shares of the scans (i from 0), as one task of a job array."""
    merge: bool = False
    """Cut nothing; write the manifest over what all shares have cut."""
    dry_run: bool = False
    """Read headers, print scans, sub-scans, bytes, free disk and time, and stop."""
    strict: bool = False
    """Stop at the first bad scan, with exit code 2."""

    def job(self, out: str, allow_gaps: bool = False) -> Job:
        """The checked job. Raises UserError where a value makes no sense."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard_of)
        if not match or not int(match[1]) < int(match[2]):
            raise UserError(
                f"--shard-of {self.shard_of!r}: write i/n with i from 0 to n - 1, such as 0/4 … 3/4"
            )
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: 1 or more, or 0 for one a core")
        tiling = Tiling(z_margin=self.z_margin, min_std_hu=self.min_std)
        settings = Settings(tiling, self.format, self.val_fraction, self.split_seed, allow_gaps)
        share = Share(int(match[1]), int(match[2]))
        return Job(out, settings, share, self.workers, self.merge, self.dry_run, self.strict)

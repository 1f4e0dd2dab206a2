"""Build a set of shards in the test's own process: no worker is started."""

import os
from pathlib import Path

from p2w.ct.discover import find_scans
from p2w.shards.build import cut_source
from p2w.shards.build_folder import JobShare
from p2w.shards.manifest import Manifest, read_manifest
from p2w.shards.scan_shards import ScanFolder, ShardingSettings, build_shards


def cut_here(scans: Path, out: Path, settings: ShardingSettings) -> Manifest:
    """Cut the scans of a folder into `out`, as `p2w shard --scans SCANS --out OUT`, and read the manifest."""
    folder, found = ScanFolder(os.fspath(out), settings), find_scans([os.fspath(scans)], os.fspath(out))
    with folder.share_lock(JobShare()):
        folder.prepare(JobShare())
        for source in found.sources:
            cut_source(source, folder, JobShare())
    build_shards(found, os.fspath(out), settings)
    return read_manifest(out)

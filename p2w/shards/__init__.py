"""Sharded data sets, offline: tiling, shards, manifest, building and verifying them. No torch."""

"""Offline: scans, tiles, shards and the phantom, without torch. Online: the stream."""

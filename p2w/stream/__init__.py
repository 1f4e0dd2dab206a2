"""Batches of sub-scans from sharded data sets, local or remote, in an order that any rank can recompute."""

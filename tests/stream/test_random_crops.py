"""Wholes cut at random places of stored scans: what is read, in which order, and what is as in sets of sub-scans."""

import http.server
import itertools
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ct_files import ct, write
from cut_here import cut_here
from web import nginx

from p2w.commands.train import refuse_other_wholes
from p2w.config import Config
from p2w.ct.discover import ScanSource
from p2w.ct.scan import read_scan
from p2w.errors import UserError
from p2w.pretext import PRETEXTS, pretext_class
from p2w.shards.manifest import manifest_bytes, read_manifest
from p2w.shards.manifest_schema import PADDED_SCHEMA
from p2w.shards.scan_shards import ShardingSettings
from p2w.shards.tiling import Tiling
from p2w.stream.local import DataError
from p2w.stream.prefetch import DeviceCache
from p2w.stream.random_crops import TRIES
from p2w.stream.staging import StagedCopy
from p2w.stream.stream import Stream, open_set

TILE = (32, 64, 64)
REAL = os.environ.get("P2W_REAL_DATA")
MASK, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    root = tmp_path_factory.mktemp("scans")
    for number, shape in enumerate([(75, 150, 141), (70, 130, 128), (40, 70, 200)]):
        write(root / f"s{number}.mhd", ct(shape, number))
    return root


@pytest.fixture(scope="module")
def stored(scans, tmp_path_factory):
    """A set that stores the scans, and trains on two of them."""
    settings = ShardingSettings(Tiling(TILE), val_fraction=0.4, store="scans")
    return cut_here(scans, tmp_path_factory.mktemp("set") / "a", settings).root


def voxels_of(scans, uid):
    found = read_scan(ScanSource(uid, f"{uid}.mhd", (str(scans / f"{uid}.mhd"),))).voxels
    return np.clip(found, -1000, 1000)


def take(stream, count, epoch=0, step=0):
    with stream:
        batches = itertools.islice(stream.batches(epoch, step), count)
        return [(b.epoch, b.step, b.ids.tolist(), b.voxels.numpy().copy(), b.bad) for b in batches]


def same(one, two):
    for a, b in zip(one, two, strict=True):
        assert a[:3] == b[:3]
        np.testing.assert_array_equal(a[3], b[3])


# A reference of its own for where a whole lies: plain integers, no arrays.


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def word(number, *key):
    state = 0
    for part in key:
        state = mix((state + part + GOLDEN) & MASK)
    return mix((state + number * GOLDEN) & MASK)


def reference_place(shape, number, seed, epoch, attempt, z_margin=0):
    place = []
    for axis, (edge, tile, margin) in enumerate(zip(shape, TILE, (z_margin, 0, 0), strict=True)):
        choices = max(1, edge - 2 * margin - tile + 1)
        place.append(margin + word(number, seed, epoch, 5, attempt, axis) % choices)
    return place


def reference_cut(scan, place, z_margin=0):
    """The box at `place` of a scan [z,y,x], with air behind the end."""
    out = np.full(TILE, -1000)
    for z, y, x in np.ndindex(*TILE):
        at = (place[0] + z, place[1] + y, place[2] + x)
        if at[0] < scan.shape[0] - z_margin and at[1] < scan.shape[1] and at[2] < scan.shape[2]:
            out[z, y, x] = scan[at]
    return out


TILINGS = {
    "default": Tiling(TILE),
    "all": Tiling(TILE, z_margin=3, min_std_hu=0, stride=(20, 64, 40)),
    "short": Tiling((48, 80, 64), min_std_hu=100, short="pad", body_only=True),
    "odd": Tiling((31, 65, 7), z_margin=1, min_std_hu=150),
    "resampled": Tiling((16, 32, 32), min_std_hu=0, spacing=(4.0, 1.6, 1.4), short="pad"),
}


@pytest.mark.parametrize(("name", "form"), [(name, "tar") for name in TILINGS] + [("short", "arrow")])
def test_at_their_own_places_wholes_are_the_sub_scans_bit_for_bit(scans, tmp_path, name, form):
    settings = {"tiling": TILINGS[name], "format": form, "val_fraction": 0.4}
    plain = open_set(cut_here(scans, tmp_path / "plain", ShardingSettings(**settings)).root)
    found = open_set(cut_here(scans, tmp_path / "whole", ShardingSettings(**settings, store="scans")).root)
    assert found.random_crops and not plain.random_crops
    assert found.shape == plain.shape and len(found) == len(plain) > 4
    assert [found.key(i) for i in range(len(found))] == [plain.key(i) for i in range(len(plain))]
    assert [found.shard(i) for i in range(len(found))] == [plain.shard(i) for i in range(len(plain))]
    for split in ("train", "val"):
        assert found.ids(split).tolist() == plain.ids(split).tolist() and len(found.ids(split))
    np.testing.assert_array_equal(found.spacing_mm, plain.spacing_mm)
    np.testing.assert_array_equal(
        found.size_in_voxels(np.arange(len(found))), plain.size_in_voxels(np.arange(len(found)))
    )
    assert (found.real is None) == (plain.real is None)
    for number in range(len(plain)):
        one, two = np.empty(plain.shape, np.int16), np.empty(plain.shape, np.int16)
        plain.read_into(number, one)
        found.read_into(number, two)
        np.testing.assert_array_equal(one, two)
    with Stream.validation(found, 4) as ours, Stream.validation(plain, 4) as theirs:
        for one, two in zip(ours.batches(), theirs.batches(), strict=True):
            assert torch.equal(one.voxels, two.voxels) and torch.equal(one.ids, two.ids)
    left_out = found.meta["tiling"]["left_out"]
    assert left_out == plain.meta["tiling"]["left_out"] and (left_out > 0) == (name == "odd")


def test_in_training_a_whole_lies_where_its_counters_say(scans, stored):
    shards = open_set(stored)
    shape = {uid: voxels_of(scans, uid) for uid in ("s0", "s1", "s2")}
    places = set()
    for epoch, step, ids, voxels, _ in take(Stream(shards, batch=4, seed=-7), 6):
        assert epoch == step // Stream(shards, batch=4).steps_per_epoch or epoch < 3
        for number, whole in zip(ids, voxels, strict=True):
            uid = shards.key(number).partition("/")[0]
            place = reference_place(shape[uid].shape, number, -7, epoch, 0)
            assert shards.random_origin(number, -7, epoch).tolist() == place
            places.add((uid, *place))
            if len(places) < 5:  # written out voxel by voxel
                np.testing.assert_array_equal(whole, reference_cut(shape[uid], place))
            z, y, x = place
            np.testing.assert_array_equal(whole, shape[uid][z : z + 32, y : y + 64, x : x + 64])
    assert len(places) > 20  # they do not lie on a grid


def test_an_epoch_has_as_many_wholes_of_a_scan_as_sub_scans_in_the_same_order(scans, stored, tmp_path):
    plain = open_set(cut_here(scans, tmp_path / "a", ShardingSettings(Tiling(TILE), val_fraction=0.4)).root)
    one, two = Stream(open_set(stored), batch=4, seed=5), Stream(plain, batch=4, seed=5)
    assert one.steps_per_epoch == two.steps_per_epoch
    for epoch in range(3):
        assert (one.sampler.epoch_order(epoch) == two.sampler.epoch_order(epoch)).all()


def test_batches_are_the_same_whatever_ranks_and_threads_and_from_any_position(stored):
    whole = take(Stream(open_set(stored), batch=4, seed=3), 9)
    steps = Stream(open_set(stored), batch=4).steps_per_epoch
    same(whole, take(Stream(open_set(stored), batch=4, seed=3, readers=0), 9))
    for ranks in (2, 4):
        for rank in range(ranks):
            share = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
            mine = take(Stream(open_set(stored), batch=4, seed=3, rank=rank, world_size=ranks), 9)
            for (epoch, step, ids, voxels, _), own in zip(whole, mine, strict=True):
                assert own[:3] == (epoch, step, ids[share])
                np.testing.assert_array_equal(own[3], voxels[share])
    for start in (1, steps, steps + 1):
        same(whole[start:], take(Stream(open_set(stored), batch=4, seed=3), 9 - start, *divmod(start, steps)))
    first, second = (
        {i: v for b in whole[n : n + steps] for i, v in zip(b[2], b[3], strict=True)} for n in (0, steps)
    )
    assert not any(np.array_equal(first[i], second[i]) for i in set(first) & set(second))


def test_every_place_is_as_likely_as_any_other(stored):
    """Exact counts of 6,000 draws: chi-squared of the first voxels along each axis, and no two axes go together."""
    shards = open_set(stored)
    scan = int(np.bincount(shards.store.scan).argmax())
    ids = np.flatnonzero(shards.store.scan == scan).tolist()
    choices = shards.store.end[scan] - shards.store.begin[scan] - shards.shape + 1
    drawn = np.array([shards.random_origin(i, 0, epoch) for epoch in range(6000 // len(ids)) for i in ids])
    assert len(ids) == 8 and (drawn.min(0) == 0).all() and (drawn.max(0) == choices - 1).all()
    for axis in range(3):
        counts = np.bincount(drawn[:, axis], minlength=choices[axis])
        expected, degrees = len(drawn) / choices[axis], choices[axis] - 1
        assert abs(((counts - expected) ** 2 / expected).sum() - degrees) < 4 * np.sqrt(2 * degrees)
    correlation = np.corrcoef(drawn.T)
    assert abs(correlation[~np.eye(3, dtype=bool)]).max() < 4 / np.sqrt(len(drawn))
    # So every voxel comes as often as boxes can hold it: those in the middle most, those at a corner least.
    seen, boxes = np.zeros(shards.store.end[scan], int), np.ones(shards.store.end[scan])
    for z, y, x in drawn:
        seen[z : z + 32, y : y + 64, x : x + 64] += 1
    for axis, tile in enumerate(TILE):
        at = np.arange(seen.shape[axis])
        held = np.minimum(at, choices[axis] - 1) - np.maximum(0, at - tile + 1) + 1
        boxes *= np.expand_dims(held / choices[axis], tuple({0, 1, 2} - {axis}))
    deviation = np.sqrt(len(drawn) * boxes * (1 - boxes))
    assert (seen > 0).mean() > 0.99 and (abs(seen - len(drawn) * boxes) < 6 * deviation + 4).all()


def test_places_that_show_too_little_are_drawn_again_by_the_next_counter(tmp_path):
    hu = np.random.default_rng(0).normal(-1000, 10, (96, 128, 300)).astype(np.int16)
    hu[:40, :70, :66] = np.random.default_rng(1).normal(0, 300, (40, 70, 66)).astype(np.int16)
    write(tmp_path / "scans" / "a.mhd", hu)
    tiling = Tiling(TILE, body_only=True)
    found = open_set(
        cut_here(
            tmp_path / "scans", tmp_path / "a", ShardingSettings(tiling, val_fraction=0, store="scans")
        ).root
    )
    kept, clipped = len(found), hu.clip(-1000, 1000)
    assert 1 <= kept < 5
    own = found.store.origin
    tries = []
    for epoch in range(40):
        with found.reader(found.ids("train"), (0, epoch)) as reader:
            for number in range(kept):
                voxels = np.empty(TILE, np.int16)
                reader.read_into(number, voxels)
                assert (voxels > -900).mean() >= 0.1 and voxels.std() >= 50
                for attempt in range(TRIES + 1):
                    drawn = reference_place(hu.shape, number, 0, epoch, attempt)
                    z, y, x = drawn if attempt < TRIES else own[number]
                    there = clipped[z : z + 32, y : y + 64, x : x + 64]
                    if (there > -900).mean() >= 0.1 and there.std() >= 50:
                        break
                np.testing.assert_array_equal(voxels, there)
                tries.append(attempt)
    assert min(tries) == 0 and max(tries) == TRIES and len(set(tries)) > 4


@pytest.fixture
def damaged(stored, tmp_path):
    """A copy of the set in which one chunk of a training scan has a wrong bit; and that chunk's key."""
    copied = tmp_path / "set"
    copied.mkdir()
    for path in Path(stored).iterdir():
        if path.is_file():
            (copied / path.name).write_bytes(path.read_bytes())
    shards = open_set(str(copied))
    scan = int(shards.store.scan[shards.ids("train")[0]])
    row = int(shards.store.first_row[scan]) + 62  # in the middle of 5 x 5 x 5 chunks
    path = copied / shards.chunks.shard(row)
    data = bytearray(path.read_bytes())
    data[int(shards.chunks.offsets[row]) + 9] ^= 4
    path.write_bytes(data)
    return str(copied), shards.chunks.key(row)


def test_a_damaged_chunk_stops_training_or_another_whole_stands_in(damaged, stored):
    where, key = damaged
    with pytest.raises(DataError, match=rf"shard s\d.tar, key {key}: checksum differs"):
        take(Stream(open_set(where), batch=4, seed=1), 12)
    bad, sound = (take(Stream(open_set(one, on_bad="skip"), batch=4, seed=1), 12) for one in (where, stored))
    assert sum(b[4] for b in bad) > 0 == sum(b[4] for b in sound)
    for (*_, ids, voxels, _), (*_, planned, right, _) in zip(bad, sound, strict=True):
        for row in range(4):
            if ids[row] == planned[row]:
                np.testing.assert_array_equal(voxels[row], right[row])
    half = take(Stream(open_set(where, on_bad="skip"), batch=4, seed=1, rank=1, world_size=2), 12)
    for whole, mine in zip(bad, half, strict=True):
        assert whole[2][2:] == mine[2]
        np.testing.assert_array_equal(whole[3][2:], mine[3])


def test_a_mixture_with_a_set_of_sub_scans(scans, stored, tmp_path):
    plain = cut_here(scans, tmp_path / "plain", ShardingSettings(Tiling(TILE), val_fraction=0.4)).root
    mixture = f"{plain}:0.5 + {stored}:0.5"
    mixed, alone, sub_scans = open_set(mixture), open_set(stored), open_set(plain)
    assert mixed.random_crops and mixed.meta["mixture"][1]["store"] == "scans" and "store" not in mixed.meta
    batches = take(Stream(mixed, batch=4, seed=2), 6)
    same(batches, take(Stream(open_set(mixture), batch=4, seed=2, readers=0), 6))
    third = divmod(3, Stream(mixed, batch=4).steps_per_epoch)
    same(batches[3:], take(Stream(open_set(mixture), batch=4, seed=2), 3, *third))
    first, kinds = len(sub_scans), set()
    for epoch, _, ids, voxels, _ in batches:
        for number, whole in zip(ids, voxels, strict=True):
            expected = np.empty(TILE, np.int16)
            kinds.add(number < first)
            if number < first:
                sub_scans.read_into(number, expected)
            else:
                with alone.reader(alone.ids("train"), (2, epoch)) as reader:
                    reader.read_into(number - first, expected)
            np.testing.assert_array_equal(whole, expected)
    assert kinds == {True, False}
    with pytest.raises(UserError, match=r"cache_on_device: .*stores whole scans.*no-cache-on-device"):
        DeviceCache(mixed, "train", torch.device("cpu"))


def test_what_does_not_go_with_it_is_refused_in_a_line(stored):
    shards = open_set(stored)
    with pytest.raises(UserError, match=r"cache_on_device: .*stores whole scans.*no-cache-on-device"):
        DeviceCache(shards, "train", torch.device("cpu"))
    knowing = {name for name in PRETEXTS if pretext_class(name).knows_wholes}
    assert knowing == {"instdisc", "pirl", "exemplar"}
    config = Config()
    for name in knowing:
        with pytest.raises(UserError, match="stores whole scans, of which every epoch cuts others"):
            refuse_other_wholes(pretext_class(name).from_config(config), config, shards)
    refuse_other_wholes(pretext_class("moco").from_config(config), config, shards)


def test_below_a_url_by_byte_ranges(stored, tmp_path):
    with nginx(tmp_path) as (folder, url, _):
        for path in Path(stored).iterdir():
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())
        same(
            take(Stream(open_set(stored), batch=4, seed=3), 3),
            take(Stream(open_set(url), batch=4, seed=3), 3),
        )


def test_a_server_without_byte_ranges_is_refused(stored):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=stored)
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="stores whole scans, which are read by byte ranges"):
            open_set(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="P2W_REAL_DATA names no folder of real scans")
def test_a_real_scan_is_that_of_its_sub_scans(tmp_path):
    tiling, luna = Tiling(z_margin=25), Path(REAL) / "luna16" / "subset0"
    plain = open_set(cut_here(luna, tmp_path / "a", ShardingSettings(tiling)).root)
    found = open_set(cut_here(luna, tmp_path / "b", ShardingSettings(tiling, store="scans")).root)
    assert len(found) == len(plain) > 20 and found.store.chunk == (32, 64, 64)
    one, two = np.empty(plain.shape, np.int16), np.empty(plain.shape, np.int16)
    for number in range(len(plain)):
        plain.read_into(number, one)
        found.read_into(number, two)
        np.testing.assert_array_equal(one, two)


def test_a_manifest_of_tables_says_the_same(stored, tmp_path):
    """Sets of very many chunks have manifests of another version, in which lists and texts are stored otherwise."""
    shutil.copytree(stored, tmp_path / "large")
    manifest = read_manifest(str(stored))
    meta = {key: value for key, value in manifest.meta.items() if key != "seal"}
    data = manifest_bytes(manifest.table, meta, PADDED_SCHEMA, version=2)
    (tmp_path / "large" / "manifest.parquet").write_bytes(data)
    one, two = (open_set(str(folder)) for folder in (stored, tmp_path / "large"))
    assert two.store.origin.tolist() == one.store.origin.tolist()
    assert [two.key(n) for n in range(len(two))] == [one.key(n) for n in range(len(one))]
    same(take(Stream(one, batch=4, seed=3), 3), take(Stream(two, batch=4, seed=3), 3))


def test_a_copy_on_the_nodes_disk_has_the_same_places(stored, tmp_path):
    """Whole scans are copied as sub-scans are: the same ids, voxels and validation, epoch after epoch."""
    source = open_set(os.fspath(stored))
    copies = StagedCopy(source, tmp_path)
    copies.copy()
    found = copies.open()
    assert found.random_crops and found.copy_of == source.where and found.where != source.where
    for epoch in (0, 3):
        same(take(Stream(found, batch=4, seed=5), 3, epoch), take(Stream(source, batch=4, seed=5), 3, epoch))
    same(take(Stream.validation(found, batch=4), 2), take(Stream.validation(source, batch=4), 2))
    assert copies.remove() and not list(tmp_path.iterdir())

"""TensorFlow checkpoints without TensorFlow. tests/weights/niftynet was written by NiftyNet 0.6.0 on TensorFlow 2.21: its
dense V-Net with one or two channels a layer, random norms, and its skips for a known input of 17 x 17 x 17 voxels."""

import random
import shutil
import struct
from pathlib import Path

import crc32c
import numpy as np
import pytest
import torch

from p2w.errors import UserError
from p2w.weights import foreign
from p2w.weights.start import load_start
from p2w.weights.tf_bundle import FOOTER, MAGIC, MASK, Bundle, prefix_of

GOLDEN = Path(__file__).parent / "niftynet" / "model.ckpt-7"


def test_our_dense_vnet_computes_what_niftynets_does():
    """Axes A, R, S there; z, y, x with y and x mirrored here. Odd edges, so that "SAME" pads both sides alike."""
    start = load_start(str(GOLDEN), "dense_vnet", 2)
    assert start.report.whole and len(start.report.matched) == 159
    assert set(start.report.head) == {"DenseVNet/conv/conv_/w", "DenseVNet/conv/conv_/b"}
    x = np.sin(np.arange(17**3) ** 1.3).astype(np.float32).reshape(17, 17, 17)
    turned = torch.from_numpy(x.transpose(2, 0, 1)[:, ::-1, ::-1].copy())[None, None]
    with torch.no_grad():
        features = start.encoder.eval()(turned)
    with np.load(GOLDEN.with_name("skips.npz")) as expected:
        for i, ours in enumerate((features[0][:, 1:], features[1], features[2])):
            theirs = expected[f"skip{i}"][0].transpose(3, 2, 0, 1)[:, :, ::-1, ::-1]
            np.testing.assert_allclose(ours[0], theirs, atol=1e-5)


@pytest.mark.parametrize(("name", "shape"), [("even", (32, 16, 24)), ("cube", (16, 16, 16))])
def test_features_of_even_edges_are_niftynets(name, shape):
    """NiftyNet takes edges divisible by 8, which are padded on one side; recorded by reference/niftynet_skips.py."""
    start = load_start(str(GOLDEN), "dense_vnet", 2)
    assert start.network == "dense_vnet:mirrored=True"
    x = np.sin(np.arange(np.prod(shape)) ** 1.3).astype(np.float32).reshape(shape)
    turned = torch.from_numpy(x.transpose(2, 0, 1)[:, ::-1, ::-1].copy())[None, None]
    with torch.no_grad():
        features = start.encoder.eval()(turned)
    with np.load(GOLDEN.with_name("skips_even.npz")) as expected:
        for i, ours in enumerate((features[0][:, 1:], features[1], features[2])):
            theirs = expected[f"{name}_{i}"][0].transpose(3, 2, 0, 1)[:, :, ::-1, ::-1]
            assert ours[0].shape == theirs.shape
            np.testing.assert_allclose(ours[0], theirs, atol=1e-5)


def test_more_channels_see_what_one_saw():
    one = load_start(str(GOLDEN), width=2).encoder.eval()
    start = load_start(str(GOLDEN), width=2, in_channels=3)
    assert set(start.report.adapted) == {*one.input_convs, *one.norms_input}
    x = torch.randn(1, 1, 16, 16, 16)
    three = start.encoder.eval()(x.expand(-1, 3, -1, -1, -1))
    for a, b in zip(three, one(x), strict=True):
        assert torch.allclose(a[:, -b.shape[1] + 1 :], b[:, 1:], atol=1e-5)


def test_any_of_its_files_names_a_checkpoint(tmp_path):
    for ending in ("", ".index", ".data-00000-of-00001"):
        assert prefix_of(GOLDEN.with_name(GOLDEN.name + ending)) == GOLDEN
    assert prefix_of(tmp_path / "model.ckpt-8") is None
    bundle = Bundle(GOLDEN)
    assert bundle.tensor("global_step").item() == 0
    assert bundle.tensor("DenseVNet/conv_bn/conv_/w").shape == (5, 5, 5, 1, 2)
    assert "DenseVNet/batch_norm/DenseVNet/batch_norm/moving_mean/biased" in bundle.entries


def test_a_variable_that_the_table_does_not_know_is_refused():
    bundle = Bundle(GOLDEN)
    bundle.entries["DenseVNet/attention/w"] = next(iter(bundle.entries.values()))
    with pytest.raises(UserError, match=r"1 variables that .* does not have, first DenseVNet/attention/w"):
        foreign.read_niftynet(bundle)


@pytest.mark.parametrize("slot", ["Adam", "Adam_1", "ExponentialMovingAverage", "Momentum"])
def test_what_training_left_beside_is_passed_over(slot):
    bundle = Bundle(GOLDEN)
    bundle.entries[f"DenseVNet/conv_bn/conv_/w/{slot}"] = bundle.entries["DenseVNet/conv_bn/conv_/w"]
    assert len(foreign.read_niftynet(bundle)[0]) == 159


def masked(data):
    crc = crc32c.crc32c(data)
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF


def varint(value):
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def block(pairs, kind=0):
    body = b"".join(varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in pairs)
    body += struct.pack("<II", 0, 1)
    return body + bytes([kind]) + struct.pack("<I", masked(body + bytes([kind])))


def table(pairs, kind=0):
    """A sorted table of one block, with right checksums, whatever its values say."""
    data = block(pairs, kind)
    handle = varint(0) + varint(len(data) - 5)
    index = block([(b"z", handle)])
    footer = varint(0) + varint(0) + varint(len(data)) + varint(len(index) - 5)
    return data + index + footer.ljust(FOOTER - 8, b"\0") + struct.pack("<Q", MAGIC)


def entry(dtype=1, shape=(2,), shard=0, offset=0, size=8, crc=None, more=b""):
    dims = b"".join(b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(n) for n in shape))
    crc = masked(np.zeros(2, np.float32).tobytes()) if crc is None else crc
    numbers = b"".join(
        bytes([n << 3]) + varint(v) for n, v in ((1, dtype), (3, shard), (4, offset), (5, size))
    )
    return numbers + b"\x12" + varint(len(dims)) + dims + b"\x35" + struct.pack("<I", crc) + more


def checkpoint(folder, value, kind=0, header=b"\x08\x01"):
    (folder / "m.index").write_bytes(table([(b"", header), (b"v", value)], kind))
    (folder / "m.data-00000-of-00001").write_bytes(np.zeros(2, np.float32).tobytes())
    return folder / "m"


def test_a_table_by_hand_is_read(tmp_path):
    assert torch.equal(Bundle(checkpoint(tmp_path, entry())).tensor("v"), torch.zeros(2))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (entry(shape=(2**40,), size=2**42), "index is damaged"),
        (entry(shape=(2**63, 2)), "index is damaged"),
        (entry(size=12), "index is damaged"),
        (entry(offset=2**62), "ends before"),
        (entry(shard=3), "both files"),
        (entry(dtype=7), "dtype 7"),
        (entry(more=b"\x3a\x00"), "stored in slices"),
        (entry(crc=1), "checksum of v differs"),
        (b"\x08", "no index"),
        (b"\x12\x7f\x00", "longer than its message"),
        (b"\x09" + bytes(8), "wire type 1"),
        (b"\x0a\x00", "no integer"),
        (b"\x08" + b"\xff" * 11, "64 bits"),
    ],
)
def test_entries_that_lie_under_right_checksums_are_one_line(tmp_path, value, told):
    with pytest.raises(UserError, match=told) as refused:
        Bundle(checkpoint(tmp_path, value)).tensor("v")
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_compressed_and_big_endian_and_missing(tmp_path):
    for made, told in (
        ({"kind": 1}, "compressed blocks"), ({"header": b"\x08\x01\x10\x01"}, "big-endian"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            Bundle(checkpoint(tmp_path, entry(), **made))
    shutil.copy(f"{GOLDEN}.index", tmp_path / "alone.index")
    with pytest.raises(UserError, match="both files of a checkpoint"):
        load_start(str(tmp_path / "alone"))
    checkpoint(tmp_path, entry())
    with pytest.raises(UserError, match="not of NiftyNet's dense V-Net; it has v"):
        load_start(str(tmp_path / "m.index"))


def test_whatever_happens_to_the_bytes_is_noticed(tmp_path):
    """Flipped, cut or repeated bytes: one line, or the very same tensors."""
    draw = random.Random(5)
    right = foreign.read_niftynet(Bundle(GOLDEN))[0]
    parts = {e: Path(f"{GOLDEN}{e}").read_bytes() for e in (".index", ".data-00000-of-00001")}
    refused = 0
    for _ in range(120):
        ending = draw.choice(list(parts))
        data = bytearray(parts[ending])
        at = draw.randrange(len(data))
        kind = draw.choice(("flip", "cut", "insert"))
        if kind == "flip":
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[at:]
        else:
            data[at:at] = bytes(draw.randrange(1, 9))
        for e, whole in parts.items():
            (tmp_path / f"m{e}").write_bytes(data if e == ending else whole)
        try:
            state = foreign.read_niftynet(Bundle(tmp_path / "m"))[0]
        except UserError:
            refused += 1
        else:
            assert state.keys() == right.keys() and all(torch.equal(state[k], right[k]) for k in right)
    assert refused > 80

"""p2w embed: features beside a plain loop in float64, restarts, shares of a job array, and what it refuses."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import SimpleITK as sitk
import torch
from ct_files import ct, write

from p2w.errors import UserError
from p2w.inference import embed
from p2w.inference.embeddings import features_of
from p2w.inference.encoder_input import EncoderOptions, load_encoder_input

SPACING = (0.7, 0.8, 2.5)  # x, y, z of ct_files.image
RANDOM = ["--network", "unet3d", "--width", "2", "--size", "16", "16", "16", "--window-hu", "-1000", "400"]
NATIVE = [*RANDOM, "--native-spacing"]


@pytest.fixture
def scans(tmp_path):
    for number, shape in enumerate([(20, 30, 24), (12, 20, 33), (16, 16, 16)]):
        write(tmp_path / "scans" / f"{number}.nii.gz", ct(shape, number))
    return tmp_path / "scans"


def run(scans, out, *more, fed=NATIVE):
    return embed.main(["random", "--scans", str(scans), "--out", str(out), "--batch", "3", *fed, *more])


def table(out):
    return pq.read_table(out)


def test_features_are_those_of_a_plain_loop(scans, tmp_path):
    assert run(scans, tmp_path / "e.parquet", "--keep-names") == 0
    encoder = load_encoder_input(
        "random", EncoderOptions((16, 16, 16), None, True, (-1000, 400), "unet3d", 2), torch.device("cpu")
    ).encoder
    found = {row["name"]: row for row in table(tmp_path / "e.parquet").to_pylist()}
    windows = table(tmp_path / "e.windows.parquet")
    centres, every = [], []
    for number, starts in enumerate(
        [[(0, 4), (0, 14), (0, 8)], [(-2,), (0, 4), (0, 8, 17)], [(0,), (0,), (0,)]]
    ):
        image = sitk.ReadImage(str(scans / f"{number}.nii.gz"))
        padded = np.pad(sitk.GetArrayFromImage(image).astype(np.float32), 20, constant_values=-1000)
        volumes = []
        for z in starts[0]:
            for y in starts[1]:
                for x in starts[2]:
                    at = tuple(slice(20 + start, 36 + start) for start in (z, y, x))
                    crop = np.clip((padded[at] + 1000) / 1400, 0, 1)
                    with torch.no_grad():
                        volumes.append(encoder(torch.from_numpy(crop)[None, None])[-1][0].double().numpy())
                    centres.append([30 + (z + 7.5) * 2.5, -20 + (y + 7.5) * 0.8, -10 + (x + 7.5) * 0.7])
        whole = np.stack(volumes).transpose(1, 0, 2, 3, 4).reshape(encoder.channels[-1], -1)
        every += volumes
        row = found[f"{number}.nii.gz"]
        assert row["windows"] == len(volumes) and row["left_out"] == 0
        assert row["spacing_mm_zyx"] == pytest.approx([2.5, 0.8, 0.7])
        np.testing.assert_allclose(row["mean"], whole.mean(1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(row["max"], whole.max(1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(row["std"], whole.std(1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(windows["centre_mm_zyx"].to_pylist(), centres, rtol=1e-5)
    means = np.stack([volume.mean((1, 2, 3)) for volume in every])
    np.testing.assert_allclose(features_of(windows, "mean"), means, rtol=1e-4, atol=1e-6)


def test_repeating_sharing_and_doing_one_alone_give_the_same_bits(scans, tmp_path, monkeypatch):
    whole = tmp_path / "whole.parquet"
    assert run(scans, whole) == 0
    before = whole.read_bytes(), (tmp_path / "whole.windows.parquet").read_bytes()
    monkeypatch.setattr("p2w.inference.encoder_input.EncoderInput.pooled", None)  # nothing is computed again
    assert run(scans, whole) == 0
    monkeypatch.undo()
    assert (whole.read_bytes(), (tmp_path / "whole.windows.parquet").read_bytes()) == before
    shared = tmp_path / "shared.parquet"
    assert run(scans, shared, "--shard-of", "1/2") == 0
    assert not shared.exists()
    assert run(scans, shared, "--shard-of", "0/2") == 0
    assert shared.read_bytes() == before[0]


def test_a_changed_scan_is_computed_again(scans, tmp_path):
    out = tmp_path / "e.parquet"
    run(scans, out, "--keep-names")
    before = {row["name"]: row for row in table(out).to_pylist()}
    write(scans / "1.nii.gz", ct((18, 20, 33), 9))
    run(scans, out, "--keep-names")
    after = {row["name"]: row for row in table(out).to_pylist()}
    assert [after[name] == before[name] for name in sorted(before)] == [True, False, True]


def test_names_are_hashed_unless_given(scans, tmp_path):
    out = tmp_path / "e.parquet"
    run(scans, out, "--groups", r"^(\d)", "--salt", "xyzzy")
    assert not any(f"{n}.nii" in str(table(out).to_pylist()) for n in range(3))
    told = json.loads(table(out).schema.metadata[b"p2w"])
    assert told["secret"] and "xyzzy" not in str(told) and str(scans) not in str(told)
    assert len(set(table(out)["patient"].to_pylist())) == 3
    (scans / "t.csv").write_text("scan,name\n0.nii.gz,first\n1.nii.gz,\n")
    run(scans / "t.csv", tmp_path / "t.parquet")
    assert sorted(table(tmp_path / "t.parquet")["name"].to_pylist()) == ["", "first"]


def test_spacing_is_that_asked_for(tmp_path):
    """A scan of finer voxels gives the features of the scan that it was refined from."""
    coarse = np.full((16, 16, 16), -1000, np.int16)
    coarse[4:12, 4:12, 4:12] = 300
    write(tmp_path / "s" / "coarse.mha", coarse, spacing=(2, 2, 2))
    write(tmp_path / "s" / "fine.mha", coarse.repeat(2, 1).repeat(2, 2), spacing=(1, 1, 2))
    assert run(tmp_path / "s", tmp_path / "e.parquet", fed=[*RANDOM, "--spacing", "2", "2", "2"]) == 0
    mean = features_of(table(tmp_path / "e.parquet"), "mean")
    np.testing.assert_allclose(mean[0], mean[1], rtol=1e-4, atol=1e-5)


def test_bad_scans_are_named_and_the_others_go_on(scans, tmp_path, capsys):
    (scans / "3.nii.gz").write_bytes(b"none")
    write(scans / "air.mha", np.full((16, 16, 16), -1000, np.int16))
    out = tmp_path / "e.parquet"
    assert run(scans, out, "--assume-hu") == 1
    said = capsys.readouterr().out
    assert "bad: 3.nii.gz" in said and "bad: air.mha: all of its 1 windows have one single value" in said
    assert len(table(out)) == 3 and "2 bad" in said
    (scans / "3.nii.gz").unlink()
    (scans / "air.mha").unlink()
    assert run(scans, out, "--assume-hu") == 0


def test_other_settings_are_refused(scans, tmp_path):
    run(scans, tmp_path / "e.parquet")
    with pytest.raises(UserError, match=r"other settings \(overlap: 0.0, now 0.5\)"):
        run(scans, tmp_path / "e.parquet", "--overlap", "0.5")
    with pytest.raises(UserError, match="multiples of 8"):
        run(scans, tmp_path / "f.parquet", "--size", "16", "12", "16")
    with pytest.raises(UserError, match=r"pass --spacing .* or --native-spacing$"):
        run(scans, tmp_path / "f.parquet", fed=RANDOM)
    with pytest.raises(UserError, match="i from 0"):
        run(scans, tmp_path / "f.parquet", "--shard-of", "2/2")

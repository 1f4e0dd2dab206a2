"""Recalibrated batch norm: its statistics against float64, the same for any number of ranks, and who is given it."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from ct_sets import write_structured_set
from torch import nn

from p2w.analysis import features
from p2w.analysis.feature_sources import AnalysedRun
from p2w.analysis.features import BATCHES, ROWS, TrainingWholes, is_early
from p2w.config import Config, DataConfig, ModelConfig, PretextConfig
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.model.norm import SynchronisedBatchNorm, recalibrated, synchronise_batch_norm
from p2w.pretext import build_pretext, build_pretext_and_network
from p2w.stream.stream import open_set
from p2w.train.optim import Precision
from p2w.world import World

HERE = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")
CONFIG = Config(data=DataConfig(batch=4), pretext=PretextConfig(size=(8, 16, 16)), model=ModelConfig(width=2))


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 3, 1), nn.BatchNorm3d(3), nn.ReLU(), nn.Conv3d(3, 2, 1), nn.BatchNorm3d(2, momentum=None)
    )


def batches(count=5, rows=4):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(rows, 1, 2, 3, 4, generator=generator) * (2 + index) + index for index in range(count)
    ]


def naive(network, given):
    """Mean and unbiased variance of both norms' inputs in each batch, averaged, in float64."""
    first, second = (network[index] for index in (0, 3))
    found = []
    for x in given:
        rows = x.double().permute(0, 2, 3, 4, 1).reshape(-1, 1).numpy()
        row = []
        for conv, norm in ((first, network[1]), (second, network[4])):
            weight, bias = conv.weight.double().flatten(1).detach().numpy(), conv.bias.double().detach()
            rows = rows @ weight.T + bias.numpy()
            row += [*rows.mean(0), *rows.var(0, ddof=1)]
            rows = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + norm.eps)
            rows = np.maximum(rows, 0)
        found.append(row)
    return np.mean(found, 0)


def statistics(network):
    return np.concatenate(
        [
            buffer.double().numpy().ravel()
            for name, buffer in network.named_buffers()
            if name.endswith(("mean", "var"))
        ]
    )


def test_statistics_are_the_mean_over_batches_of_those_of_each():
    network = two_layers().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = recalibrated(network, batches())
    np.testing.assert_allclose(statistics(found), naive(network, batches()), rtol=2e-6, atol=1e-6)
    assert not any(module.training for module in found.modules())
    assert network.training and all(
        torch.equal(value, before[name]) for name, value in network.state_dict().items()
    )
    assert [found[1].momentum, found[4].momentum] == [0.1, None]
    kept = found.state_dict()
    assert all(torch.equal(kept[name], before[name]) for name in kept if not name.endswith(("mean", "var")))


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_bits_do_not_depend_on_how_batches_are_shared_out(ranks):
    """As `gather_rows` shares them: rank, rank + ranks, …; with seven, two ranks have none."""
    one = statistics(recalibrated(two_layers(), batches()))
    rows = {}

    class TakenApartError(Exception):
        pass

    def take(rank):
        def gather(own):
            rows.update(zip(range(rank, 5, ranks), own, strict=True))
            raise TakenApartError

        return gather

    for rank in range(ranks):
        with pytest.raises(TakenApartError):
            recalibrated(two_layers(), batches()[rank::ranks], take(rank))
    together = torch.stack([rows[number] for number in range(5)])
    for rank in range(ranks):
        found = recalibrated(two_layers(), batches()[rank::ranks], lambda own: together)
        assert (statistics(found) == one).all()


def test_norms_over_all_ranks_stay_so_in_the_network_and_are_of_the_batch_alone_in_the_copy():
    """tests/launch/test_ranks.py does it on real ranks."""
    network = nn.Sequential(build_encoder("unet3d", 2), nn.BatchNorm3d(32))
    synchronise_batch_norm(network, 2)
    encoder = recalibrated(network[0], [torch.rand(3, 1, 8, 16, 16)])
    assert sum(getattr(one, "over_ranks", False) for one in network.modules()) == 8
    assert not any(getattr(one, "over_ranks", False) for one in encoder.modules())
    assert encoder.state_dict().keys() == network[0].state_dict().keys()
    norm = recalibrated(network[1], [torch.rand(2, 32, 1, 1, 2)])
    assert isinstance(network[1], SynchronisedBatchNorm) and not isinstance(norm, SynchronisedBatchNorm)


def test_networks_without_running_statistics_are_left_as_they_are():
    def unread():
        raise AssertionError("was read")
        yield

    for network in (build_encoder("resencl", 2), nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4))):
        found = recalibrated(network, unread())
        assert found is not network and not found.training
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), found.parameters(), strict=True))


def to_validation(shards, rows):
    """Move sub-scans of a set that is open to its validation split."""
    splits = np.array(shards._table["split"].to_pylist(), object)
    splits[rows] = "val"
    at = shards._table.schema.get_field_index("split")
    shards._table = shards._table.set_column(at, "split", pa.array(splits))


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="no batch"):
        recalibrated(two_layers(), [])


@pytest.mark.parametrize(
    ("scans", "groups", "rows"), [(1, 1, 20), (3, 1, 24), (4, 1, 16), (9, 2, 16), (30, 4, 16)]
)
def test_batches_are_spread_over_the_training_wholes(tmp_path, scans, groups, rows):
    """Of each group every whole once a batch; fewer wholes than a batch has rows are seen several times, differently."""
    shards = open_set(str(write_structured_set(tmp_path / "set", train=scans, val=1, per=4)))
    if scans == 1:
        to_validation(shards, shards.ids("train")[1:2])  # three wholes
        rows = 18
    if scans == 3:
        to_validation(shards, shards.ids("train")[10:])  # ten
        rows = 20
    wholes = TrainingWholes(shards, HERE)
    assert len(wholes.groups) == groups
    together = np.concatenate(wholes.groups)
    assert len(set(together)) == len(together) == min(len(shards.ids("train")), groups * ROWS)
    assert set(together) <= set(shards.ids("train"))
    pretext = build_pretext(CONFIG)
    views = list(wholes._inputs(pretext, lambda: None))
    assert all(a is b for a, b in zip(views, wholes._inputs(pretext, lambda: None), strict=True))  # cut once
    assert {len(one) for one in views} == {rows}
    assert len({float(view.sum()) for batch in views for view in batch}) == rows * BATCHES


def test_an_untrained_network_is_recalibrated_and_so_are_all_networks_of_an_analysis(tiny_set):
    """Features of `random`: those of an encoder whose norms have the statistics of training wholes, not 0 and 1."""
    wholes = TrainingWholes(open_set(str(tiny_set)), HERE)
    source = AnalysedRun(Path(), CONFIG).feature_source("random", None, HERE, Precision("fp32", None, ""))
    parts = torch.rand(5, 1, 8, 16, 16)
    found = source.load(wholes)(parts)
    torch.manual_seed(CONFIG.train.seed)
    pretext, network = build_pretext_and_network(CONFIG)
    given = list(wholes._inputs(pretext, lambda: None))
    encoder = network.encoder.eval()
    assert not torch.allclose(found, encoder.pooled(parts), rtol=0.1)
    torch.testing.assert_close(found, recalibrated(encoder, given).pooled(parts), rtol=1e-4, atol=1e-5)
    assert features.IDENTITY in source.identity


def test_training_wholes_that_cannot_be_read_are_left_out_and_a_set_without_any_is_refused(tmp_path):
    folder = write_structured_set(tmp_path / "set", train=2, val=1)
    shards = open_set(str(folder))
    damaged = shards.ids("train")[2]
    wholes = TrainingWholes(shards, HERE)
    pretext, network = build_pretext_and_network(CONFIG)
    shards.checksums = shards.checksums.copy()
    shards.checksums[damaged] ^= 1
    assert {len(one) for one in wholes._inputs(pretext, lambda: None)} == {14}  # 7 of 8, twice
    wholes.recalibrate(network.encoder, pretext)
    to_validation(shards, shards.ids("train"))
    with pytest.raises(UserError, match=r"no sub-scan in split 'train'.*--val-fraction"):
        TrainingWholes(shards, HERE).recalibrate(network.encoder, pretext)


def test_early_checkpoints_are_those_whose_statistics_remember_the_beginning():
    assert is_early(0) and is_early(43) and not is_early(44)
    assert is_early(10, passes=4) and not is_early(11, passes=4)
    assert math.isclose(0.9**44, 0.0097, abs_tol=1e-4)

"""t-SNE keeps neighbours together, whatever the scale and offset of the features."""

import numpy as np
import pytest

from p2w.analysis.features import tsne


def neighbours_of_one_kind(places, kinds):
    far = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(len(places))
    return (kinds[far.argmin(1)] == kinds).mean()


@pytest.mark.slow
def test_clusters_stay_clusters_also_when_they_differ_in_the_sixth_digit():
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(4), 30)
    features = rng.normal(size=(4, 16))[kinds] + 0.2 * rng.normal(size=(120, 16))
    places = tsne(features, seed=0)
    assert places.shape == (120, 2) and neighbours_of_one_kind(places, kinds) > 0.98
    near = tsne(1 + 1e-6 * features, seed=0)
    assert neighbours_of_one_kind(near, kinds) > 0.98
    np.testing.assert_array_equal(places, tsne(features, seed=0))


def test_one_point_for_all():
    assert not tsne(np.full((10, 4), 0.5, np.float32), 0).any()

"""Readers' outlines as masks: interiors, holes, groups of readers and their consensus."""

import numpy as np
import pytest

from p2w.ct.orientation import BadScan
from p2w.phantom.ct_targets import trace
from p2w.tasks import ncs

HEAD = '<LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader><SeriesInstanceUid>1.2</SeriesInstanceUid></ResponseHeader>'


def roi(points, z=0, inclusion="TRUE"):
    edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
    place = f"<imageZposition>{z}.0</imageZposition><imageSOP_UID>1.2.{z}</imageSOP_UID>"
    return f"<roi>{place}<inclusion>{inclusion}</inclusion>{edges}</roi>"


def ring(low, high):
    """The border of a square, as a chain."""
    span = range(low, high)
    return [(x, low) for x in span] + [(high, y) for y in span] + [(x, high) for x in range(high, low, -1)] + [
        (low, y) for y in range(high, low, -1)
    ]  # fmt: skip


def message(*sessions):
    body = "".join(
        "<readingSession>" + "".join(f"<unblindedReadNodule><noduleID>{i}</noduleID>{rois}</unblindedReadNodule>"
                                     for i, rois in enumerate(nodules)) + "</readingSession>"
        for nodules in sessions
    )  # fmt: skip
    return HEAD + body + "</LidcReadMessage>"


def test_an_outline_is_outside_what_it_outlines():
    inside = ncs.interior(np.array(ring(2, 6)), (10, 9))
    assert inside.sum() == 9 and inside[3:6, 3:6].all()
    diamond = ncs.interior(np.array([(3, 2), (4, 3), (3, 4), (2, 3)]), (10, 9))
    assert diamond.sum() == 1 and diamond[3, 3]
    assert ncs.interior(np.array([(1, 1), (2, 1)]), (4, 4)).sum() == 2  # encloses nothing
    with pytest.raises(BadScan, match="leaves the slice"):
        ncs.interior(np.array([(9, 1), (2, 1)]), (10, 9))


def test_any_shape_is_traced_and_filled_again():
    rng = np.random.default_rng(0)
    for _ in range(20):
        y, x = np.mgrid[-12:13, -12:13]
        angle = np.arctan2(y, x)
        radius = 6 + sum(rng.uniform(-1.2, 1.2) * np.cos(k * angle + rng.uniform(0, 6)) for k in (2, 3, 5))
        piece = np.hypot(y, x) < radius
        chain = trace(piece)
        border = np.zeros_like(piece)
        border[tuple(chain.T)] = True
        assert (np.abs(np.diff(np.vstack([chain, chain[:1]]), axis=0)).max(1) == 1).all()
        assert (ncs.interior(chain[:, ::-1], piece.shape) == (piece & ~border)).all()


def test_consensus_of_half_of_the_readers(tmp_path):
    path = tmp_path / "a.xml"
    hole = roi(ring(2, 10)) + roi(ring(4, 8), inclusion="FALSE")
    path.write_text(
        message([roi(ring(2, 8))], [roi(ring(2, 10))], [roi(ring(20, 24), 1), roi([(3, 3)])], [hole])
    )
    assert ncs.series_of(str(path)) == "1.2"
    readings = ncs.read_readings(str(path))
    assert readings.readers == 4 and len(readings.nodules) == 4
    marked = [
        ncs.reader_mask(one, {"1.2.0": 0, "1.2.1": 1}, (0.0, 1.0), (30, 30)) for one in readings.nodules
    ]
    groups = ncs.group_by_nodule(marked)
    assert sorted(len(group) for group in groups) == [1, 3]
    large = max(groups, key=len)
    half = ncs.consensus_mask(large, 4, 0.5)[0]
    assert half[3:8, 3:8].all() and half[9, 9] and not half[10, 9] and half.sum() == 49
    assert ncs.consensus_mask(large, 4, 0.75)[0].sum() == 25 - 9
    assert ncs.consensus_mask(min(groups, key=len), 4, 0.5) == {}


@pytest.mark.parametrize(
    "text", ["<a", "", "<IdriReadMessage/>", HEAD.replace("LidcRead", "IdriRead") + "</IdriReadMessage>"]
)
def test_other_xml_is_no_reading(tmp_path, text):
    (tmp_path / "a.xml").write_text(text)
    assert ncs.series_of(str(tmp_path / "a.xml")) is None
    with pytest.raises(BadScan):
        ncs.read_readings(str(tmp_path / "a.xml"))

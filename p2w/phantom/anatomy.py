"""Regions of a phantom chest: organs, lobes of the lungs, vertebrae of three levels."""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from p2w.phantom.body import LUNGS, Body, Label
from p2w.phantom.canvas import Canvas
from p2w.phantom.organs import Cavity


class Region(IntEnum):
    """Values of a map of regions (uint8); 0 is everything else. Left and right are the patient's."""

    OTHER = 0
    LIVER = 1
    SPLEEN = 2
    HEART = 3
    AORTA = 4
    OESOPHAGUS = 5
    RIGHT_UPPER_LOBE = 6
    RIGHT_MIDDLE_LOBE = 7
    RIGHT_LOWER_LOBE = 8
    LEFT_UPPER_LOBE = 9
    LEFT_LOWER_LOBE = 10
    VERTEBRAE_UPPER = 11  # whose centre lies above the fork of the windpipe
    VERTEBRAE_MIDDLE = 12  # between the other two
    VERTEBRAE_LOWER = 13  # whose centre lies below the higher dome of the diaphragm


ORGANS = {
    Label.LIVER: Region.LIVER,
    Label.SPLEEN: Region.SPLEEN,
    Label.HEART: Region.HEART,
    Label.AORTA: Region.AORTA,
    Label.OESOPHAGUS: Region.OESOPHAGUS,
}


def anatomy(canvas: Canvas, body: Body, cavity: Cavity) -> NDArray[np.uint8]:
    """The regions (z, y, x) of a painted chest, without its table: from its labels and the body's own coordinates."""
    table = np.zeros(256, np.uint8)
    for label, region in ORGANS.items():
        table[label] = region
    regions = table[canvas.labels]
    depth, height, width = canvas.frame.shape
    everything = slice(0, depth), slice(0, height), slice(0, width)
    z, _, x = (canvas.full(field, everything) for field in canvas.frame.coarse)
    lung = np.isin(canvas.labels, LUNGS)
    oblique = canvas.full(cavity.fissures[0], everything) > 0
    flat = canvas.full(cavity.fissures[1], everything) > 0
    right = x < 0  # body coordinates grow to the patient's left
    for where, region in (
        (right & oblique & flat, Region.RIGHT_UPPER_LOBE),
        (right & oblique & ~flat, Region.RIGHT_MIDDLE_LOBE),
        (right & ~oblique, Region.RIGHT_LOWER_LOBE),
        (~right & oblique, Region.LEFT_UPPER_LOBE),
        (~right & ~oblique, Region.LEFT_LOWER_LOBE),
    ):
        regions[lung & where] = region
    spine = canvas.labels == Label.SPINE
    number = np.floor(z[spine] / body.vertebra + body.vertebra_phase)
    centre = (number + 0.5 - body.vertebra_phase) * body.vertebra
    domes = max(body.dome_right, body.dome_left)
    levels = np.where(centre < domes, Region.VERTEBRAE_LOWER, Region.VERTEBRAE_MIDDLE)
    regions[spine] = np.where(centre > body.carina, Region.VERTEBRAE_UPPER, levels)
    return regions

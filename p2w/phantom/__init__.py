"""Synthetic chest CTs with known ground truth: the data set of the demo and of the tests.

    python -m p2w.phantom --out LUNA16 --scans 12 --shape 128 256 256

`make_scan` gives one scan as arrays, `write_luna` a folder in LUNA16's layout.

How a scan is made: body.py draws a patient and its pose; organs.py computes distance fields of the soft tissue and
canvas.py paints them; organs.py and lungs.py add bones, vessels and airways as clouds of balls; chest.py adds nodules and
the scanner's noise. No torch, and no large BLAS calls, whose threads slow down many workers. With one version of NumPy and
SciPy on one kind of processor, the bytes depend on the seed alone; elsewhere sines may differ in the last bit, and so some
voxels by one HU.
"""

from p2w.phantom.body import LUNGS, Label
from p2w.phantom.chest import KINDS, Candidate, Nodule, PhantomScan, make_scan
from p2w.phantom.image_files import VERSION, write_luna

__all__ = [
    "KINDS",
    "LUNGS",
    "VERSION",
    "Candidate",
    "Label",
    "Nodule",
    "PhantomScan",
    "make_scan",
    "write_luna",
]

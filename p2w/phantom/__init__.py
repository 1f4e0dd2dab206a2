"""Synthetic chest CTs with known answers: the embedded data set, and the test bed.

    python -m p2w.phantom --out LUNA16 --scans 12 --shape 128 256 256

`make_scan` gives one scan as arrays, `write_luna` a folder in LUNA16's layout.

The way of a scan: body.py draws a patient, frame.py the pose, organs.py makes distance fields of the soft
parts, canvas.py paints them; bones.py, mediastinum.py and lungs.py lay balls (tubes.py, trees.py) over them,
nodules.py the answers; noise.py adds what a scanner adds. No torch, and no large BLAS calls: their threads
slow many workers down. The bytes depend on the seed alone for one NumPy and SciPy on one kind of processor;
elsewhere sines may differ in the last bit, and so some voxels by one HU.
"""

from p2w.phantom.chest import KINDS, Candidate, Nodule, PhantomScan, make_scan
from p2w.phantom.frame import LUNGS, Label
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

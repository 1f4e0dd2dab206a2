"""Synthetic chest CTs with known answers: the embedded data set, and the test bed.

    python -m p2w.data.phantom --out LUNA16 --scans 12 --shape 128 256 256

`make_scan` gives one scan as arrays, `write_luna` a folder in LUNA16's layout. The way of a scan: body.py
draws a patient, frame.py its pose, organs.py distance fields of the soft parts, canvas.py paints them;
bones.py, vessels.py, lungs.py and nodules.py paint tubes and balls over them; noise.py adds what a scanner
adds. No torch.
"""

from p2w.data.phantom.labels import LUNGS, Label
from p2w.data.phantom.luna import VERSION, write_luna
from p2w.data.phantom.nodules import KINDS
from p2w.data.phantom.scan import Candidate, Nodule, PhantomScan, make_scan

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

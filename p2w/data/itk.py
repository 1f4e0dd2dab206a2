"""Files that are left to ITK, which believes what headers say: promises are compared with the file before it is asked.

NRRD header: http://teem.sourceforge.net/nrrd/format.html
"""

import contextlib
import math
import os
import resource
from collections.abc import Iterator

import SimpleITK as sitk

from p2w.data.grid import BadScan
from p2w.data.stored import HEADER, TIMES, beside

READERS = {
    ".mhd": "MetaImageIO", ".mha": "MetaImageIO", ".nii": "NiftiImageIO", ".nii.gz": "NiftiImageIO",
    ".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO",
}  # fmt: skip

BESIDE, THREAD = 256 << 20, 16 << 20  # bytes that reading takes beside voxels: in all, and for each thread


@contextlib.contextmanager
def bounded(nbytes: int) -> Iterator[None]:
    """While open, this process cannot take more than `nbytes` of new memory, and some for threads and tables.

    A packed DICOM slice carries sizes of its own behind those of its header: 5 kB had GDCM take 3 GB (seen with
    JPEG 2000, SimpleITK 2.5). Refused the memory, it raises. Linux only; elsewhere nothing is bounded.
    """
    try:
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    # Of all cores, not of those that may be used: this is a bound, and ITK knows of affinity, but not of quotas.
    limit = taken + nbytes + BESIDE + THREAD * (os.cpu_count() or 1)
    if all(other == resource.RLIM_INFINITY or limit < other for other in (before, hard)):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def opened(path: str) -> sitk.ImageFileReader:
    """A reader of the file's format, by its ending, that has read the header. Raises BadScan."""
    lower = path.lower()
    if lower.endswith((".nrrd", ".nhdr")):
        nrrd_files(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(next(kind for ending, kind in READERS.items() if lower.endswith(ending)))
    reader.SetFileName(path)
    try:
        with bounded(0):
            reader.ReadImageInformation()
    except (RuntimeError, MemoryError) as error:
        raise BadScan(f"cannot be read: {last_line(error)}") from error
    return reader


def check_promise(path: str, reader: sitk.ImageFileReader, nbytes: int) -> None:
    """Raise BadScan when a header promises more voxels than `nbytes` of files can hold; ITK would allot them all."""
    count = math.prod(reader.GetSize()) * reader.GetNumberOfComponents()
    promised = count * sitk.Image(1, 1, reader.GetPixelID()).GetSizeOfPixelComponent()
    raw = path.lower().endswith((".nrrd", ".nhdr")) and nrrd_fields(path).get("encoding", "").lower() == "raw"
    if promised > nbytes * (1 if raw else TIMES):
        raise BadScan(
            f"truncated: the header promises {promised:,} bytes of voxels, the files have {nbytes:,}"
        )


def nrrd_fields(path: str) -> dict[str, str]:
    """Fields of an NRRD header, names in lower case without blanks."""
    with open(path, "rb") as file:
        text = file.read(HEADER).partition(b"\n\n")[0].decode("latin-1")
    pairs = (
        line.partition(":")[::2] for line in text.splitlines() if ":" in line and not line.startswith("#")
    )
    return {name.strip().lower().replace(" ", ""): value.strip() for name, value in pairs}


def nrrd_files(path: str) -> tuple[str, ...]:
    """The header, and the file of voxels beside it where there is one. Raises BadScan when it lies elsewhere."""
    data = nrrd_fields(path).get("datafile", "")
    if not data or data.upper().startswith("LIST") or "%" in data:
        return (path,)
    if not beside(data):
        raise BadScan(
            f"its data file {data!r} is not in the header's folder: put it there, and its bare name in the header"
        )
    full = os.path.join(os.path.dirname(path), data)
    return (path, full) if os.path.isfile(full) else (path,)


def last_line(error: Exception) -> str:
    """Of what ITK says: the reason stands there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

"""Small CT files, as the tests of the readers write them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # ct_files

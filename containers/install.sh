#!/bin/sh
# Install p2w into a Debian 12 (or newer) root: a virtual environment in /opt/p2w and its commands in /usr/local/bin.
# The Dockerfile and p2w.def run this; `containers/try.sh` runs it in a root made by debootstrap.
#
#   TORCH_INDEX   the index that torch comes from: https://download.pytorch.org/whl/cpu for machines without a GPU, …/cu126
#                 for V100, Pascal or drivers older than 580; empty: PyPI's build, for the newest CUDA
#   SOURCE        the checkout, or a wheel of it (default: the folder above this one)
set -eu

here=$(cd "$(dirname "$0")" && pwd)
source=${SOURCE:-$here/..}
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
# g++ and the headers of Python: Triton and torch.compile build their launchers with them at run time.
apt-get -qq install --no-install-recommends python3 python3-dev python3-venv g++ ca-certificates >/dev/null
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/p2w
pip="/opt/p2w/bin/pip --disable-pip-version-check install --quiet --no-cache-dir --constraint $here/../constraints.txt"
if [ -n "${TORCH_INDEX:-}" ]; then
    # By its own step: with two indexes pip would take whichever has the higher version.
    $pip --index-url "$TORCH_INDEX" torch
fi
if [ -d "$source" ]; then
    # A copy: the build leaves files behind, and the checkout may be read-only.
    copy=$(mktemp -d)
    cp -r "$source"/p2w "$source"/slurm "$source"/docs "$source"/setup.cfg "$source"/pyproject.toml "$source"/README.md "$source"/LICENSE "$copy"
    $pip "$copy[fast]"
    rm -rf "$copy"
else
    $pip "$source[fast]"
fi
# Not links: Python looks for its virtual environment beside the path that it was called by.
for name in python torchrun p2w; do
    printf '#!/bin/sh\nexec /opt/p2w/bin/%s "$@"\n' "$name" >"/usr/local/bin/$name"
    chmod +x "/usr/local/bin/$name"
done
python -c "import p2w" && p2w --help >/dev/null

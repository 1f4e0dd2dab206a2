#!/bin/bash
# The GPU day: everything that only a card can settle, in three calls of at most 400 seconds on one machine.
#
#   bash bench/gpu/wheels.sh          beforehand, where there is a network: packages a bare GPU machine lacks, into .whl/
#   bash bench/gpu/day.sh 1           on the card: right? how fast?        (data sets are made beside it, in /tmp/day)
#   bash bench/gpu/day.sh 2           on the same machine: pretraining and fine-tuning, larger batches, what call 1 left out
#   bash bench/gpu/day.sh 3           on any machine with a card: pretraining at the paper's size, two tasks fine-tuned from it
#   python bench/gpu/table.py OUT-OF-1 OUT-OF-2 OUT-OF-3      afterwards, anywhere: bench/results/gpu_day.json and table.md
#   bash bench/gpu/day.sh --rehearse  every stage at toy size on the CPU
#
# OUT is the folder of the results (at most 8 files a call), LIMIT the seconds of a call, PYTHON the interpreter.
# A bare machine needs Python 3.11 or newer with torch for CUDA, triton and NumPy; no network, no make.
BEGAN=$(date +%s)
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
case "$*" in 1 | 2 | 3 | --rehearse) ;; *) sed -n '2,14s/^# \{0,1\}//p' "bench/gpu/day.sh" >&2; exit 2 ;; esac
python=${PYTHON:-python3}
export BEGAN PYTHONUNBUFFERED=1 OUT=${OUT:-$PWD/gpu-day} LIMIT=${LIMIT:-400}
if [ "$1" = --rehearse ]; then
  export DAY=${DAY:-$(mktemp -d)} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
else
  export DAY=${DAY:-/tmp/day} PYTHONPATH=$PWD:${DAY:-/tmp/day}/site
  if ! [ -e "$DAY/site/.whole" ]; then
    compgen -G '.whl/*.whl' >/dev/null || echo "warning: no wheels in .whl/: run bench/gpu/wheels.sh where there is a network" >&2
    mkdir -p "$DAY"
    # A package that cannot be installed is missing for some stages, which say so; the others go on.
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$DAY/site" .whl/*.whl &&
      touch "$DAY/site/.whole"
  fi
fi
exec "$python" bench/gpu/day.py "$1"

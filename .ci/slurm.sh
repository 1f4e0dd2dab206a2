#!/usr/bin/env bash
# Slurm's daemons and munge for tests/slurm, which starts and stops two nodes of its own; installs only, starts nothing.
# Where it cannot install, it says so and the tests skip themselves.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
missing=no
for name in munged slurmctld slurmd sbatch srun; do
    command -v "$name" >/dev/null || missing=yes
done
[ $missing = yes ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "slurm: not installed, and only root on a Debian can; tests/slurm will skip" >&2
    exit 0
fi
# Debian starts services after installing them; these would find no configuration and fail.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get -qq update && apt-get -qq install --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null; } ||
    echo "slurm: apt-get could not install it; tests/slurm will skip" >&2

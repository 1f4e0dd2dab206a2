#!/usr/bin/env bash
# The Debian packages that tests start for themselves: Slurm's daemons and munge (tests/slurm, two nodes), nginx and curl
# (remote sets), Chromium (reports). Installs only, starts nothing. Where it cannot install, it says so and those tests skip themselves.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
missing=no
for name in munged slurmctld slurmd sbatch srun nginx curl chromium; do
    command -v "$name" >/dev/null || missing=yes
done
[ $missing = yes ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "packages: not installed, and only root on a Debian can; tests of Slurm, remote sets and reports will skip" >&2
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
{ apt-get -qq update && apt-get -qq install --no-install-recommends \
    slurmctld slurmd slurm-client munge nginx-light curl ca-certificates chromium >/dev/null; } ||
    echo "packages: apt-get could not install them; tests of Slurm, remote sets and reports will skip" >&2

#!/bin/bash
# Fetch the packages that a bare GPU machine lacks into .whl/, which git ignores, in the versions of constraints.txt.
#
#   bash bench/gpu/wheels.sh                  for Python 3.12 on x86-64
#   PYTHON_VERSION=3.13 bash bench/gpu/wheels.sh
#
# Says how large they are with the tree: a tree of more than 64 MiB does not travel to the machine that we have at times.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
packages=(simpleitk crc32c tyro docstring_parser typeguard typing_extensions)
most_mib=64
wanted=()
for name in "${packages[@]}"; do
  line=$(grep -i "^$name==" constraints.txt) || { echo "error: constraints.txt has no version of $name" >&2; exit 2; }
  wanted+=("$line")
done
platforms=()
for libc in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${libc}_x86_64")
done
rm -rf .whl
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "${PYTHON_VERSION:-3.12}" --implementation cp "${platforms[@]}" --dest .whl "${wanted[@]}"
ls -1 .whl
wheels=$(du -sk .whl | cut -f1)
tree=$(git ls-files -z --cached --others --exclude-standard | du -ck --files0-from=- | tail -n 1 | cut -f1)
printf 'wheels %d MiB, with the tree %d of %d MiB\n' $((wheels / 1024)) $(((wheels + tree) / 1024)) "$most_mib"
if [ $(((wheels + tree) / 1024)) -ge "$most_mib" ]; then
  echo "error: the tree with the wheels does not stay below $most_mib MiB; move large untracked files away" >&2
  exit 1
fi

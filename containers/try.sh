#!/bin/bash
# Try the Dockerfile without a container daemon, in a Debian 12 root made by debootstrap (1.5 GB, as root): its COPY by
# .dockerignore, its RUN, its ENV and its CMD; then the demo's steps without a network.
#
#   bash containers/try.sh [ROOT]        MIRROR=http://deb.debian.org/debian  TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   BIND="/etc/pip.conf /opt/wheels"     files and folders of this machine that pip needs in there
set -euo pipefail

root=${1:-$(mktemp -d)/root}
checkout=$(cd "$(dirname "$0")/.." && pwd)
[[ $(id -u) == 0 ]] || { echo "try.sh: only root can change into another root" >&2; exit 2; }
command -v debootstrap >/dev/null || { echo "try.sh: no debootstrap; apt-get install debootstrap" >&2; exit 2; }
[[ -e $root/etc/debian_version ]] || debootstrap --variant=minbase bookworm "$root" "${MIRROR:-http://deb.debian.org/debian}" >/dev/null

bound=()
unbind() { for one in "${bound[@]}"; do umount "$one"; done; }
trap unbind EXIT
bind() {  # FROM TO
    if [[ -d $1 ]]; then mkdir -p "$root$2"; else mkdir -p "$(dirname "$root$2")"; touch "$root$2"; fi
    mount --bind "$1" "$root$2"
    bound=("$root$2" "${bound[@]}")
}
bind /proc /proc
bind /dev /dev
bind /etc/resolv.conf /etc/resolv.conf
[[ -e $root/etc/hosts ]] || echo "127.0.0.1 localhost" >"$root/etc/hosts"  # as a container daemon does
for one in ${BIND:-}; do bind "$one" "$one"; done

# COPY . /src: a copy, which RUN deletes at its end.
mountpoint -q "$root/src" && { echo "try.sh: something is mounted on $root/src; umount it" >&2; exit 2; }
rm -rf --one-file-system "$root/src"
mkdir "$root/src"
sed -n 's|^[^#]|./&|p' "$checkout/.dockerignore" >"$root/tmp/ignored"
tar --create --directory "$checkout" --anchored --exclude-from="$root/tmp/ignored" . | tar --extract --directory "$root/src"
step() { sed -n "s/^$1 //p" "$checkout/containers/Dockerfile"; }
read -ra given <<<"$(step ENV)"

in_root() { chroot "$root" env -i HOME=/root PATH=/usr/local/bin:/usr/bin:/bin TORCH_INDEX="${TORCH_INDEX:-}" "${KEEP[@]}" "${given[@]}" "$@"; }
KEEP=()
for name in HTTP_PROXY HTTPS_PROXY NO_PROXY PIP_CERT SSL_CERT_FILE; do [[ -z ${!name:-} ]] || KEEP+=("$name=${!name}"); done
in_root sh -c "$(step RUN)"
[[ ! -e $root/src ]]
# Nothing is fetched at run time: the demo's steps, at a size of seconds, in a network namespace without a network.
alone=(unshare --net sh -c 'ip link set lo up && exec "$@"' sh)
"${alone[@]}" true 2>/dev/null || { echo "try.sh: no network namespace here; the steps run with the network" >&2; alone=(); }
steps='set -e; cd "$(mktemp -d)"
python -m p2w.phantom --out LUNA16 --scans 10 --workers 2
p2w shard-luna --luna LUNA16 --out shards --subsets 0-9 --val-fraction 0.2
torchrun --nproc_per_node=1 -m p2w train demo --shards shards --run-dir run --train.steps 20
p2w export run --to safetensors'
"${alone[@]}" chroot "$root" env -i HOME=/root PATH=/usr/local/bin:/usr/bin:/bin "${given[@]}" sh -c "$steps"
[[ $(step CMD) == '["p2w", "--help"]' ]]
in_root p2w --help >/dev/null
echo "try.sh: $root works"

#!/bin/bash
# Try install.sh without a container daemon: in a Debian 12 root made by debootstrap (1.5 GB, as root).
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
bind "$checkout" /src
bind /proc /proc
bind /dev /dev
bind /etc/resolv.conf /etc/resolv.conf
for one in ${BIND:-}; do bind "$one" "$one"; done

in_root() { chroot "$root" env -i HOME=/root PATH=/usr/local/bin:/usr/bin:/bin TORCH_INDEX="${TORCH_INDEX:-}" "${KEEP[@]}" "$@"; }
KEEP=()
for name in HTTP_PROXY HTTPS_PROXY NO_PROXY PIP_CERT SSL_CERT_FILE; do [[ -z ${!name:-} ]] || KEEP+=("$name=${!name}"); done
in_root sh /src/containers/install.sh
# Nothing is fetched at run time: the demo's steps, at a size of seconds, in a network namespace without a network.
unshare --net true 2>/dev/null && alone=(unshare --net) || alone=()
steps='set -e; cd "$(mktemp -d)"; ip link set lo up 2>/dev/null || true
python -m p2w.phantom --out LUNA16 --scans 10 --workers 2
p2w shard-luna --luna LUNA16 --out shards --subsets 0-9 --val-fraction 0.2
torchrun --nproc_per_node=1 -m p2w train demo --shards shards --run-dir run --train.steps 20
p2w export run --to safetensors'
"${alone[@]}" chroot "$root" env -i HOME=/root PATH=/usr/local/bin:/usr/bin:/bin sh -c "$steps"
echo "try.sh: $root works"

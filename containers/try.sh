#!/bin/bash
# Build the Dockerfile's image without a container daemon or a registry, and run the demo in it: `buildah` takes the Dockerfile
# from FROM to CMD, on a Debian 12 made by `debootstrap` under the name that FROM states; then the image's first command and
# the demo's steps run in it without a network. As root; 10 GB of disk, which the script frees at its end.
#
#   apt-get install buildah debootstrap
#   bash containers/try.sh                                            removes the image again
#   KEEP=image.tar bash containers/try.sh                             keeps it: `docker load`, `podman load` or apptainer read it
#   MIRROR=http://deb.debian.org/debian  TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   BIND="/etc/pip.conf /opt/wheels FROM:TO"                          what pip needs in there of this machine, read-only
set -euo pipefail

checkout=$(cd "$(dirname "$0")/.." && pwd)
[[ $(id -u) == 0 ]] || { echo "try.sh: only root can build without a daemon here" >&2; exit 2; }
for name in buildah debootstrap; do
    command -v "$name" >/dev/null || { echo "try.sh: no $name; apt-get install $name" >&2; exit 2; }
done
work=$(mktemp -d "${TMPDIR:-/var/tmp}/p2w-image.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
bud() { local verb=$1; shift; "${alone[@]}" buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$verb" "$@"; }
alone=()

# The base: what FROM names, made here. In place of a registry's it has Debian's newest point release.
name=$(sed -n 's/^FROM //p' "$checkout/containers/Dockerfile")
debootstrap --variant=minbase bookworm "$work/base" "${MIRROR:-http://deb.debian.org/debian}" >/dev/null
base=$(bud from scratch)
bud copy --quiet "$base" "$work/base" / >/dev/null
bud config --cmd bash --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$base"
bud commit --quiet --rm "$base" "docker.io/library/$name" >/dev/null
rm -rf --one-file-system "$work/base"

bound=()
for one in ${BIND:-}; do [[ $one == *:* ]] || one=$one:$one; bound+=(--volume "$one:ro"); done
bud build --isolation chroot --pull-never --file "$checkout/containers/Dockerfile" --tag p2w \
    --build-arg TORCH_INDEX="${TORCH_INDEX:-}" "${bound[@]}" "$checkout"

# Nothing is fetched at run time: the demo's steps, at a size of seconds, in a network namespace without a network.
alone=(unshare --net sh -c 'ip link set lo up && exec "$@"' sh)
"${alone[@]}" true 2>/dev/null || { echo "try.sh: no network namespace here; the steps run with the network" >&2; alone=(); }
image=$(bud from --pull-never p2w)
mapfile -t first < <(bud inspect --format '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}' "$image" | sed '/^$/d')
bud run --isolation chroot "$image" -- "${first[@]}" >/dev/null
bud run --isolation chroot "$image" -- p2w --version
# A daemon writes the name of a container into its /etc/hosts; without it and without a network torchrun looks for itself in vain.
steps='set -e; test ! -e /src; cd "$(mktemp -d)"; echo "127.0.0.1 $(hostname)" >>/etc/hosts
python -m p2w.phantom --out LUNA16 --scans 10 --workers 2
p2w shard-luna --luna LUNA16 --out shards --subsets 0-9 --val-fraction 0.2
torchrun --standalone --nproc_per_node=2 -m p2w train demo --shards shards --run-dir run --train.steps 20
p2w export run --to safetensors'
bud run --isolation chroot "$image" -- sh -c "$steps"
[[ -z ${KEEP:-} ]] || bud push --quiet p2w "docker-archive:$KEEP:p2w:latest"
echo "try.sh: the image of containers/Dockerfile works"

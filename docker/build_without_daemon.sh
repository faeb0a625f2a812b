#!/usr/bin/env bash
# Builds an image of docker/Dockerfile where no container engine runs, and trains a small network in it.
#   docker/build_without_daemon.sh [--target cpu|gpu] [--tag NAME] [--wheels FOLDER] [--no-smoke]
# Needs root, and Debian's `buildah` and `debootstrap`; installs nothing itself. The base image is a Debian with its
# Python, made from the mirror that this machine's apt uses (DEBIAN_MIRROR names another one) and kept for the next time
# (`buildah rmi localhost/sr-ray-base`); BASE_IMAGE=… takes one that is there. pip, uv and TLS are configured in the build
# as here: PIP_CONFIG_FILE, UV_CONFIG_FILE, SSL_CERT_FILE, or what pip and uv would find; none of it is left in the image.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=cpu tag='' wheels='' smoke=1
while [ $# -gt 0 ]; do
    case "$1" in
        --target) target=$2; shift ;;
        --tag) tag=$2; shift ;;
        --wheels) wheels=$2; shift ;;
        --no-smoke) smoke='' ;;
        *) sed -n '2,8s/^# \?//p' "$0" >&2; exit 2 ;;
    esac
    shift
done
case "$target" in cpu | gpu) ;; *) echo "--target $target: cpu or gpu" >&2; exit 2 ;; esac
tag=${tag:-localhost/sr-ray:$target}
for program in buildah debootstrap; do
    command -v "$program" >/dev/null || { echo "$program is not installed (Debian: apt install buildah debootstrap)" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "only root can make a Debian root folder and mount layers" >&2; exit 2; }
[ -z "$wheels" ] || [ -d "$wheels" ] || { echo "--wheels $wheels: no such folder" >&2; exit 2; }

work=$(mktemp -d)
container=''
clean_up() {
    [ -z "$container" ] || buildah rm "$container" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap clean_up EXIT
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

base=${BASE_IMAGE:-localhost/sr-ray-base:bookworm}
if [ -z "${BASE_IMAGE:-}" ] && ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    step "base image: Debian 12 with Python 3.11"
    mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk '$2 == "bookworm" && $3 == "main" { print $1; exit }')}
    [ -n "$mirror" ] || { echo "apt's sources have no bookworm: set DEBIAN_MIRROR" >&2; exit 2; }
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$work/root" "$mirror" >"$work/log" ||
        { tail -n 20 "$work/log" >&2; exit 1; }
    rm -rf "$work/root"/var/cache/apt/archives/*.deb "$work/root"/var/lib/apt/lists/* "$work/root"/var/log/*
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/root" / >/dev/null
    buildah config --cmd bash "$container"
    buildah commit --quiet "$container" "$base" >/dev/null
    buildah rm "$container" >/dev/null
    container=''
    rm -rf "$work/root"
fi

step "$tag from $base"
first_file() { for path in "$@"; do [ -n "$path" ] && [ -f "$path" ] && { echo "$path"; return; }; done; true; }
# No cached steps: buildah 1.28 loses the mounts of stages that it has cached, and does not see that a mounted lock has
# changed. What pip and uv have downloaded is kept.
options=(--build-arg "BASE_IMAGE=$base" --target "$target" --tag "$tag" --isolation chroot --format docker --layers=false)
pip_conf=$(first_file "${PIP_CONFIG_FILE:-}" "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf" /etc/pip.conf)
uv_toml=$(first_file "${UV_CONFIG_FILE:-}" "$HOME/.config/uv/uv.toml" /etc/uv/uv.toml)
ca=$(first_file "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt)
[ -z "$pip_conf" ] || options+=(--secret "id=pip_conf,src=$pip_conf")
[ -z "$uv_toml" ] || options+=(--secret "id=uv_toml,src=$uv_toml")
[ -z "$ca" ] || options+=(--secret "id=ca,src=$ca")
[ -z "$wheels" ] || options+=(--build-context "wheels=$(realpath "$wheels")")
buildah bud "${options[@]}" -f docker/Dockerfile .

step "what is in it"
buildah images "$tag"
buildah inspect --type image --format '{{range .OCIv1.History}}{{.CreatedBy}}{{"\n"}}{{end}}' "$tag" | cut -c1-110 | tail -n 12

if [ -n "$smoke" ]; then
    step "a job in it, as its user"
    container=$(buildah from --pull-never "$tag")
    buildah run --isolation chroot "$container" -- bash -s <docker/smoke_job.sh
fi
step "done: $tag"

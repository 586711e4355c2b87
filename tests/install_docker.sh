#!/bin/sh
# Brings what the Docker tests need, as root on Debian or Ubuntu: an engine, and two images that are
# made without a registry and kept in $NANOEVAL_TEST_CACHE (~/.cache/nanoeval-tests).
#   tests/install_docker.sh            all of it
#   tests/install_docker.sh images     the images only, where they are missing
set -eu

cache=${NANOEVAL_TEST_CACHE:-$HOME/.cache/nanoeval-tests}

if [ "${1:-all}" = all ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        docker.io debootstrap iptables iproute2 >/dev/null
fi

mkdir -p "$cache"
[ -f "$cache/minimal.tar" ] && [ -f "$cache/jupyter.tar" ] && exit 0

root=$(mktemp -d)
trap 'rm -rf "$root" "$cache"/*.$$' EXIT

pack() {
    tar -C "$root" --exclude=./var/cache/apt/archives --exclude=./var/lib/apt/lists \
        --exclude=./usr/share/doc --exclude=./usr/share/locale -cf "$cache/$1.$$" .
    mv "$cache/$1.$$" "$cache/$1"
}

debootstrap --variant=minbase --include=python3-minimal bookworm "$root" >/dev/null
pack minimal.tar
cp /etc/resolv.conf "$root/etc/resolv.conf"
chroot "$root" apt-get update -qq
DEBIAN_FRONTEND=noninteractive chroot "$root" \
    apt-get install -y -qq --no-install-recommends python3-ipykernel >/dev/null
pack jupyter.tar

#!/bin/sh
# The kernels' checks on 64-bit ARM: cross-compiled, and run by an emulator. Any machine will do.
# Without the tools it says which are missing and ends well: they are no part of the package.
set -eu
cd "$(dirname "$0")/../.."

missing=""
for tool in aarch64-linux-gnu-gcc qemu-aarch64; do
    command -v "$tool" >/dev/null || missing="$missing $tool"
done
if [ -n "$missing" ]; then
    echo "skipped: no$missing; on Debian: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
    exit 0
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
aarch64-linux-gnu-gcc -O3 -ffp-contract=off -Wall -Wextra -Werror -static \
    tests/kernels/check.c llmcad_actors/kernels/kernels.c -lm -o "$folder/check"
qemu-aarch64 "$folder/check"

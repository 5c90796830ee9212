#!/bin/sh
# Writes torch.lock, runtime.lock and test.lock anew from *.in: exact versions with hashes.
# Needs `uv` on PATH, and FIND_LINKS or UV_INDEX where the CPU build of torch is found.
# torch stands apart because its CPU build has an index of its own in most places (tools/setup.sh);
# excluded.txt lists what vLLM asks for and must not be installed (the CUDA builds break transformers).
set -eu
cd "$(dirname "$0")"
compile() {
  uv pip compile "$@" --override excluded.txt --python-version 3.11 \
    --python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-header --no-annotate --quiet ${FIND_LINKS:+--find-links "$FIND_LINKS"}
}
compile test.in > test.all
compile runtime.in -c test.all > runtime.all
is_torch='/^[a-z]/ {keep = /^torch==/} keep'
not_torch='/^[a-z]/ {keep = !/^torch==/} keep'
awk "$is_torch" runtime.all > torch.lock
awk "$not_torch" runtime.all > runtime.lock
awk "$not_torch" test.all > test.lock
rm test.all runtime.all

#!/usr/bin/env bash
# Tests the CPU kernels under the address and undefined behaviour sanitizers of GCC: bash tools/sanitize_cpu.sh
# Needs the environment that scripts/test.sh makes. Takes some minutes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

g++ -std=c++17 -O1 -g -fPIC -shared -fvisibility=hidden -ffp-contract=off -fno-exceptions -fno-rtti -fno-threadsafe-statics \
    -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all \
    "$root"/kernels/torch-ext/hf_pcdvq_kernels/cpu/csrc/*.cpp -o "$folder/libhfp.so"

# Python itself is not instrumented, so the sanitizer has to be loaded first; and it leaks by design. One thread, because the
# sanitizer does not know the threads that PyTorch's OpenMP runtime makes.
cd "$root"
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
    .venv/bin/python -m pytest -n 0 -p no:cacheprovider --cpu-library "$folder/libhfp.so" tests/kernels/test_cpu.py "$@"

#!/usr/bin/env bash
# Lint and tests, in an environment that it makes: bash scripts/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare_env test -e "${root}[dev]"
export PATH=$root/.venv/bin:$PATH
cd "$root"

# Both run, whatever the first one finds; either failing fails the whole.
status=0
bash scripts/lint.sh || status=$?
# A process per core; the tests of a file share what is expensive to make, so they stay together. In the order of their names:
# those with the fewest tests would come last, which are the longest.
python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@" || status=$?
# What runs where no compiler was found.
if [ $# -eq 0 ]; then
    python -m pytest -n auto --dist loadfile --without-cpu-library tests/kernels/test_ops.py tests/modules/test_linear.py tests/modules/test_fused_experts.py || status=$?
fi
exit "$status"

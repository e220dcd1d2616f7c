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
python -m pytest "$@" || status=$?
exit "$status"

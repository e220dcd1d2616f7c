#!/usr/bin/env bash
# Check style and types with the settings in ruff.toml and setup.cfg: bash scripts/lint.sh [--fix]
# Uses the tools on the PATH, or makes the environment of test.sh if they are missing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$root"
if ! command -v ruff >/dev/null || ! command -v mypy >/dev/null; then
    prepare_env test -e "${root}[dev]"
    export PATH=$root/.venv/bin:$PATH
fi

if [ "${1:-}" = --fix ]; then
    ruff check --quiet --fix-only .
    ruff format --quiet .
fi
status=0
ruff check . || status=$?
ruff format --check . || status=$?
mypy || status=$?
exit "$status"

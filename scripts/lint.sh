#!/usr/bin/env bash
# Check style and types with the settings in setup.cfg: bash scripts/lint.sh [--fix]
# Uses the tools on the PATH, or makes the environment of test.sh if they are missing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$root"
if ! command -v ruff >/dev/null || ! command -v mypy >/dev/null; then
    prepare_env test -e "${root}[dev]"
    export PATH=$root/.venv/bin:$PATH
fi

# ruff cannot read setup.cfg, so its settings are passed on the command line.
setting() {
    python3 -c 'import configparser, sys; c = configparser.ConfigParser(); c.read("setup.cfg"); print(c["tool:ruff"][sys.argv[1]])' "$1"
}
args=$(setting args)
check_args=$(setting check_args)

# shellcheck disable=SC2086  # the settings are several words
if [ "${1:-}" = --fix ]; then
    ruff check --quiet --fix-only $args $check_args .
    ruff format --quiet $args .
fi
status=0
ruff check $args $check_args . || status=$?
ruff format --check $args . || status=$?
mypy || status=$?
exit "$status"

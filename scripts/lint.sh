#!/usr/bin/env bash
# Run the checks of .pre-commit-config.yaml on the whole tree: bash scripts/lint.sh [--fix]
# --fix first fixes what ruff can fix. Uses the tools on the PATH, or makes the environment of test.sh if one is missing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$root"
if ! command -v git >/dev/null; then
    echo "lint.sh: git is not installed, and pre-commit lists the files to check with it" >&2
    exit 1
fi
for tool in pre-commit end-of-file-fixer ruff mypy; do
    if ! command -v "$tool" >/dev/null; then
        prepare_env test -e "${root}[dev]"
        export PATH=$root/.venv/bin:$PATH
        break
    fi
done

if [ "$(git rev-parse --show-toplevel 2>/dev/null)" != "$(pwd -P)" ]; then
    # An unpacked archive: a temporary git directory elsewhere lets git list its files.
    GIT_DIR=$(mktemp -d)
    export GIT_DIR GIT_WORK_TREE=$root
    trap 'rm -rf "$GIT_DIR"' EXIT
    git init --quiet
    git add --all
fi
if [ "${1:-}" = --fix ]; then
    ruff check --quiet --fix-only .
    ruff format --quiet .
fi
pre-commit run --all-files --show-diff-on-failure

#!/usr/bin/env bash
# Quantize a small model and show what it costs and what it saves: bash scripts/quickstart.sh [--help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare_env quickstart -e "${root}[plot,numba]" gguf
# Progress bars belong on a terminal only. quickstart.py sees to those that do not ask this variable.
[ -t 2 ] || export TQDM_DISABLE=1
exec "$env_python" "$root/scripts/quickstart.py" "$@"

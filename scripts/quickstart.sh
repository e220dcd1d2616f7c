#!/usr/bin/env bash
# Quantize a small model and show what it costs and what it saves: bash scripts/quickstart.sh [--help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare_env quickstart -e "$root" gguf
exec "$env_python" "$root/scripts/quickstart.py" "$@"

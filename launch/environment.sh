# Sourced by the scripts beside it: make the virtual environment, or bring it up to date.
#   make_environment [EXTRA]      EXTRA: an extra of pyproject.toml, such as dev
# FLATCAL_VENV names another place than .venv, PYTHON another interpreter than python3.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${FLATCAL_VENV:-$root/.venv}

make_environment() {
    local extra=${1:+[$1]} python=${PYTHON:-python3} fits wanted
    fits='import ssl, sys; sys.exit(sys.version_info < (3, 11))'
    # One that is there is kept, whatever PATH says today: two interpreters in one do not work.
    if ! "$venv/bin/python" -c "$fits" 2>/dev/null; then
        if ! "$python" -c "$fits" 2>/dev/null; then
            echo "error: Python 3.11 or newer, with ssl, is needed as '$python'; set PYTHON to such a one" >&2
            return 1
        fi
        if [ -e "$venv/pyvenv.cfg" ]; then
            echo "$venv does not work with this machine's Python: making it anew"
            rm -rf "$venv"
        fi
        if ! "$python" -m venv "$venv"; then
            echo "error: '$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        fi
    fi
    python=$venv/bin/python
    wanted=$("$python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
        "$root/pyproject.toml")
    if [ "$(cat "$venv/installed${1:+-$1}" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into $venv (PyTorch with CUDA is some 6 GB; once)"
        "$python" -m pip install --quiet --upgrade pip || return 1
        "$python" -m pip install --quiet --editable "$root$extra" || return 1
        echo "$wanted" > "$venv/installed${1:+-$1}"
    fi
    export PATH="$venv/bin:$PATH"
}

# Sourced by the scripts beside it: make the virtual environment, or bring it up to date.
#   make_environment tested|latest [EXTRA]
# tested: the versions of constraints.txt, which the tests passed with; latest: the newest that
# pyproject.toml allows. EXTRA: an extra of pyproject.toml, such as dev.
# FLATCAL_VENV names another place than .venv, PYTHON another interpreter than python3.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${FLATCAL_VENV:-$root/.venv}

make_environment() {
    local versions=$1 extra=${2:-} python=${PYTHON:-python3} fits wanted marker
    fits='import ssl, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
    # One that is there is kept, whatever PATH says today: two interpreters in one do not work.
    if ! "$venv/bin/python" -c "$fits" 2>/dev/null; then
        if ! "$python" -c "$fits" 2>/dev/null; then
            echo "error: Python 3.11, 3.12 or 3.13, with ssl, is needed as '$python'; set PYTHON to such a one" >&2
            return 1
        fi
        if [ -e "$venv/pyvenv.cfg" ]; then
            echo "$venv does not work with this machine's Python: making it again"
            rm -rf "$venv"
        fi
        if ! "$python" -m venv "$venv"; then
            echo "error: '$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        fi
    fi
    python=$venv/bin/python marker=$venv/installed${extra:+-$extra}
    wanted=$("$python" -c 'import hashlib, sys; print(hashlib.sha256(b"".join(open(f, "rb").read() for f in sys.argv[1:])).hexdigest())' \
        "$root/pyproject.toml" "$root/launch/constraints.txt")
    if [ "$versions" = latest ]; then
        echo "installing the newest versions into $venv"
        rm -f "$venv"/installed*  # they are no longer the tested versions
        "$python" -m pip install --quiet --upgrade pip || return 1
        "$python" -m pip install --quiet --upgrade --upgrade-strategy eager \
            --editable "$root${extra:+[$extra]}" || return 1
    elif [ "$(cat "$marker" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into $venv (PyTorch with CUDA is some 6 GB; once)"
        set -- --quiet --constraint "$root/launch/constraints.txt"
        if ! "$python" -m pip install "$@" --upgrade pip || ! "$python" -m pip install "$@" \
            --build-constraint "$root/launch/constraints.txt" --editable "$root${extra:+[$extra]}"; then
            echo "error: the versions of launch/constraints.txt cannot be installed here; --latest takes the newest" >&2
            return 1
        fi
        echo "$wanted" > "$marker"
    fi
    export PATH="$venv/bin:$PATH"
}

#!/usr/bin/env bash
# Make the environment, then lint, types, spelling and tests, two files at a time. Arguments go to
# pytest: a file, -n 0 for one at a time, -m exhaustive, or for what takes a few minutes
# -m "not ranks and not slurm and not browser" (CONTRIBUTING.md says what the markers mean).
#   ./launch/test.sh [--latest] [ARGUMENT...]     --latest: not the tested versions, but the newest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
versions=tested
if [ "${1:-}" = --latest ]; then versions=latest; shift; fi
make_environment "$versions" dev
cd "$root"
ruff check .
ruff format --check .
codespell
# Types take a minute where nothing is cached: beside the tests, which wait now and then.
said=$(mktemp)
trap 'rm -f "$said"' EXIT
mypy >"$said" 2>&1 &
types=$! code=0
unset PYTHONDONTWRITEBYTECODE # hundreds of processes start: none has to compile again
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || code=$?
if ! wait "$types"; then
    cat "$said"
    echo "error: mypy found the above" >&2
    exit 1
fi
exit "$code"

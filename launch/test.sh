#!/usr/bin/env bash
# Make the environment and run the tests; arguments go to pytest (-m exhaustive, a file, ...).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment dev
cd "$root"
ruff check .
ruff format --check .
exec env OMP_NUM_THREADS=1 python -m pytest "$@"

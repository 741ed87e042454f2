#!/usr/bin/env bash
# Everything on a fresh machine, on embedded real data: shards, three networks trained on two
# processes, a calibration report of each, a comparison. Run again, it does only what is missing.
#   ./launch/quickstart.sh [--latest] [DIR] [--seeds N]
# --latest: not the tested versions of launch/constraints.txt, but the newest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
started=$SECONDS versions=tested
if [ "${1:-}" = --latest ]; then versions=latest; shift; fi
make_environment "$versions"
exec python "$root/launch/quickstart.py" --installation-seconds $((SECONDS - started)) "$@"

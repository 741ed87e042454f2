#!/usr/bin/env bash
# Everything on a fresh machine, on embedded real data: shards, three networks trained on two
# processes, a calibration report of each, a comparison. Run again, it does only what is missing.
#   ./launch/quickstart.sh [DIR] [--seeds N]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
started=$SECONDS
make_environment
exec python "$root/launch/quickstart.py" --installation-seconds $((SECONDS - started)) "$@"

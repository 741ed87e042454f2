#!/usr/bin/env bash
# Everything on a fresh machine, on embedded real data: shards, three networks trained on two
# processes, a calibration report of each, a comparison. Run again, it does only what is missing.
#   ./launch/quickstart.sh [--latest] [DIR] [--seeds N]
# --latest: not the tested versions of launch/constraints.txt, but the newest. The study is
# configs/studies/digits.yaml. DIR: where its runs go, by default quickstart/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
versions=tested directory=()
if [ "${1:-}" = --latest ]; then versions=latest; shift; fi
if [ $# -gt 0 ] && [[ $1 != -* ]]; then directory=(--directory "$(realpath -m "$1")"); shift; fi
make_environment "$versions"
cd "$root"
exec python recipes/study.py configs/studies/digits.yaml --processes 2 --show "${directory[@]}" "$@"

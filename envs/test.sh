#!/usr/bin/env bash
# Set up the tests' environment and run them: bash envs/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. envs/environment.sh
export OMP_NUM_THREADS=1 # two processes, each on a core
exec "$PYTHON" -m pytest --numprocesses 2 "$@"

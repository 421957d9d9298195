#!/usr/bin/env bash
# Set up the tests' environment and run them: bash envs/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. envs/environment.sh
make_environment test "pytest>=8" "ruff==0.17.6" "av>=14"
exec "$PYTHON" -m pytest "$@"

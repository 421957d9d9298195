#!/usr/bin/env bash
# Set up the tests' environment and run them: bash envs/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. envs/environment.sh
exec "$PYTHON" -m pytest "$@"

#!/usr/bin/env bash
# Checks the code and runs the tests. `./run_tests.sh --full` also runs the long ones; other arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"

full=
if [ "${1:-}" = --full ]; then
  full=--full
  shift
fi
ruff check .
ruff format --check .
mypy
# Two processes, a file of tests in one of them, with one thread each: twice as fast on two cores, and no slower on one.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $full "$@"

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the test suite, setting up `.venv` first where needed. Arguments go on to pytest:
#   bash scripts/test.sh                          # everything but the slow tests
#   bash scripts/test.sh -m slow                  # the slow ones
#   bash scripts/test.sh -n 0 tests/test_house.py # one file, in one process
#   TRANSFORMERS=5.17.0 bash scripts/test.sh      # with the oldest transformers that is supported
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup_venv.sh"
cd "$root"

# One process per core with one thread each: the tests' tensors are too small for more threads to help.
export OMP_NUM_THREADS=1
# Nothing a test loads comes from the network.
export HF_HUB_OFFLINE=1
exec ".venv${TRANSFORMERS:+-$TRANSFORMERS}/bin/python" -m pytest -n auto "$@"

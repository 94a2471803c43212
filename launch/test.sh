#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them. Arguments go to pytest (-m slow: the rest).
# EXTRAS=dev,peer also installs PyTorch and transformers, without which their tests are skipped.
set -euo pipefail
source "$(dirname "$0")/common.sh"
make_environment "[${EXTRAS:-dev}]"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec .venv/bin/python -m pytest "$@"

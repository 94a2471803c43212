#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them. Arguments go to pytest (-m slow: the rest).
# With the TPU compiler (500 MB, no TPU needed). EXTRAS=dev,aot,peer adds PyTorch and transformers;
# tests of an extra that is left out are skipped.
set -euo pipefail
source "$(dirname "$0")/common.sh"
make_environment "[${EXTRAS:-dev,aot}]"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec .venv/bin/python -m pytest "$@"

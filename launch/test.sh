#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them, a file to a core, on four cores at most.
# Arguments go to pytest instead (-m slow: the rest), which then runs one test after the other.
# With the TPU compiler (500 MB, no TPU needed). EXTRAS=dev,aot,peer adds PyTorch and transformers;
# tests of an extra that is left out are skipped.
set -euo pipefail
source "$(dirname "$0")/common.sh"
make_environment "[${EXTRAS:-dev,aot}]"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# Not test by test: those of a file share what they have compiled.
[ $# -gt 0 ] || set -- --numprocesses logical --maxprocesses 4 --dist loadfile
exec .venv/bin/python -m pytest "$@"

#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them. Arguments go to pytest (-m slow: the rest).
set -euo pipefail
source "$(dirname "$0")/common.sh"
make_environment "[dev]"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec .venv/bin/python -m pytest "$@"

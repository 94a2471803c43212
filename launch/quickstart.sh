#!/usr/bin/env bash
# From nothing to a report: installs into .venv, makes clips, trains both stages, evaluates.
# Safe to run again: what exists is reused; --fresh starts anew. Arguments go to `aavs quickstart`.
set -euo pipefail
source "$(dirname "$0")/common.sh"
make_environment ""
exec .venv/bin/aavs quickstart "$@"

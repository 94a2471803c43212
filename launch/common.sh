# Sourced by the scripts beside it: a virtual environment in .venv with the project in it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1

make_environment() { # extras, such as "" or "[dev]"
  local python="${PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "aavs_jax needs Python 3.11 or newer; set PYTHON to one (found: $("$python" --version 2>&1))" >&2
    exit 2
  fi
  # One whose making was interrupted has no pip, and has it after this.
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -m venv .venv
  elif [ -n "${PYTHON:-}" ] &&
    ! grep -qxF "version = $("$python" -c 'import platform; print(platform.python_version())')" .venv/pyvenv.cfg; then
    echo "making .venv anew, for $("$python" --version) ..."
    "$python" -m venv --clear .venv
  fi
  # Installed already for this pyproject.toml and these extras: nothing to do.
  local stamp=".venv/installed$1"
  if ! cmp -s pyproject.toml "$stamp"; then
    echo "installing into .venv ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$1"
    cp pyproject.toml "$stamp"
  fi
}

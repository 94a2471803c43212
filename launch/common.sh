# Sourced by the scripts beside it: a virtual environment in .venv with the project in it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1

make_environment() { # extras, such as "" or "[dev]"
  local python="${PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "aavs_jax needs Python 3.11 or newer; set PYTHON to one (found: $("$python" --version 2>&1))" >&2
    exit 2
  fi
  local make=() stamp=".venv/installed$1"
  # One whose making was interrupted has no pip, and has it after this.
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    make=(.venv)
  elif [ -n "${PYTHON:-}" ] &&
    ! grep -qxF "version = $("$python" -c 'import platform; print(platform.python_version())')" .venv/pyvenv.cfg; then
    make=(--clear .venv)
  elif cmp -s pyproject.toml "$stamp"; then
    return # installed already for this pyproject.toml and these extras
  fi
  # Jobs of slurm.sh import from it; without squeue, or an answer of it, there are none.
  if [ -d .venv ] && [ -n "$(squeue --noheader --me --name=aavs 2>/dev/null)" ]; then
    echo ".venv would change under your jobs named aavs: wait for their end (squeue --me), or take" \
      "another copy of the project" >&2
    exit 2
  fi
  if [ ${#make[@]} -gt 0 ]; then
    echo "making .venv with $("$python" --version) ..."
    "$python" -m venv "${make[@]}"
  fi
  echo "installing into .venv ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$1"
  cp pyproject.toml "$stamp"
}

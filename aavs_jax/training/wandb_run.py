"""The metrics of a training run at Weights & Biases, where somebody asks for that."""

import json
import secrets
from collections.abc import Mapping
from typing import Any

import ml_collections
from etils import epath

from aavs_jax.console import say
from aavs_jax.devices import distributed
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline.errors import UserError


def require() -> None:
  """Raises UserError if wandb is not installed."""
  try:
    import wandb  # noqa: F401
  except ImportError:
    raise UserError(
      "--wandb needs wandb, which is missing: run `pip install -e '.[wandb]'`"
    ) from None


def begin(project: str, folder: epath.Path, config: ml_collections.ConfigDict) -> list['WandbRun']:
  """The run of a work folder in a project, in the first process; none without a project."""
  if not project or not distributed.is_first():
    return []
  require()
  return [WandbRun(folder, project, config.to_dict())]


class WandbRun:
  """One run there for a work folder, whose id the folder keeps: a restart goes on with it.

  Whatever fails there, such as the network or the login, is said once and stops nothing.
  WANDB_MODE=offline keeps the rows in the folder, for `wandb sync`.
  """

  def __init__(self, folder: epath.Path, project: str, config: Mapping[str, Any]):
    self._run = None
    try:
      import wandb

      self._run = wandb.init(
        project=project,
        id=_run_id(folder, project),
        resume='allow',
        name=folder.name,
        dir=None if '://' in str(folder) else str(folder),
        config=dict(config),
      )
    except Exception as error:  # of whatever kind: training matters more
      self._give_up(error)

  def write(self, kind: str, values: Mapping[str, Any]) -> None:
    """One row, under the same names as in TensorBoard; steps that it has are not taken again."""
    if self._run is None:
      return
    try:
      self._run.log({f'{kind}/{n}': value for n, value in values.items()}, step=values['step'])
    except Exception as error:
      self._give_up(error)

  def close(self) -> None:
    if self._run is None:
      return
    try:
      self._run.finish()
    except Exception as error:
      self._give_up(error)

  def _give_up(self, error: Exception) -> None:
    self._run = None
    text = ' '.join(str(error).split())[:200] or type(error).__name__
    say(f'  WARNING: Weights & Biases takes no more rows of this run ({text}); training goes on')


def _run_id(folder: epath.Path, project: str) -> str:
  """The id that the folder's run has in a project, a new one if it has none."""
  path = folder / 'wandb.json'
  known = files.read_json(path, {...: str}, 'remove it') if files.is_there(path) else {}
  if project not in known:
    known[project] = secrets.token_hex(8)
    files.write_text(path, json.dumps(known))
  return known[project]

"""What a stage starts from: the numbers of another run, or of a converted checkpoint."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh

from aavs_jax import config as config_lib
from aavs_jax.devices.mesh import compiled_to_run_once, state_sharding
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.methods.method import Method
from aavs_jax.training import checkpoint, phases
from aavs_jax.training.state import Flat, flatten, matches

BACKBONES = ('pvt_v2', 'resnet')  # kinds of converted folders that hold a backbone and VGGish alone


def load_start(config: ml_collections.ConfigDict, method: Method) -> Flat:
  """All numbers of the checkpoint that config.train.init names, by path.

  Raises:
    UserError: it cannot be read, it is the audio network alone, or it was trained with values that
      no shape shows and that give its parameters another meaning.
  """
  work_folder = work_folder_of(config.train.init)
  note = checkpoint.converted(work_folder)
  if note and note['kind'] == 'vggish':
    raise UserError(
      f'{config.train.init} holds VGGish alone: hand it to `aavs convert` with --vggish and start '
      'from what that writes'
    )
  start, _ = checkpoint.load_flat(config.train.init)
  require_fit(config, method)
  return start


def require_fit(config: ml_collections.ConfigDict, method: Method) -> None:
  """UserError if config.train.init was trained with values that give its numbers another meaning.

  Of its numbers nothing is read.
  """
  work_folder = work_folder_of(config.train.init)
  note = checkpoint.converted(work_folder)
  other = config_lib.from_json(work_folder / 'config.json')
  kind, same = note['kind'] if note else '', ('method', *method.must_match)
  if kind in BACKBONES:  # that of ImageNet alone is a start for every method that has it
    same = method.must_match
  elif kind == 'hearing':  # so is VGGish
    same = [key for key in method.must_match if key.startswith('vggish.')]
  require_same_meaning(config, other, config.train.init, same)


def require_same_meaning(
  config: ml_collections.ConfigDict,
  other: ml_collections.ConfigDict,
  name: str,
  keys: Iterable[str],
) -> None:
  """Refuses to begin with what NAME has learnt by the other config, where a key differs."""
  for key in keys:
    ours, theirs = (functools.reduce(_of, key.split('.'), c) for c in (config, other))
    if theirs not in (ours, 'none'):
      raise UserError(
        f'config.{key} is {ours!r}, but {name} was trained with {theirs!r}: '
        'start from a checkpoint of the same config.model'
      )


def _of(section: ml_collections.ConfigDict, key: str) -> Any:
  """A part of a config; 'none' where another method has no such."""
  return section.get(key, 'none')


def work_folder_of(init: str) -> epath.Path:
  """The work folder that a config.train.init is, or that the checkpoints it names belong to."""
  checkpoint.refuse_other_bucket(init)
  start = epath.Path(init)
  folders = (start, start.parent, start.parent.parent)
  return next((folder for folder in folders if files.is_there(folder / 'config.json')), start)


def start_lacks(config: ml_collections.ConfigDict) -> Sequence[str]:
  """Patterns of the parameters that the start of config.train.init is known to lack.

  There are some only where a folder says so: what `aavs convert` made of a network without sound.
  """
  note = checkpoint.converted(work_folder_of(config.train.init)) if config.train.init else None
  return note['lacking'] if note else ()


def first(
  config: ml_collections.ConfigDict,
  method: Method,
  mesh: Mesh,
  key: jax.Array,
  given: Flat | None,
  lacks: Sequence[str] = (),
  resumed: bool = False,
) -> tuple[Flat, list[str], Flat]:
  """The numbers of step 0, where they will be.

  Args:
    config: the recipe.
    method: of the config.
    mesh: of the training.
    key: of what is initialised.
    given: what the start holds, see load_start, or None.
    lacks: see start_lacks.
    resumed: past step 0, those alone with which a later phase begins.

  Returns:
    The numbers, the paths of them that `given` does not fill, and the shapes of all of the model.

  Raises:
    UserError: it does not fit, see fill.
  """
  # Traced once: of a large model that takes seconds.
  drawn, shapes = jax.make_jaxpr(lambda key: flatten(method.init(key)), return_shape=True)(key)
  wanted = shapes
  if resumed:
    wanted = phases.needed_later(config, method, shapes)
    given = given and {path: value for path, value in given.items() if path in wanted}
  places = state_sharding(mesh, wanted)
  lacks = list(lacks)
  waited = [
    path
    for path in given or ()
    if matches(path, method.phase2_only) and not method.phase2_continues
  ]
  if waited and not any(given[path].any() for path in waited):
    # A start of phase 1. With zeros on both sides of its relu an adapter would never learn.
    given = {path: value for path, value in given.items() if path not in waited}
    lacks += [f'^{re.escape(path)}$' for path in waited]
  placed = jax.tree.map(phases.placed, wanted, places)
  found, lacking = fill(placed, given, method.stage_specific, lacks)
  draw = wanted if given is None else lacking
  if not draw:
    return found, lacking, shapes
  only = lambda flat: {path: flat[path] for path in draw}  # noqa: E731

  def fresh_of(key):
    return only(jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(drawn)(key)))

  # Created in their places: no device holds more than its part of the model.
  fresh = jax.jit(fresh_of, out_shardings=only(places), compiler_options=compiled_to_run_once(mesh))
  return {**found, **fresh(key)}, lacking, shapes


def fill(
  fresh: Flat, start: Flat | None, stage_specific: Sequence[str], lacks: Sequence[str] = ()
) -> tuple[Flat, list[str]]:
  """The numbers of step 0: fresh ones, overwritten by those of a start, in the same places.

  Args:
    fresh: as initialised from the seed, or shapes of it with shardings.
    start: of a checkpoint, or None.
    stage_specific: Method.stage_specific.
    lacks: patterns of what the start may lack besides.

  Returns:
    The numbers, and the paths that the start did not fill.

  Raises:
    UserError: the start lacks, has too much of, or disagrees in shape about anything else.
  """
  if start is None:
    return dict(fresh), []
  filled, lacking, problems = {}, [], []
  for path, value in fresh.items():
    found = start.get(path)
    if found is not None and found.shape == value.shape:
      filled[path] = _put_like(found, value)
    elif matches(path, stage_specific) or (found is None and matches(path, lacks)):
      lacking.append(path)
    else:
      shape = 'missing' if found is None else f'of shape {found.shape}'
      problems.append(f'{path} is {shape}, the model has {value.shape}')
  extra = [path for path in start if path not in fresh and not matches(path, stage_specific)]
  problems += [f'{path} is unknown to the model' for path in extra]
  if problems:
    raise UserError(
      f'train.init does not fit the model: {"; ".join(problems[:3])}'
      f'{f" and {len(problems) - 3} more" if len(problems) > 3 else ""}; '
      'start from a checkpoint of the same config.model'
    )
  return {**fresh, **filled}, lacking


def _put_like(value: np.ndarray, like: jax.Array) -> jax.Array:
  """The value where `like` is; every process has the whole of it and keeps its part."""
  value = np.asarray(value, like.dtype)
  return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])

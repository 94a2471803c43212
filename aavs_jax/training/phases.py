"""The phases of a training: how long each is, what it begins with, and its step, built here alone.

The release trains in two: at first what is new but Swin's adapters, which are zero;
then, from the best weights of the first, those too. Other methods go on from the last weights, see
Method.phase2_continues.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from aavs_jax.devices.mesh import compiler_options, state_sharding
from aavs_jax.input_pipeline.clips import Clip
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.methods.method import Method
from aavs_jax.training.optimizer import make_optimizer, taken_over
from aavs_jax.training.state import Flat, TrainState, create, flat_shapes, is_parameter, matches
from aavs_jax.training.step import train_step


class Plan(NamedTuple):
  """Of a training, in steps."""

  steps_per_epoch: float
  total: int
  eval_every: int
  boundary: int  # steps of phase 1, 0 if it is the only one

  def validates(self, step: int) -> bool:
    """Whether a validation follows a step, counted from 1."""
    return step % self.eval_every == 0 or step in self._ends

  def validations(self, step: int) -> int:
    """How many are left after a step, its own included."""
    regular = self.total // self.eval_every - (step - 1) // self.eval_every
    return regular + sum(end >= step and end % self.eval_every > 0 for end in self._ends)

  @property
  def _ends(self) -> set[int]:
    return {self.total, self.boundary or self.total}

  def phase_at(self, step: int) -> int:
    """1 or 2: the phase in which step number `step` (from 0) is taken."""
    return 2 if self.boundary and step >= self.boundary else 1

  def steps_of(self, phase: int) -> int:
    """How many steps a phase has."""
    if not self.boundary:
      return self.total
    return self.boundary if phase == 1 else self.total - self.boundary

  def step_of_phase(self, step: int) -> int:
    """The place of a step, both from 0, in its phase."""
    return step - self.boundary if self.phase_at(step) == 2 else step


def require_whole(config: ml_collections.ConfigDict, clips: Sequence[Clip], unit: int) -> None:
  """UserError for a clip whose frames are no multiple of the `unit` that stay together."""
  for clip in clips:
    if clip.num_frames % unit:
      raise UserError(
        f'{clip.key} has {clip.num_frames} frames, but {config.method} sees {unit} '
        'of a clip together: train on clips of a multiple of them, see config.data.subsets'
      )


def plan(config: ml_collections.ConfigDict, steps_per_epoch: float, frames: int, unit: int) -> Plan:
  """Of a training with this many steps an epoch, by a method of this unit.

  Every step has `frames` or a multiple of them.

  Raises:
    UserError: phases or batch do not fit.
  """
  train = config.train
  total = train.steps or max(1, round(train.epochs * steps_per_epoch))
  boundary = round(train.phase2_epoch * steps_per_epoch)
  if train.phase2_epoch and not 0 < boundary <= total:
    raise UserError(
      f'config.train.phase2_epoch is {train.phase2_epoch}, step {boundary} of {total}: let '
      'phase 2 begin after the first step, at the very end if never, or use 0 for a single phase'
    )
  if frames % (jax.device_count() * train.accumulate * unit):
    raise UserError(
      f'config.data.batch_items is {config.data.batch_items}, {frames} frames a step or a '
      'multiple of them, which '
      f'{jax.device_count()} devices cannot share evenly in {train.accumulate} parts'
      + (f' of whole clips, {unit} frames each' if unit > 1 else '')
      + ': use a multiple of devices times config.train.accumulate'
    )
  eval_every = train.eval_every_steps or max(1, round(train.eval_every_epochs * steps_per_epoch))
  return Plan(steps_per_epoch, total, eval_every, boundary)


class Phase(NamedTuple):
  """What training in a phase needs; all of it follows from the config."""

  step: Callable  # jitted: (state, batch, key) -> next state, metrics; takes over the state
  schedule: optax.Schedule  # learning rate by step of the phase
  abstract: TrainState  # shapes and shardings of its state
  # jitted: (first numbers, those of phase 1 or None, its optimiser's or None, step=0) -> state
  begin: Callable


def build(
  config: ml_collections.ConfigDict,
  method: Method,
  mesh: Mesh,
  phase: int,
  steps_of_phase: int,
  shapes: Flat | None = None,
) -> Phase:
  """The step of a phase and what belongs to it, as training, benchmarks and `aavs aot` run it.

  Args:
    config: the recipe.
    method: of the config.
    mesh: devices, which need not be there.
    phase: 1 or 2.
    steps_of_phase: for its schedule.
    shapes: of all numbers of the model; by default those that the method begins with.

  Raises:
    UserError: nothing trains in this phase, see trainable_paths.
  """
  if shapes is None:
    shapes = flat_shapes(method)
  optimizer, schedule = optimizer_of(config, method, phase, steps_of_phase)
  paths = trainable_paths(config, method, shapes, phase)

  def begin(first, best=None, opt_state=None, step=0):
    flat = flat_of_phase(config, method, phase, first, best)
    state = create(flat, paths, optimizer, step, config.train.frozen_dtype)
    if opt_state is None:
      return state
    return state.replace(opt_state=taken_over(state.opt_state, opt_state))

  abstract = jax.eval_shape(begin, shapes, shapes)
  places = state_sharding(mesh, abstract)
  step = functools.partial(
    train_step, method=method, optimizer=optimizer, accumulate=config.train.accumulate
  )
  return Phase(
    step=jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(places, None),
      compiler_options=compiler_options(mesh),
    ),
    schedule=schedule,
    abstract=jax.tree.map(placed, abstract, places),
    begin=jax.jit(begin, static_argnames='step', out_shardings=places),
  )


def optimizer_of(
  config: ml_collections.ConfigDict, method: Method, phase: int, steps_of_phase: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """See make_optimizer."""
  lr = config.optimizer.lr if phase == 1 else config.optimizer.lr_phase2
  is_late = None
  if method.phase2_continues and config.train.phase2_epoch:
    is_late = functools.partial(matches, patterns=method.phase2_only)
  return make_optimizer(config.optimizer, lr, steps_of_phase, is_late)


def placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  """A shape with a place."""
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def trainable_paths(
  config: ml_collections.ConfigDict, method: Method, shapes: Mapping, phase: int
) -> list[str]:
  """Paths that train in a phase: all of train.trainable, but what waits in a first of two.

  Raises:
    UserError: a pattern matches no parameter of the model, or nothing trains in this phase.
  """
  patterns, params = config.train.trainable, list(filter(is_parameter, shapes))
  idle = [pattern for pattern in patterns if not any(matches(path, [pattern]) for path in params)]
  if idle:
    raise UserError(
      f'no parameter matches {idle[0]!r} of config.train.trainable: use regular expressions over '
      f'paths such as {params[0]}'
    )
  first_of_two = phase == 1 and config.train.phase2_epoch
  waiting = method.phase2_only if first_of_two else ()
  paths = [path for path in params if matches(path, patterns) and not matches(path, waiting)]
  if not paths:
    raise UserError(
      f'config.train.trainable is {tuple(patterns)}, all of which waits for phase 2: use '
      'config.train.phase2_epoch=0 for a single phase'
    )
  return paths


def flat_of_phase(
  config: ml_collections.ConfigDict, method: Method, phase: int, first: Flat, best: Flat | None
) -> Flat:
  """The numbers with which a phase begins.

  Phase 1 of two: the first ones, what waits for phase 2 zero. Phase 2: the best of phase 1 on
  validation, what has waited as it was first initialised. With one phase: the first as they are.
  A method that goes on takes in phase 2, in the place of the best ones, the last.
  """
  if not config.train.phase2_epoch:
    return first
  if method.phase2_continues:
    return first if phase == 1 else best
  if phase == 1:
    return {
      path: jnp.zeros_like(value) if _waits(path, method) else value
      for path, value in first.items()
    }
  return {path: first[path] if _waits(path, method) else value for path, value in best.items()}


def needed_later(config: ml_collections.ConfigDict, method: Method, first: Flat) -> Flat:
  """The part of the first numbers that a later phase begins with."""
  if not config.train.phase2_epoch or method.phase2_continues:
    return {}
  return {path: value for path, value in first.items() if _waits(path, method)}


def _waits(path: str, method: Method) -> bool:
  """Whether a parameter is zero in phase 1 of two."""
  return is_parameter(path) and matches(path, method.phase2_only)

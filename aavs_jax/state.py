"""The train state: what trains, what does not, and the optimiser of what does."""

import re
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from aavs_jax.types import Params


@flax.struct.dataclass
class TrainState:
  """Everything a step changes.

  Parameters are two flat dictionaries from path ('aavs/backbone/patch_embed/kernel') to array, so
  that gradients and the optimiser see the trained part alone and nothing is computed for the rest.
  """

  step: jax.Array
  trained: dict[str, jax.Array]
  frozen: dict[str, jax.Array]
  opt_state: optax.OptState

  @property
  def params(self) -> Params:
    """The parameter tree of the whole model."""
    return merge(self.trained, self.frozen)


def merge(trained: dict[str, jax.Array], frozen: dict[str, jax.Array]) -> Params:
  return traverse_util.unflatten_dict({**trained, **frozen}, sep='/')


def flatten(params: Params) -> dict[str, jax.Array]:
  return traverse_util.flatten_dict(params, sep='/')


def matches(path: str, patterns: Sequence[str]) -> bool:
  return any(re.search(pattern, path) for pattern in patterns)


def create(
  params: dict[str, jax.Array],
  trainable: Sequence[str],
  optimizer: optax.GradientTransformation,
  step: int = 0,
  frozen_dtype: str = 'float32',
) -> TrainState:
  """State of a phase that begins at a step; `trainable` holds the paths that train.

  The others are stored as `frozen_dtype`; the model computes in its own type all the same.
  """
  chosen = set(trainable)
  trained = {path: value for path, value in params.items() if path in chosen}
  frozen = {
    path: value.astype(frozen_dtype, copy=False)
    for path, value in params.items()
    if path not in chosen
  }
  return TrainState(jnp.asarray(step, jnp.int32), trained, frozen, optimizer.init(trained))

"""A model as flat paths, and the train state: what trains, what does not, and the optimiser."""

import hashlib
import re
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from aavs_jax.methods.method import Method
from aavs_jax.types import Variables

# All numbers of a model by path: parameters, as 'aavs/backbone/patch_embed/kernel', and statistics,
# as 'statistics/decoder/norm/mean'.
Flat = Mapping[str, jax.Array]

_STATISTICS = 'statistics/'


@flax.struct.dataclass
class TrainState:
  """Everything a step changes, in flat dictionaries from path to array.

  So gradients and the optimiser see the trained part alone, and nothing is computed for the rest.
  """

  step: jax.Array
  trained: dict[str, jax.Array]
  frozen: dict[str, jax.Array]
  opt_state: optax.OptState
  statistics: dict[str, jax.Array] = flax.struct.field(default_factory=dict)

  @property
  def flat(self) -> Flat:
    """All numbers of the model, by path."""
    return {**self.trained, **self.frozen, **self.statistics}

  @property
  def variables(self) -> Variables:
    """The model as its method takes it."""
    return unflatten(self.flat)


def flatten(variables: Variables) -> dict[str, jax.Array]:
  """All numbers of a model by path."""
  params, statistics = (traverse_util.flatten_dict(tree, sep='/') for tree in variables)
  return params | {f'{_STATISTICS}{path}': value for path, value in statistics.items()}


def flat_shapes(method: Method) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and types of all numbers of a method's model, by path."""
  return flatten(jax.eval_shape(method.init, jax.eval_shape(jax.random.key, 0)))


def unflatten(flat: Flat) -> Variables:
  """What `flatten` was given."""
  params, statistics = {}, {}
  for path, value in flat.items():
    tree = params if is_parameter(path) else statistics
    tree[path.removeprefix(_STATISTICS)] = value
  return Variables(*(traverse_util.unflatten_dict(tree, sep='/') for tree in (params, statistics)))


def flatten_statistics(statistics: Mapping) -> dict[str, jax.Array]:
  """The part of `flatten` that is not parameters."""
  return flatten(Variables({}, statistics))


def is_parameter(path: str) -> bool:
  """Whether a path is that of a parameter, not of a statistic."""
  return not path.startswith(_STATISTICS)


def matches(path: str, patterns: Sequence[str]) -> bool:
  """Whether one of the regular expressions is found in a path."""
  return any(re.search(pattern, path) for pattern in patterns)


def count(flat: Flat) -> int:
  """Number of parameters of a flat tree."""
  return sum(int(np.prod(value.shape)) for value in flat.values())


def in_groups(paths: Sequence[str], others: Sequence[str] = ()) -> str:
  """What to say of hundreds of paths: modules without their layers, numbers as '*', each once.

  Where `others` has the rest of the model, a part of it that is in `paths` as a whole has one name.
  """
  kept = {path.rsplit('/', i)[0] for path in others for i in range(path.count('/') + 1)}

  def module(path):
    parts = path.split('/')
    heads = ['/'.join(parts[: i + 1]) for i in range(len(parts) if others else 0)]
    path = next((head for head in heads if head not in kept), path)
    return re.sub(r'(/(down|up|linear))*/(kernel|bias)$', '', path)

  return ', '.join(dict.fromkeys(re.sub(r'\d+', '*', module(path)) for path in paths))


def digest(tree: Mapping | Variables) -> str:
  """What tells the numbers of two models apart, however similar their folders are."""
  total = hashlib.sha256()
  for value in jax.tree.leaves(tree):
    total.update(np.asarray(value).tobytes())
  return total.hexdigest()[:16]


def create(
  flat: Flat,
  trainable: Sequence[str],
  optimizer: optax.GradientTransformation,
  step: int = 0,
  frozen_dtype: str = 'float32',
) -> TrainState:
  """State of a phase that begins at a step; `trainable` holds the paths that train.

  The others are stored as `frozen_dtype`; the model computes in its own type all the same.
  """
  chosen = set(trainable)
  trained, frozen, statistics = {}, {}, {}
  for path, value in flat.items():
    if not is_parameter(path):
      statistics[path] = value
    elif path in chosen:
      trained[path] = value
    else:
      frozen[path] = value.astype(frozen_dtype, copy=False)
  opt_state = optimizer.init(trained)
  return TrainState(jnp.asarray(step, jnp.int32), trained, frozen, opt_state, statistics)

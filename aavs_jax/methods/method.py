"""What a method is to the rest: pure functions, and patterns of its parameters' paths.

It is a module, in this folder or one's own (config.method names it), which has

  method(config) -> Method   what stands below
  check(config, need)        refuses values of its own keys of the config (model, loss and so on)
                             that cannot work, by need(key, ok, what to use)
  MAY_BE_ZERO                tuple of those of its keys, with dots, whose numbers may be 0; all
                             others must be positive

Its config begins with configs/base.py and replaces what is AAVS's there: model, vggish, loss, and
of the recipe at least train.trainable, train.phase2_epoch and optimizer.clip_norm.
tests/test_method.py is a small method, whole.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
from flax import traverse_util
from jax.sharding import Mesh

from aavs_jax.devices.mesh import compiler_options
from aavs_jax.types import Batch, Variables

Outputs = Any  # a pytree; the method alone knows what is in it
Totals = Any  # a pytree of arrays whose first axis is frames


class Method(NamedTuple):
  """All that training, evaluation, export and benchmarks know of a method.

  Frames of a batch are the first axis of every array. A method that sees several frames of a clip
  together finds them after each other, `unit` at a time; all else keeps these together. What a clip
  lacks of the last unit in evaluation is filled by repeating its last frame, with weight 0; in
  training clips and items must be whole units, and parts of a batch have statistics of their own.
  """

  init: Callable[[jax.Array], Variables]
  """key -> parameters and statistics."""
  apply: Callable[..., tuple[Outputs, Mapping]]
  """(variables, batch, key=None) -> outputs, statistics.

  Without a key, in evaluation, the statistics of `variables` are used and returned. A key, for
  random draws, means training: the new ones are returned, of the batch of all devices.
  """
  totals: Callable[[Batch], Totals]
  """batch -> what the loss of each of its frames is divided by."""
  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
  """(outputs, batch, totals, key) -> total, and {name: scalar} to log.

  Of a part of a batch, with totals of the whole, it is a part: they add up. All parts get the same
  key: what is drawn follows batch['position'], a frame's place in the whole.
  """
  predict: Callable[[Outputs], jax.Array]
  """outputs -> scores float32 [n 2 e e] (binary) or class ids uint8 [n e e] (semantic).

  Soft masks are the share of the second score in both, where no score is below 0.
  """
  inputs: tuple[str, ...]
  """Keys of a batch that apply reads; what else there is stays on the host in evaluation."""
  unit: int = 1
  """Frames of a clip that stay together: 1 or 5, as evaluation has items of five."""
  released_batch: int = 0
  """Clips of a batch of the release's own evaluation, where its metrics are others than AAVS's.

  0: they are not. See protocols.as_released.
  """
  dilated_truth: bool = False
  """Whether the release's binary metrics enlarge what sounds, see labels.binary_metric_target.

  Else their truth is that of training, by the nearest neighbour.
  """
  phase2_only: tuple[str, ...] = ()
  """Patterns of what is zero in phase 1 of two and trains from phase 2 on."""
  phase2_continues: bool = False
  """Whether phase 2 goes on from the last numbers of phase 1, with its optimiser.

  Then what is phase2_only is not zero before, it only does not train, and its own optimiser
  begins with it, as PyTorch's does. Otherwise see `phases.flat_of_phase`.
  """
  stage_specific: tuple[str, ...] = ()
  """Patterns of what a start may lack or have in another shape: it differs between stages."""
  must_match: tuple[str, ...] = ()
  """Keys of the config in which a start must agree, though no shape shows them.

  Where a start has 'none' it has no such part, and fits.
  """
  nonnegative_scores: bool = True
  """Whether scores are 0 or more, so that soft masks can be made of them."""
  forms: Mapping[str, Any] = {}
  """Keys of the config that say how, but not what, is computed; with the value of least FLOPs."""


def need_whole(config: ml_collections.ConfigDict, need, *sections: str) -> None:
  """Refuses a fraction in a tuple, such as depths or widths; of single numbers the config does."""
  for section in sections:
    for key, value in traverse_util.flatten_dict(config[section].to_dict(), sep='.').items():
      if isinstance(value, tuple):
        fractions = [item for item in value if isinstance(item, float)]
        need(f'{section}.{key}', not fractions, 'use whole numbers')


def compiled_predict(method: Method, mesh: Mesh) -> jax.stages.Wrapped:
  """Jitted (variables, batch) -> predictions, for evaluation, benchmarks and `aavs aot` alike."""

  def step(variables, batch):
    outputs, _ = method.apply(variables, batch)
    return method.predict(outputs)

  # What this variant of the model leaves unused is on the devices all the same.
  return jax.jit(step, keep_unused=True, compiler_options=compiler_options(mesh))


def seen(method: Method, batch: Batch) -> Batch:
  """The part of a batch that a method predicts from."""
  return {name: batch[name] for name in method.inputs}

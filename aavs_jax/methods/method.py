"""What a method is to the rest: pure functions, and patterns of its parameters' paths."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from aavs_jax.types import Batch, Variables

Outputs = Any  # a pytree; the method alone knows what is in it
Totals = Any  # a pytree of arrays whose first axis is frames


class Method(NamedTuple):
  """All that training, evaluation, export and benchmarks know of a method.

  Frames of a batch are the first axis of every array, `unit` of them after each other: those of a
  clip that the method sees together. All else treats units alone.
  """

  init: Callable[[jax.Array], Variables]
  """key -> parameters and statistics."""
  apply: Callable[..., tuple[Outputs, Mapping]]
  """(variables, batch, key=None) -> outputs, statistics; a key, for random draws, means training.

  Statistics are those of variables without a key, else the new ones, of the batch of all devices.
  """
  totals: Callable[[Batch], Totals]
  """batch -> what the loss of each of its frames is divided by."""
  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
  """(outputs, batch, totals, key) -> total, and {name: scalar} to log.

  Of a part of a batch, with totals of the whole, it is a part: they add up.
  """
  predict: Callable[[Outputs], jax.Array]
  """outputs -> scores float32 [n 2 e e] (binary) or class ids uint8 [n e e] (semantic)."""
  sees: tuple[str, ...]
  """Keys of a batch that apply reads; what else there is stays on the host in evaluation."""
  unit: int = 1
  """Frames of a clip that stay together: 1, or the five of an item."""
  late: tuple[str, ...] = ()
  """Patterns of what is zero in phase 1 of two and trains from phase 2 on."""
  of_stage: tuple[str, ...] = ()
  """Patterns of what a start may lack or have in another shape, because stages differ in it."""
  same: tuple[str, ...] = ()
  """Keys of the config in which a start must agree, though no shape shows them.

  Where a start has 'none' it has no such part, and fits.
  """
  forms: Mapping[str, Any] = {}
  """Keys of the config that say how, but not what, is computed; with the value of least FLOPs."""

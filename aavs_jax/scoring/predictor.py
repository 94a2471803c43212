"""A compiled model: batches in, clips out."""

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import ml_collections
import numpy as np

from aavs_jax.devices import distributed
from aavs_jax.devices.mesh import batch_sharding, local_mesh, replicated
from aavs_jax.input_pipeline import pipeline
from aavs_jax.input_pipeline.clips import EVAL_ITEM_FRAMES, Clip
from aavs_jax.input_pipeline.items import Item
from aavs_jax.methods.method import Method, compiled_predict, seen
from aavs_jax.types import Batch, Variables

# Batches that the devices have before them while the host takes the result of an earlier one.
_AHEAD = 2
_T = TypeVar('_T')


class Predictor:
  """A compiled model: batches of frames in, predictions out, on the device and not waited for.

  Frames are spread over the devices of this process, on all of which the model must be
  (`local_variables`): processes do not wait for each other.
  """

  def __init__(self, method: Method):
    self.method = method
    self._mesh = local_mesh()
    self._step = compiled_predict(method, self._mesh)

  def __call__(self, variables: Variables, batch: dict[str, np.ndarray]) -> jax.Array:
    batch = jax.device_put(seen(self.method, batch), batch_sharding(self._mesh))
    with jax.set_mesh(self._mesh):
      predictions = self._step(variables, batch)
    predictions.copy_to_host_async()
    return predictions

  def batches(
    self, config: ml_collections.ConfigDict, clips: Sequence[Clip], load: Callable[[Item], Batch]
  ) -> Iterator[dict[str, np.ndarray]]:
    """Batches of clips for this process's devices, see pipeline.eval_batches."""
    items = eval_batch_items(
      config, self.method.unit, jax.local_device_count(), jax.process_count()
    )
    return pipeline.eval_batches(clips, load, batch_items=items, threads=config.data.threads)


def ahead(items: Iterable[_T], count: int) -> Iterator[_T]:
  """The same items in order; the `count` after each one have been made when it is handed out."""
  made = collections.deque()
  for item in items:
    made.append(item)
    if len(made) > count:
      yield made.popleft()
  yield from made


def predict_clips(
  predictor: Predictor, variables: Variables, batches: Iterator[dict[str, np.ndarray]]
) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
  """(clip index, predictions [T ...], the batch's other arrays [T ...]) for each whole clip.

  Batches hold the items of a clip one after the other, so a clip is complete when the next begins.
  The devices are at the next batches meanwhile.
  """
  current, parts = None, []

  def finish():
    extra = {name: np.concatenate([p[1][name] for p in parts]) for name in parts[0][1]}
    return current, np.concatenate([p[0] for p in parts]), extra

  dispatched = ((predictor(variables, batch), batch) for batch in batches)
  for predictions, batch in ahead(dispatched, _AHEAD):
    predictions = np.asarray(predictions)
    host = {name: value for name, value in batch.items() if name not in predictor.method.inputs}
    real = np.flatnonzero(batch['weight'] > 0)
    for clip in dict.fromkeys(batch['clip'][real].tolist()):
      chosen = real[batch['clip'][real] == clip]
      if clip != current and parts:
        yield finish()
        parts = []
      current = clip
      parts.append((predictions[chosen], {n: v[chosen] for n, v in host.items()}))
  if parts:
    yield finish()


def local_variables(variables: Variables) -> Variables:
  """A copy of a model on every device of this process, wherever its arrays are.

  Where they are spread over processes, all of these must call it.
  """

  def is_spread(leaf):
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable

  def own(leaf):
    return leaf.addressable_data(0) if is_spread(leaf) and leaf.is_fully_replicated else leaf

  leaves, tree = jax.tree.flatten(jax.tree.map(own, variables))
  spread = [i for i, leaf in enumerate(leaves) if is_spread(leaf)]
  if spread:
    gathered = distributed.all_gather([leaves[i] for i in spread], tiled=True)
    for i, leaf in zip(spread, gathered):
      leaves[i] = leaf
  return jax.device_put(tree.unflatten(leaves), replicated(local_mesh()))


def eval_batch_items(
  config: ml_collections.ConfigDict, unit: int, devices: int, processes: int
) -> int:
  """Items of an evaluation batch of one process: as many frames as training has there.

  Rounded up so that its `devices` share them evenly, whole units each.
  """
  length = EVAL_ITEM_FRAMES
  frames = config.data.batch_items * (config.data.item_frames or length)
  step = devices * unit // math.gcd(devices * unit, length)
  return -(-frames // (processes * length * step)) * step

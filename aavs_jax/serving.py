"""Loads what `aavs export --format stablehlo` has written.

  served = load('artefact')
  maps = served.predict(served.prepare({'frames': frames, 'samples': samples}))

It needs jax with flatbuffers, numpy and safetensors, and can be copied out of the package.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from safetensors.numpy import load_file

Arrays = dict[str, jax.Array]


class Served(NamedTuple):
  model: dict[str, Any]  # model.json
  prepare: Callable[[Arrays], Arrays]
  """'frames' uint8 [n h w 3] and 'samples' float32 [m] of one window -> what `predict` takes."""
  predict: Callable[[Arrays], Arrays]
  """'frames' uint8 [n s s 3] and 'log_mel' float32 [n 96 64] -> the outputs of all stages."""


def load(folder: str | Path) -> Served:
  """The functions of an artefact, which compile once for each number of frames.

  Raises:
    ValueError: a file is not the one that was written.
  """
  model = json.loads(Path(folder, 'model.json').read_text())

  def path(entry):
    path = Path(folder, entry['file'])
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry['sha256']:
      raise ValueError(f'{path} is not as it was written: export it again')
    return path

  def function(entry):
    return jax.jit(export.deserialize(bytearray(path(entry).read_bytes())).call)

  stages = [  # stage 1 before stage 2
    (stage, function(stage), jax.device_put(load_file(path(stage['weights']))))
    for _, stage in sorted(model['stages'].items())
  ]

  def predict(inputs):
    outputs, count = {}, len(inputs['frames'])
    for stage, run, weights in stages:
      given = {**inputs, 'prior': outputs.get('mask')}
      given = {row['name']: given[row['name']] for row in stage['inputs']}
      if lacking := -count % stage['unit']:  # of frames that it sees together: the last one again
        given = {k: jnp.concatenate([v, v[-1:].repeat(lacking, 0)]) for k, v in given.items()}
      outputs |= {name: value[:count] for name, value in run(weights, given).items()}
    return outputs

  return Served(model, function(model['prepare']), predict)

"""Loads what `aavs export --format stablehlo` has written; needs jax, numpy and safetensors alone.

  served = load('artefact')
  maps = served.predict(served.prepare(frames, samples))   # of one window, see model.json

The file can be copied out of the package.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file

Arrays = dict[str, jax.Array]


class Served(NamedTuple):
  model: dict[str, Any]
  """model.json."""
  prepare: Callable[[np.ndarray, np.ndarray], Arrays]
  """(frames uint8 [n h w 3], samples float32 [m] at 16 kHz) -> inputs of `predict`."""
  predict: Callable[[Arrays], Arrays]
  """{'frames': uint8 [n s s 3], 'log_mel': float32 [n 96 64]} -> the outputs of all stages."""


def load(folder: str | Path) -> Served:
  """The functions of an artefact; each compiles once for each number of frames.

  Raises:
    ValueError: a file is not the one that was written.
  """
  folder = Path(folder)
  model = json.loads((folder / 'model.json').read_text())

  def path(entry):
    path = folder / entry['file']
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry['sha256']:
      raise ValueError(f'{path} is not as it was written: export it again')
    return path

  def function(entry):
    return jax.jit(export.deserialize(bytearray(path(entry).read_bytes())).call)

  prepare = function(model['prepare'])
  stages = [  # stage 1 before stage 2
    (stage, function(stage), jax.device_put(load_file(path(stage['weights']))))
    for _, stage in sorted(model['stages'].items())
  ]

  def predict(inputs):
    arrays, outputs = dict(inputs), {}
    for stage, run, weights in stages:
      outputs |= run(weights, {row['name']: arrays[row['name']] for row in stage['inputs']})
      arrays['prior'] = outputs.get('mask')
    return outputs

  return Served(
    model, lambda frames, samples: prepare(dict(frames=frames, samples=samples)), predict
  )

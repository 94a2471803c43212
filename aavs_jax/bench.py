"""Timing of the real steps on whatever is there."""

import functools
import resource
import time

import jax
import ml_collections
import numpy as np

from aavs_jax import stages, steps
from aavs_jax.mesh import batch_sharding, global_batch, make_mesh, state_sharding
from aavs_jax.methods import aavs
from aavs_jax.optimizer import make_optimizer
from aavs_jax.state import create, flatten, merge


def random_batch(config: ml_collections.ConfigDict, frames: int) -> dict[str, np.ndarray]:
  """A batch of noise in the shapes and types of config, two label values a frame."""
  rng = np.random.default_rng(0)
  size, eval_size = config.data.image_size, config.data.eval_size
  labels = np.zeros((frames, size, size), np.uint8)
  labels[:, size // 4 : size // 2, size // 4 :] = 1
  classes = np.full((frames, config.data.max_targets), -1, np.int32)
  classes[:, :2] = (0, 1)
  batch = {
    'frames': rng.integers(0, 256, (frames, size, size, 3), np.uint8),
    'log_mel': rng.standard_normal((frames, 96, 64), np.float32),
    'labels': labels,
    'target_classes': classes,
    'weight': np.ones(frames, np.float32),
    'position': np.arange(frames, dtype=np.int32),
    'group': np.arange(frames, dtype=np.int32) // 5,
  }
  if config.use_prior:
    batch['prior'] = rng.integers(0, 2, (frames, eval_size, eval_size)).astype(np.uint8) * 255
  return batch


def bench(
  what: str, config: ml_collections.ConfigDict, frames: int, phase: int, repeats: int
) -> dict[str, float]:
  """Times one kind of step on a batch of noise.

  Args:
    what: 'predict' (forward and post-processing) or 'step' (a training step).
    config: the model and recipe.
    frames: of the batch.
    phase: of the recipe; in phase 1 of two the backbone has no gradient.
    repeats: timed runs, after one that is not.

  Returns:
    compile_seconds, median_seconds, frames_per_second, peak_memory_gb (of the process, host
    memory) and trained_parameters.
  """
  method, mesh = aavs(config), make_mesh(config.mesh.fsdp)
  batch = global_batch(random_batch(config, frames), batch_sharding(mesh))
  key = jax.random.key(config.seed)
  params = flatten(jax.jit(method.init)(key))
  paths = stages.trainable_paths(config, params, phase)
  if what == 'predict':
    state, arguments = merge(params, {}), (batch,)
    step = jax.jit(functools.partial(steps.predict_step, method=method))
  else:
    optimizer, _ = make_optimizer(config.optimizer, config.optimizer.lr, 1)
    make_state = functools.partial(create, trainable=paths, optimizer=optimizer)
    sharding = state_sharding(mesh, jax.eval_shape(make_state, params))
    state, arguments = jax.jit(make_state, out_shardings=sharding)(params), (batch, key)
    step = jax.jit(
      functools.partial(
        steps.train_step,
        method=method,
        optimizer=optimizer,
        accumulate=config.train.accumulate,
      ),
      donate_argnums=0,
      out_shardings=(sharding, None),
    )
  trained = stages.count({path: params[path] for path in paths})
  del params

  started = time.perf_counter()
  compiled = step.lower(state, *arguments).compile()
  compile_seconds = time.perf_counter() - started
  seconds = []
  for _ in range(repeats + 1):
    started = time.perf_counter()
    result = jax.block_until_ready(compiled(state, *arguments))
    seconds.append(time.perf_counter() - started)
    if what == 'step':
      state = result[0]  # the old one was donated
  median = float(np.median(seconds[1:]))
  return {
    'compile_seconds': compile_seconds,
    'median_seconds': median,
    'frames_per_second': frames / median,
    'peak_memory_gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    'trained_parameters': trained,
  }

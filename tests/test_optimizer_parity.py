"""Three optimiser steps in each phase against the released PyTorch code, with its random draws."""

import functools

import jax
import numpy as np
import optax
import pytest

from aavs_jax.optimizer import make_optimizer
from aavs_jax.stages import params_of_phase, trainable_paths
from tests import parity

STAGES = pytest.mark.parametrize('stage', (1, 2))


def run_phase(stage, phase):
  """Totals, gradient norms, whether all matches agree, and the parameters after three steps."""
  config, params = parity.CONFIGS[stage], parity.start(stage)
  if phase == 1:  # the recording's phase 2 starts where its phase 1 did
    params = params_of_phase(config, 1, params, None)
  learning_rate = config.optimizer.lr if phase == 1 else config.optimizer.lr_phase2
  optimizer, _ = make_optimizer(config.optimizer, learning_rate, parity.STEPS)

  @functools.partial(jax.jit, compiler_options=parity.COMPILE_FAST)
  def update(gradient, state, trained):
    updates, state = optimizer.update(gradient, state, trained)
    return optax.apply_updates(trained, updates), state

  names = trainable_paths(config, params, phase)
  state = jax.jit(optimizer.init)({path: params[path] for path in names})
  totals, norms, matched = [], [], []
  for step in range(parity.STEPS):
    points, query = parity.draws(stage, f'phase{phase}/{step}')
    result = parity.evaluate(stage, params, points)
    totals.append(float(result.total))
    found = np.asarray(result.terms['query'])
    matched.append(np.array_equal(found[query >= 0], query[query >= 0]))
    gradient = {path: result.gradient[path] for path in names}
    norms.append(np.sqrt(sum(np.sum(np.square(value)) for value in gradient.values())))
    trained, state = update(gradient, state, {path: params[path] for path in names})
    params = {**params, **trained}
  return totals, norms, all(matched), params


def column(stage, phase, name):
  recorded = parity.recorded(stage)
  return [recorded[f'phase{phase}/{step}/{name}'].item() for step in range(parity.STEPS)]


@STAGES
def test_phase_1(stage):
  totals, _, matched, params = run_phase(stage, 1)
  assert matched
  assert totals == pytest.approx(column(stage, 1, 'total'), rel=1e-3)
  adapters = [value for path, value in params.items() if 'backbone' in path and 'adapter' in path]
  assert len(adapters) == 64
  assert not any(np.any(value) for value in adapters)


@STAGES
def test_phase_2(stage):
  totals, norms, matched, params = run_phase(stage, 2)
  assert matched
  assert totals == pytest.approx(column(stage, 2, 'total'), rel=1e-3)
  if stage == 1:  # not recorded in stage 2, which does not clip
    assert norms == pytest.approx(column(stage, 2, 'grad_norm'), rel=1e-3)

  begin, recorded = parity.start(stage), parity.recorded(stage)
  trained = [path for path in params if parity.to_release(path) in parity.trained_names(stage)]
  assert trained == [path for path in params if np.any(params[path] != begin[path])]
  for path in trained:
    after = recorded[f'phase2/param_after/{parity.to_release(path)}']
    wanted = parity.from_release(path, after) - np.asarray(begin[path])
    found = np.asarray(params[path]) - np.asarray(begin[path])
    close = np.abs(found - wanted) <= 0.02 * np.abs(wanted).max()
    assert close.mean() >= 0.999, (path, close.mean())

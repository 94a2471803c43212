"""Three optimiser steps in each phase against the released PyTorch code, with its random draws."""

import numpy as np
import pytest

from aavs_jax.pytorch import selftest
from tests import parity

STAGES = pytest.mark.parametrize('stage', (1, 2))


@pytest.mark.parametrize('phase', (1, 2))
@STAGES
def test_three_steps(stage, phase):
  begin, taken = parity.begin(stage), parity.taken(stage, phase)
  assert len(taken.totals) == 3
  errors = selftest.step_errors(parity.recording(stage), begin, phase, taken)
  assert list(errors.pop('matching').values()) == [0.0] * 3
  totals = errors.pop('totals of the steps')
  assert len(totals) == 3 and max(totals.values()) < 1e-3, totals
  if stage == 1:  # not recorded in stage 2, which does not clip
    norms = errors.pop('gradient norms of the steps')
    assert len(norms) == 3 and max(norms.values()) < 1e-3, norms
  parameters = errors.pop('parameters after the steps')
  assert not errors
  assert len(parameters) == {1: (32, 96), 2: (34, 98)}[stage][phase - 1]
  # Of each tensor 99.9 % of the elements, as shares of its largest change.
  worst = max(parameters, key=parameters.get)
  assert parameters[worst] <= 0.02, (worst, parameters[worst])


@STAGES
def test_what_does_not_train_stays(stage):
  """In phase 1 the backbone's adapters, too, which are zero there."""
  begin = parity.begin(stage)
  for phase in (1, 2):
    params = parity.taken(stage, phase).params
    adapters = [path for path in params if 'backbone' in path and 'adapter' in path]
    assert len(adapters) == 64
    if phase == 1:
      assert not any(np.any(params[path]) for path in adapters)
    changed = {path for path in params if np.any(params[path] != begin[path])}
    trained = set(selftest.trained_in(parity.recording(stage), begin, phase))
    assert changed == trained | (set(adapters) if phase == 1 else set())

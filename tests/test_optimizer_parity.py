"""Three optimiser steps in each phase against the released PyTorch code, with its random draws."""

import numpy as np
import pytest

from aavs_jax import selftest
from tests import parity

STAGES = pytest.mark.parametrize('stage', (1, 2))


def errors_of(stage, phase):
  taken = parity.taken(stage, phase)
  assert len(taken.totals) == 3
  errors = selftest.step_errors(parity.recording(stage), parity.begin(stage), phase, taken)
  assert list(errors.pop('matching').values()) == [0.0] * 3
  totals = errors.pop('totals of the steps')
  assert len(totals) == 3 and max(totals.values()) < 1e-3, totals
  return errors


@STAGES
def test_phase_1(stage):
  assert not errors_of(
    stage, 1
  )  # its parameters and norms were not recorded, see goldens/README.md
  params = parity.taken(stage, 1).params
  adapters = [value for path, value in params.items() if 'backbone' in path and 'adapter' in path]
  assert len(adapters) == 64
  assert not any(np.any(value) for value in adapters)


@STAGES
def test_phase_2(stage):
  errors = errors_of(stage, 2)
  if stage == 1:  # not recorded in stage 2, which does not clip
    assert max(errors.pop('gradient norms of the steps').values()) < 1e-3
  parameters = errors.pop('parameters after the steps')
  assert not errors

  begin, params = parity.begin(stage), parity.taken(stage, 2).params
  assert len(parameters) == {1: 96, 2: 98}[stage]
  assert parameters.keys() == {path for path in params if np.any(params[path] != begin[path])}
  # Of each tensor 99.9 % of the elements, as shares of its largest change.
  worst = max(parameters, key=parameters.get)
  assert parameters[worst] <= 0.02, (worst, parameters[worst])

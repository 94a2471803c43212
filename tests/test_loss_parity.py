"""Matching, loss and gradients against the released PyTorch code, with its random draws."""

import pytest

from aavs_jax.pytorch import selftest
from tests import parity

STAGES = pytest.mark.parametrize('stage', (1, 2))
SAMPLINGS = pytest.mark.parametrize('sampling', ('gather', 'dense'))


@SAMPLINGS
@STAGES
def test_matching(stage, sampling):
  assert parity.forward_errors(stage, sampling)['matching'] == {'loss': 0.0}


@SAMPLINGS
@STAGES
def test_total(stage, sampling):
  assert parity.forward_errors(stage, sampling)['loss']['total'] < 1e-4


@SAMPLINGS
def test_terms(sampling):
  """The terms were recorded in stage 2 alone."""
  errors = parity.forward_errors(2, sampling)['loss terms']
  assert len(errors) == 3 * 5
  assert max(errors.values()) < 1e-4, errors
  assert 'loss terms' not in parity.forward_errors(1, sampling)


@STAGES
def test_gradients(stage):
  """In one of the sampling forms each."""
  gradient = parity.at_start(stage, selftest.GRADIENT_SAMPLING[stage]).gradient
  errors = selftest.gradient_errors(parity.recording(stage), gradient)
  assert errors.keys() == gradient.keys() and len(errors) == {1: 96, 2: 98}[stage]
  worst = max(errors, key=errors.get)
  assert errors[worst] < 1e-3, (worst, errors[worst])

"""Matching, loss and gradients against the released PyTorch code, with its random draws."""

import pytest

from aavs_jax import selftest
from tests import parity

STAGES = pytest.mark.parametrize('stage', (1, 2))
FORMS = pytest.mark.parametrize('form', ('gather', 'dense'))


@FORMS
@STAGES
def test_matching(stage, form):
  assert parity.forward_errors(stage, form)['matching'] == {'loss': 0.0}


@FORMS
@STAGES
def test_total(stage, form):
  assert parity.forward_errors(stage, form)['loss']['total'] < 1e-4


@FORMS
def test_terms(form):
  """The terms were recorded in stage 2 alone."""
  errors = parity.forward_errors(2, form)['loss terms']
  assert len(errors) == 3 * 5
  assert max(errors.values()) < 1e-4, errors
  assert 'loss terms' not in parity.forward_errors(1, form)


@STAGES
def test_gradients(stage):
  """In one of the sampling forms each."""
  gradient = parity.at_start(stage, selftest.GRADIENT_FORM[stage]).gradient
  errors = selftest.gradient_errors(parity.recording(stage), gradient)
  assert errors.keys() == gradient.keys() and len(errors) == {1: 96, 2: 98}[stage]
  worst = max(errors, key=errors.get)
  assert errors[worst] < 1e-3, (worst, errors[worst])

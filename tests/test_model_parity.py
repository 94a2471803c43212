"""The model against the released PyTorch code: intermediates, predictions, score maps."""

import pytest

from aavs_jax import selftest
from tests import parity

STAGES = pytest.mark.parametrize('stage', (1, 2))
FORMS = pytest.mark.parametrize('form', ('gather', 'dense'))


@FORMS
@STAGES
def test_intermediates(stage, form):
  errors = parity.forward_errors(stage, form)['intermediates']
  assert len(errors) == 9
  assert max(errors.values()) < 1e-4, errors


@FORMS
@STAGES
def test_predictions(stage, form):
  errors = parity.forward_errors(stage, form)['prediction sets']
  assert len(errors) == 2 * 5
  assert max(errors.values()) < 1e-4, errors


@STAGES
def test_score_maps(stage):
  outputs = parity.at_start(stage, 'gather').predictions.outputs
  errors = selftest.map_errors(parity.recording(stage), outputs)
  if stage == 1:
    assert errors['scores']['scores'] <= 1e-3  # recorded in float16
  else:
    assert errors['map']['map'] <= 1e-4

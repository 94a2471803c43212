"""The model against the released PyTorch code: intermediates, predictions, score maps."""

import pytest

from aavs_jax.pytorch import selftest
from tests import parity

STAGES = pytest.mark.parametrize('stage', (1, 2))
SAMPLINGS = pytest.mark.parametrize('sampling', ('gather', 'dense'))


@SAMPLINGS
@STAGES
def test_intermediates(stage, sampling):
  errors = parity.forward_errors(stage, sampling)['intermediates']
  assert len(errors) == 9
  assert max(errors.values()) < 1e-4, errors


@SAMPLINGS
@STAGES
def test_predictions(stage, sampling):
  errors = parity.forward_errors(stage, sampling)['prediction sets']
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

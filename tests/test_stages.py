"""What each phase starts from and trains."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aavs_jax import checkpoint, stages
from aavs_jax import config as config_lib
from aavs_jax.configs import avss_stage1, avss_stage2, quick_stage1
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.state import create


def _params(**shapes):
  return {
    path.replace('__', '/'): jnp.full(shape, i + 1.0)
    for i, (path, shape) in enumerate(shapes.items())
  }


NAMES = dict(
  aavs__backbone__stage0_block0__adapter__up__kernel=(2,),
  aavs__backbone__stage0_block0__fc1__kernel=(2,),
  aavs__pixel_decoder__layer0__attention__output__adapter__up__kernel=(2,),
  aavs__queries__features=(3,),
  aavs__queries__positions=(3,),
  aavs__decoder__class_predictor__linear__kernel=(2,),
  aavs__decoder__silent_key=(2,),
  aavs__audio_projection__up__linear__kernel=(2,),
  vggish__conv0__kernel=(2,),
)
SWIN = 'aavs/backbone/stage0_block0/adapter/up/kernel'


def test_published_stages_train_what_the_release_trains():
  params = _params(**NAMES)
  both = {
    'aavs/pixel_decoder/layer0/attention/output/adapter/up/kernel',
    'aavs/queries/positions',
    'aavs/decoder/class_predictor/linear/kernel',
    'aavs/audio_projection/up/linear/kernel',
  }
  for config, own in [
    (avss_stage1.get_config(), {'aavs/queries/features'}),
    (avss_stage2.get_config(), {'aavs/decoder/silent_key'}),
  ]:
    assert set(stages.trainable_paths(config, params, 1)) == both | own
    assert set(stages.trainable_paths(config, params, 2)) == both | own | {SWIN}
  assert set(stages.trainable_paths(quick_stage1.get_config(), params, 1)) == set(params)


def test_a_pattern_that_matches_nothing_is_refused():
  config = avss_stage1.get_config()
  config.train.trainable = ('aavs/queries/positions', 'no_such_path')
  for phase in (1, 2):
    with pytest.raises(UserError, match="no parameter matches 'no_such_path'"):
      stages.trainable_paths(config, _params(**NAMES), phase)


def test_a_first_phase_in_which_nothing_trains_is_refused():
  config = avss_stage1.get_config()
  config.train.trainable = ('aavs/backbone/.*adapter/',)
  with pytest.raises(UserError, match='phase2_epoch=0'):
    stages.trainable_paths(config, _params(**NAMES), 1)
  assert stages.trainable_paths(config, _params(**NAMES), 2) == [SWIN]
  config.train.phase2_epoch = 0
  assert stages.trainable_paths(config, _params(**NAMES), 1) == [SWIN]


def test_phases_begin_as_in_the_release():
  config = avss_stage1.get_config()
  first = _params(**NAMES)
  begin = stages.params_of_phase(config, 1, first, None)
  np.testing.assert_array_equal(begin[SWIN], 0)
  best = {path: value + 10 for path, value in begin.items()}
  second = stages.params_of_phase(config, 2, first, best)
  np.testing.assert_array_equal(second[SWIN], first[SWIN])
  others = [path for path in first if path != SWIN]
  assert all((second[path] == best[path]).all() for path in others)


def test_the_boundary_is_where_the_release_has_it():
  for config, epoch in [(avss_stage1.get_config(), 30), (avss_stage2.get_config(), 20)]:
    assert config.train.epochs == 60
    phases = [stages.phase_at(config, step, 10) for step in range(600)]
    assert phases.index(2) == epoch * 10 and phases == sorted(phases)
  assert {stages.phase_at(quick_stage1.get_config(), s, 10) for s in range(80)} == {1}


@pytest.fixture(scope='module')
def work_folder(tmp_path_factory):
  """Of three checkpoints, in which a weight is the number of the step; step 2 is the best."""
  folder = tmp_path_factory.mktemp('run')
  (folder / 'config.json').write_text(config_lib.to_json(quick_stage1.get_config()))
  note = {
    'kind': 'mask2former', 'source': 'start', 'vggish': '', 'lacking': ['aavs/audio_projection/'],
    'names': [], 'unused': [],
  }  # fmt: skip
  (folder / checkpoint.CONVERTED).write_text(json.dumps(note))
  with checkpoint.make_manager(folder / 'checkpoints', 3) as manager:
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.5)):
      state = create({'aavs/w': jnp.full(2, float(step))}, ['aavs/w'], optax.sgd(1.0), step)
      checkpoint.save(manager, state, 1, {'miou': score})
  return folder


@pytest.mark.parametrize(
  ('start', 'step'), [('.', 2), ('checkpoints', 2), ('checkpoints/3', 3), ('checkpoints/1', 1)]
)
def test_a_start_is_a_work_folder_or_checkpoints_of_it(start, step, work_folder):
  config = quick_stage1.get_config()
  config.train.init = str(work_folder / start)
  np.testing.assert_array_equal(stages.load_start(config)['aavs/w'], step)
  assert stages.start_lacks(config) == ['aavs/audio_projection/']
  config.model.heads = 2
  with pytest.raises(UserError, match=r'config\.model\.heads is 2, but .* was trained with 4'):
    stages.load_start(config)


def test_a_start_that_is_no_checkpoint_is_named(work_folder):
  config = quick_stage1.get_config()
  for start in ('checkpoints/4', 'checkpoint'):
    config.train.init = str(work_folder / start)
    with pytest.raises(UserError, match=f'{start} holds no checkpoint'):
      stages.load_start(config)


class TestStart:
  def fresh(self):
    return {'aavs/queries/features': jnp.zeros((4, 2)), 'aavs/fc/kernel': jnp.zeros((2, 3))}

  def test_fills_all_but_what_is_specific_to_a_stage(self):
    start = {'aavs/queries/features': np.ones((6, 2)), 'aavs/fc/kernel': np.ones((2, 3))}
    params, lacking = stages.first_params(self.fresh(), start)
    assert lacking == ['aavs/queries/features']
    np.testing.assert_array_equal(params['aavs/fc/kernel'], 1)
    np.testing.assert_array_equal(params['aavs/queries/features'], 0)

  @pytest.mark.parametrize(
    ('start', 'words'),
    [
      ({}, 'aavs/fc/kernel is missing'),
      ({'aavs/fc/kernel': np.ones((2, 4))}, r'of shape \(2, 4\), the model has \(2, 3\)'),
      ({'aavs/fc/kernel': np.ones((2, 3)), 'aavs/x': np.ones(1)}, 'aavs/x is unknown'),
    ],
  )
  def test_anything_else_is_refused_by_name(self, start, words):
    with pytest.raises(UserError, match=words):
      stages.first_params(self.fresh(), start)

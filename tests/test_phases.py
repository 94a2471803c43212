"""What trains in each phase, and what it begins with."""

import jax.numpy as jnp
import numpy as np
import pytest

from aavs_jax import methods
from aavs_jax.configs import avss_stage1, avss_stage2, base, quick_stage1
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.training import phases
from aavs_jax.training.optimizer import make_optimizer


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


def trainable_paths(config, params, phase):
  return phases.trainable_paths(config, methods.of(config), params, phase)


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
    assert set(trainable_paths(config, params, 1)) == both | own
    assert set(trainable_paths(config, params, 2)) == both | own | {SWIN}
  assert set(trainable_paths(quick_stage1.get_config(), params, 1)) == set(params)


def test_a_pattern_that_matches_nothing_is_refused():
  config = avss_stage1.get_config()
  config.train.trainable = ('aavs/queries/positions', 'no_such_path')
  for phase in (1, 2):
    with pytest.raises(UserError, match="no parameter matches 'no_such_path'"):
      trainable_paths(config, _params(**NAMES), phase)


def test_a_first_phase_in_which_nothing_trains_is_refused():
  config = avss_stage1.get_config()
  config.train.trainable = ('aavs/backbone/.*adapter/',)
  with pytest.raises(UserError, match='phase2_epoch=0'):
    trainable_paths(config, _params(**NAMES), 1)
  assert trainable_paths(config, _params(**NAMES), 2) == [SWIN]
  config.train.phase2_epoch = 0
  assert trainable_paths(config, _params(**NAMES), 1) == [SWIN]


def test_phases_begin_as_in_the_release():
  config = avss_stage1.get_config()
  first = _params(**NAMES)
  begin = phases.flat_of_phase(config, methods.of(config), 1, first, None)
  np.testing.assert_array_equal(begin[SWIN], 0)
  best = {path: value + 10 for path, value in begin.items()}
  second = phases.flat_of_phase(config, methods.of(config), 2, first, best)
  np.testing.assert_array_equal(second[SWIN], first[SWIN])
  others = [path for path in first if path != SWIN]
  assert all((second[path] == best[path]).all() for path in others)


def test_the_boundary_is_where_the_release_has_it():
  for config, epoch in [(avss_stage1.get_config(), 30), (avss_stage2.get_config(), 20)]:
    assert (config.train.epochs, config.train.phase2_epoch) == (60, epoch)
  plan = phases.Plan(10, 600, 10, boundary=300)
  assert [plan.phase_at(step) for step in (0, 299, 300, 599)] == [1, 1, 2, 2]
  assert [plan.step_of_phase(step) for step in (0, 299, 300, 599)] == [0, 299, 0, 299]
  assert (plan.steps_of(1), plan.steps_of(2)) == (300, 300)
  single = phases.Plan(10, 600, 10, boundary=0)
  assert (single.phase_at(599), single.step_of_phase(599), single.steps_of(1)) == (1, 599, 600)


def test_steps_take_the_place_of_epochs():
  config = quick_stage1.get_config()
  config.train.update(steps=7, eval_every_steps=3, epochs=100.0, eval_every_epochs=50.0)
  plan = phases.plan(config, 5.0, 10, 1)
  assert plan == phases.Plan(5, 7, 3, 0)
  config.train.update(steps=0, eval_every_steps=0)
  assert phases.plan(config, 5.0, 10, 1) == phases.Plan(5, 500, 250, 0)


def test_validations_are_those_that_follow():
  for total, every, boundary in ((600, 10, 0), (7, 3, 0), (9, 3, 4), (8, 2, 4), (5, 9, 5)):
    plan = phases.Plan(10, total, every, boundary)
    for step in range(1, total + 1):
      assert plan.validations(step) == sum(map(plan.validates, range(step, total + 1)))
  plan = phases.Plan(10, 600, 7, boundary=300)
  assert [step for step in range(295, 305) if plan.validates(step)] == [300, 301]
  config = quick_stage1.get_config()
  config.train.update(steps=0, epochs=2.0, phase2_epoch=2)  # at the very end: never
  assert phases.plan(config, 5.0, 10, 1).boundary == 10


def test_schedules():
  config = base.get_config().optimizer
  config.warmup_steps = 10
  for config.schedule, rates in (('cosine', [0, 0.5, 1, 0.5, 0]), ('constant', [0, 0.5, 1, 1, 1])):
    _, rate = make_optimizer(config, 1.0, 110)
    assert [float(rate(step)) for step in (0, 5, 10, 60, 110)] == pytest.approx(rates, abs=1e-6)


def test_each_phase_has_its_learning_rate():
  config = avss_stage1.get_config()
  config.optimizer.update(lr=0.5, lr_phase2=0.25)
  for phase, rate in ((1, 0.5), (2, 0.25)):
    _, schedule = phases.optimizer_of(config, methods.of(config), phase, 100)
    assert float(schedule(50)) == rate


def test_a_phase_2_that_would_begin_before_the_first_step_is_refused():
  config = quick_stage1.get_config()
  config.train.update(steps=0, epochs=8.0, phase2_epoch=1)
  with pytest.raises(UserError, match='phase2_epoch is 1, step 0 of 2: let phase 2 begin after'):
    phases.plan(config, 0.25, 10, 1)


def test_parts_of_a_step_that_devices_cannot_share_are_refused():
  config = quick_stage1.get_config()
  for config.train.accumulate, unit, words in (
    (4, 1, 'cannot share evenly in 4 parts: '),
    (2, 5, 'in 2 parts of whole clips, 5 frames each: '),
  ):
    with pytest.raises(UserError, match=words):
      phases.plan(config, 5.0, 15, unit)
  config.train.accumulate = 3
  assert phases.plan(config, 5.0, 15, 5).steps_per_epoch == 5

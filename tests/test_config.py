"""What a config may hold: every number is checked, and what is accepted works."""

import json
import math

import jax
import ml_collections
import pytest
from flax import traverse_util

from aavs_jax import config as config_lib
from aavs_jax import methods
from aavs_jax.configs import avss_end_to_end, avss_stage1, avss_stage2, base
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.perf import bench
from aavs_jax.training.optimizer import make_optimizer
from aavs_jax.training.state import create, flatten
from aavs_jax.training.step import train_step
from tests import tiny

VALUES = {
  key: value if isinstance(value, tuple) else (value,)
  for key, value in traverse_util.flatten_dict(base.get_config().to_dict(), sep='.').items()
}
NUMBERS = [key for key, items in VALUES.items() if type(items[0]) in (int, float)]
MAY_BE_ZERO = {
  'seed',
  'data.item_frames',  # whole clips
  'data.workers',  # the process reads by itself
  'data.max_bad_clips',
  'data.leave_out',  # no part
  'data.negative_sound',
  'prior.predicted',  # as published
  'prior.none',
  'prior.missing',
  'prior.added',
  'prior.moved',
  'prior.wrong',
  'model.swin.depths',  # a stage that only merges patches
  'model.swin.drop_path',
  'model.encoder_layers',  # the projected maps as they are
  'model.decoder_layers',  # the prediction of the queries alone
  'optimizer.lr',  # as lr_phase2=0 shows what phase 2 begins with
  'optimizer.lr_phase2',
  'optimizer.weight_decay',
  'optimizer.clip_norm',  # no clipping
  'optimizer.warmup_steps',
  'train.phase2_epoch',  # one phase
  'train.steps',  # epochs
  'train.eval_every_steps',
  'train.stuck_after',  # not watched
  'loss.class_weight',  # without this term
  'loss.mask_weight',
  'loss.dice_weight',
  'loss.matching_class_weight',
  'loss.matching_mask_weight',
  'loss.matching_dice_weight',
  'loss.uncertain_share',  # points anywhere
}


def _with(key, value):
  """configs/base.py with another value, of whatever type."""
  flat = traverse_util.flatten_dict(base.get_config().to_dict(), sep='.')
  return ml_collections.ConfigDict(traverse_util.unflatten_dict(flat | {key: value}, sep='.'))


def _refusal(config):
  with pytest.raises(UserError) as caught:
    config_lib.check(config)
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize('key', NUMBERS)
def test_every_number_is_checked(key):
  items = VALUES[key]
  for i in range(len(items)):
    for number in (math.nan, math.inf, -math.inf, -1, -0.5, 0):
      value = (*items[:i], number, *items[i + 1 :]) if len(items) > 1 else number
      config = _with(key, value)
      if number == 0 and key in MAY_BE_ZERO:
        config_lib.check(config)
      else:
        assert _refusal(config).startswith(f'config.{key} is {value}: ')


def test_where_zero_is_accepted_a_step_can_be_taken():
  config = tiny.get_config('stage1')
  for key in MAY_BE_ZERO - {'model.swin.depths', 'data.leave_out'}:
    config.update_from_flattened_dict({key: type(VALUES[key][0])(0)})
  config.model.swin.depths = (0, 0, 0, 0)
  config_lib.check(config)
  method, key = methods.of(config), jax.random.key(0)
  optimizer, _ = make_optimizer(config.optimizer, config.optimizer.lr, 1)

  def step(batch):
    params = flatten(method.init(key))
    state = create(params, list(params), optimizer)
    return train_step(state, batch, key, method=method, optimizer=optimizer)

  _, metrics = jax.eval_shape(step, bench.random_batch(config, 2))
  assert metrics['loss'].shape == ()


@pytest.mark.parametrize(
  ('key', 'value', 'words'),
  [
    ('use_prior', True, "only a 'semantic' task"),
    ('model.swin.drop_path', 1.5, 'below 1'),
    ('model.swin.drop_path', 1.0, 'below 1'),
    ('model.swin.heads', (4, 8, 16, 30), '[128, 256, 512, 1024]'),
    ('model.swin.depths', (2, 2, 6), 'four'),
    ('model.swin.depths', (2, 2, 1.5, 2), 'whole numbers'),
    ('vggish.dense_widths', (16.0,), 'whole numbers'),
    ('seed', 2**32, 'below 2**32'),
    ('vggish.conv_widths', (64, 128), 'six'),
    ('loss.uncertain_share', 1.1, 'at most 1'),
    ('method', 'nonsense', 'no module that has method, check'),
    ('method', 'no_such.method', 'no module that has method, check'),
    ('method', '.x', 'no module that has method, check'),
    ('method', 'matching', 'no module that has method, check'),
    ('train.trainable', (), 'at least one'),
    ('train.trainable', ('',), 'not empty'),  # as of `--config.train.trainable=`
    ('train.trainable', ('.*', 1), 'not empty'),
    ('data.subsets', ('v1s,v1m',), "\"('v1s','v1m')\""),
    ('data.subsets', (1, 2), "\"('v1s','v1m')\""),
    ('data.subsets', (), "\"('v1s','v1m')\""),
    ('prior.missing', 0.1, 'a model without config.use_prior'),
    ('prior.soft', True, 'a model without config.use_prior'),
    ('data.negative_sound', 1.5, 'at most 1'),
    ('data.leave_out', (3, 3), 'part k of K'),
    ('data.leave_out', (0, 3, 1), 'part k of K'),
    ('data.masks', 'None', 'write --config.data.masks= for none'),
    ('train.init', 'None', 'write --config.train.init= for none'),
  ],
)
def test_other_faults_are_named(key, value, words):
  message = _refusal(_with(key, value))
  assert message.startswith(f'config.{key} is {value!r}') and words in message


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ('data=foo', "config.data is 'foo': it is a section, set its keys one by one"),
    ('data=1', "config.data is '1': it is a section, set its keys one by one"),
    ('use_prior=maybe', "config.use_prior is 'maybe': use true or false"),
    ('train.steps=1.5', "config.train.steps is '1.5': use a whole number"),
    ('optimizer.lr=1 seed=', "config.seed is '': use a whole number"),
    ('optimizer.lr=fast', "config.optimizer.lr is 'fast': use a number"),
    (
      'data.leave_out=(0,3',
      "config.data.leave_out is '(0,3': write several values as \"(1,2)\" or \"('a','b')\"",
    ),
    ('seed.x=1', 'configs/base.py has no config.seed.x: config.seed is not a section'),
    ('mesh.z=1', 'configs/base.py has no config.mesh.z: use one of fsdp'),
    (
      'seed',
      'configs/base.py with --config.seed is not accepted: Missing value for flag --config.seed',
    ),
  ],
)
def test_an_override_that_is_not_accepted_is_one_sentence(overrides, message):
  with pytest.raises(UserError) as caught:
    config_lib.load('configs/base.py', [f'--config.{text}' for text in overrides.split()])
  assert str(caught.value) == message


def test_a_section_that_a_study_lacks_is_set_in_its_file():
  with pytest.raises(UserError, match=r"^config\.looks is '1': it is None in the config file, set"):
    config_lib.load_study('configs/quickstart.py', ['--config.looks=1'])


def test_a_variant_that_is_not_there_is_refused():
  with pytest.raises(UserError, match=r'^configs/s4\.py:x is not accepted: there is no var'):
    config_lib.load('configs/s4.py:x')


@pytest.mark.parametrize('subsets', ['v1s', "('v1s','v1m')", "['v1s','v1m']"])
def test_subsets_are_written_as_the_refusal_says(subsets):
  config = config_lib.load('configs/base.py', [f'--config.data.subsets={subsets}'])
  assert config.data.subsets in (('v1s',), ('v1s', 'v1m'))


def test_a_kept_config_that_is_no_longer_accepted_is_named(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(_with('optimizer.lr', math.nan).to_dict()))
  with pytest.raises(UserError) as caught:
    config_lib.from_json(path)
  message = str(caught.value)
  assert str(path) in message and 'config.optimizer.lr is nan' in message and '\n' not in message


@pytest.mark.parametrize('damage', ['{"task": ', '[' * 100_000, '[]', None])
def test_a_kept_config_that_cannot_be_read_is_one_sentence(damage, tmp_path):
  path = tmp_path / 'config.json'
  path.mkdir() if damage is None else path.write_text(damage)
  with pytest.raises(UserError, match=r'config\.json.*restore it, or name a work folder') as caught:
    config_lib.from_json(path)
  assert '\n' not in str(caught.value)


def test_a_config_says_which_stage_it_is_of():
  configs = {'stage 1': avss_stage1, 'stage 2': avss_stage2, 'end to end': avss_end_to_end}
  for stage, module in configs.items():
    assert config_lib.stage_of(module.get_config()) == stage

"""Loading, overriding and checking configs; every refusal is one sentence."""

import difflib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ml_collections
from absl import flags
from flax import traverse_util
from ml_collections import config_flags

from aavs_jax import configs, methods
from aavs_jax.configs import base
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline.clips import EVAL_ITEM_FRAMES, IGNORE, Clip
from aavs_jax.input_pipeline.errors import UserError

if TYPE_CHECKING:  # benchmarks run where what reads data is not installed
  from aavs_jax.input_pipeline.items import Task

# All numbers of a config are finite and positive; these may be zero besides.
_MAY_BE_ZERO = (
  'seed', 'data.item_frames', 'data.workers', 'data.max_bad_clips', 'optimizer.lr',
  'optimizer.lr_phase2', 'optimizer.weight_decay', 'optimizer.clip_norm',
  'optimizer.warmup_steps', 'train.phase2_epoch', 'train.steps', 'train.eval_every_steps',
  'train.stuck_after', 'data.leave_out', 'data.negative_sound', 'prior.predicted', 'prior.none',
  'prior.missing', 'prior.added', 'prior.moved', 'prior.wrong',
)  # fmt: skip

_OF_METHOD = ('model', 'vggish', 'loss')  # sections that are another method's own affair
_EXPECTED = {  # by a key's type what an override of it may be
  bool: 'use true or false',
  int: 'use a whole number',
  float: 'use a number',
  tuple: 'write several values as "(1,2)" or "(\'a\',\'b\')"',
  ml_collections.ConfigDict: 'it is a section, set its keys one by one',
  type(None): 'it is None in the config file, set it there',
}


def load(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
  """The config of a file, with overrides such as '--config.optimizer.lr=2e-4'.

  A variant of it is named after a colon, as in 'configs/s4.py:paper'.

  Raises:
    UserError: no such file, variant or key, or a value of another type.
  """
  config = _read(path, overrides)
  check(config)
  return config


def load_study(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
  """A config such as configs/quickstart.py, which holds those of its stages; checked likewise."""
  config = _read(path, overrides)
  if 'stage1' not in config or 'stage2' not in config:
    raise UserError(f'{path} is the config of one stage: use it with `aavs train`')
  for key in ('stage1', 'stage2', 'looks', 'robust', 'others'):
    if key not in config:
      raise UserError(f'{path} has no {key}: begin it with a copy of configs/quickstart.py')
    if config[key] is not None and key != 'others':
      check(config[key])
  for stages in config.others.values():
    check(stages.stage1)
    check(stages.stage2)
  for stages in (config, *config.others.values()):
    _require_pair(stages.stage1, stages.stage2)
  for name in ('stage1', 'stage2', 'looks', 'robust'):
    if (stage := config[name]) is None:
      continue
    require_no_data(stage, f'config.{name}')
    if stage.seed:
      raise UserError(f'config.{name}.seed is {stage.seed}: in a study set config.seeds')
  soft = config.stage2.prior.soft
  if config.robust is not None and config.robust.prior.soft != soft:
    raise UserError(
      f'config.robust.prior.soft is {not soft} and config.stage2.prior.soft is {soft}, but both '
      'read the same masks: make them equal'
    )
  several = not isinstance(config.num_classes, int)
  if several and not (config.end_to_end or config.robust):
    raise UserError(
      f'config.num_classes is {config.num_classes}, and there is nothing to compare for them: set '
      'config.end_to_end, or use one number'
    )
  if config.others and (several or not config.end_to_end or config.looks or config.robust):
    raise UserError(
      f'config.others is {tuple(config.others)}, which are compared with one number of classes, '
      'end_to_end, and without looks and robust: set these as configs/methods_study.py does'
    )
  for stages in (config, *config.others.values()) if config.end_to_end else ():
    of1, of2 = (
      (stage.data.item_frames, stage.data.batch_items, 'steps' if stage.train.steps else 'epochs')
      for stage in (stages.stage1, stages.stage2)
    )
    if of1 != of2:
      raise UserError(
        'config.end_to_end trains one stage for as many frames as two, but data.item_frames, '
        f'data.batch_items and how the length is given are {of1} in stage1 and {of2} in stage2: '
        'make them equal'
      )
  if not config.seeds or not all(type(seed) is int and 0 <= seed < 2**32 for seed in config.seeds):
    raise UserError(
      f'config.seeds is {config.seeds}: give whole numbers from 0 to below 2**32, such as (0,)'
    )
  return config


def require_no_data(config: ml_collections.ConfigDict, name: str = 'config') -> None:
  """UserError for data or masks in the config of a stage of several, which get theirs."""
  for key in ('root', 'masks'):
    if config.data[key]:
      raise UserError(
        f'{name}.data.{key} is {config.data[key]!r}, which would be overwritten: the data set is '
        "--data, and masks are those of the study's own stage 1"
      )


def _require_pair(stage1: ml_collections.ConfigDict, stage2: ml_collections.ConfigDict) -> None:
  """UserError for two stages of a study that cannot follow each other."""
  names = stage_of(stage1), stage_of(stage2)
  if names != ('stage 1', 'stage 2'):
    raise UserError(
      f'stage1 and stage2 of a study are {names[0]} and {names[1]} by their configs: give stage1 '
      "the task 'binary', and stage2 the task 'semantic' with use_prior"
    )
  if stage1.data.eval_size != stage2.data.eval_size:
    raise UserError(
      f'data.eval_size is {stage1.data.eval_size} in stage1 and {stage2.data.eval_size} in stage2, '
      'which is given the masks of stage1: make them equal'
    )
  if lacking := sorted(set(stage2.data.subsets) - set(stage1.data.subsets)):
    raise UserError(
      f'data.subsets of stage2 has {", ".join(lacking)}, of which stage1 makes no masks: add them '
      'to those of stage1'
    )
  if stage2.prior.soft:
    methods.require_nonnegative_scores(stage1)


def _read(path: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
  file, colon, argument = path.partition(':')
  if not Path(file).is_file():
    own = Path(configs.__file__).parent / Path(file).name  # where the program is, from anywhere
    if Path(file).parent != Path('configs') or not own.is_file():
      fault = 'is a folder' if file and Path(file).is_dir() else 'does not exist'
      raise UserError(f'{path} {fault}: name a config file such as configs/avss_stage1.py')
    path = f'{own}{colon}{argument}'
  values = flags.FlagValues()
  arguments = ['aavs', f'--config={path}', *overrides]
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=arguments)
  try:
    values(arguments)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if overrides and (fault := _fault(path, _read(path, ()), overrides, text)):
      raise UserError(fault) from error
    if 'Traceback' in text:  # of an error in the file the flag library hands on all of it
      text = text.rstrip().splitlines()[-1].removeprefix('ValueError: ')
    text = ' '.join(text.split())
    given = f'{path} with {" ".join(overrides)}' if overrides else path
    raise UserError(f'{given} is not accepted: {text}') from error
  except Exception as error:  # the file is a program and may fail in any way
    text = ' '.join(str(error).split())
    raise UserError(f'{path} cannot be run as a config: {type(error).__name__}: {text}') from error
  return values.config


def _fault(
  path: str, config: ml_collections.ConfigDict, overrides: Sequence[str], text: str
) -> str | None:
  """What is wrong with the first override whose key is not there, or which `text` refuses."""
  for override in overrides:
    key, _, given = override.removeprefix('--').partition('=')
    found, above = config, 'config'
    for name in key.split('.')[1:]:
      if not isinstance(found, ml_collections.ConfigDict):
        return f'{path} has no {key}: {above} is not a section'
      if name not in found:
        near = difflib.get_close_matches(name, found, 1)
        advice = f'did you mean {above}.{near[0]}?' if near else f'use one of {", ".join(found)}'
        return f'{path} has no {above}.{name}: {advice}'
      found, above = found[name], f'{above}.{name}'
    refused = found is None or text.startswith(f'flag {override}: ')
    if refused and type(found) in _EXPECTED:
      return f'{key} is {given!r}: {_EXPECTED[type(found)]}'
  return None


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for a config that cannot work."""
  if 'task' not in config:
    raise UserError('the config is that of a study: use it with `aavs quickstart`')
  method = methods.module_of(config)
  values = traverse_util.flatten_dict(config.to_dict(), sep='.')

  def need(key, ok, expected):
    if not ok:
      raise UserError(f'config.{key} is {values[key]!r}: {expected}')

  for key in ('dtype', 'train.frozen_dtype'):
    need(key, values[key] in ('float32', 'bfloat16'), 'use float32 or bfloat16')
  try:
    unit = method.method(config).unit
  except (AttributeError, KeyError, TypeError) as error:
    raise UserError(
      f'config.method is {config.method!r}, but {", ".join(_OF_METHOD)} are not as it has them '
      f'({" ".join(str(error).split())[:100]}): begin with a config file of this method'
    ) from error
  for key, value in values.items():
    need(key, value != 'None', f'write --config.{key}= for none')
    items = value if isinstance(value, (tuple, list)) else (value,)
    numbers = [item for item in items if type(item) in (int, float)]  # bool is neither
    if key in _MAY_BE_ZERO + method.MAY_BE_ZERO:
      need(key, all(0 <= x < math.inf for x in numbers), 'use a finite number of at least 0')
    else:
      need(key, all(0 < x < math.inf for x in numbers), 'use a finite number above 0')

  need('seed', config.seed < 2**32, 'use a number below 2**32, which is what random keys hold')
  data = config.data
  need('task', config.task in ('binary', 'semantic'), "use 'binary' or 'semantic'")
  binary = config.task == 'binary'
  fits = config.num_classes == 2 if binary else 2 <= config.num_classes <= IGNORE
  need('num_classes', fits, 'use 2' if binary else f'use 2 to {IGNORE}, the background included')
  need(
    'use_prior',
    config.task == 'semantic' or not config.use_prior,
    "only a 'semantic' task takes a prior, leave it False",
  )
  need(
    'oracle_prior',
    config.use_prior or not config.oracle_prior,
    'a model without config.use_prior takes no prior, leave it False',
  )
  prior = config.prior
  for key, value in prior.items():
    needless = not (value and not config.use_prior)
    need(f'prior.{key}', needless, 'a model without config.use_prior takes no prior, leave it out')
    need(f'prior.{key}', value <= 1, 'use a share or probability of at most 1')
  need(
    'prior.none',
    prior.none + prior.predicted <= 1,
    f'with config.prior.predicted = {prior.predicted} these are more than all items, lower one',
  )
  need(
    'prior.predicted',
    not (prior.predicted and config.oracle_prior),
    'config.oracle_prior reads no masks, use 0',
  )
  need('data.negative_sound', data.negative_sound <= 1, 'use a share of at most 1')
  whole = all(type(number) is int for number in data.leave_out)
  need(
    'data.leave_out',
    data.leave_out == (0, 0)
    or (len(data.leave_out) == 2 and whole and data.leave_out[0] < data.leave_out[1]),
    'use (k, K), 0 <= k < K, to leave out part k of K, or (0, 0)',
  )
  need(
    'data.subsets',
    data.subsets and all(isinstance(name, str) and ',' not in name for name in data.subsets),
    "name one, as v1s, or several as \"('v1s','v1m')\"",
  )
  schedules = ('constant', 'cosine')
  need('optimizer.schedule', config.optimizer.schedule in schedules, f'use one of {schedules}')
  need('data.on_bad_clip', data.on_bad_clip in ('error', 'skip'), "use 'error' or 'skip'")
  need('train.trainable', config.train.trainable, 'name at least one regular expression')
  for pattern in config.train.trainable:
    ok = pattern and isinstance(pattern, str)
    need('train.trainable', ok, "use regular expressions that are not empty, '.*' trains all")
    try:
      re.compile(pattern)
    except re.error as error:
      need('train.trainable', False, f'{pattern!r} is not a regular expression ({error})')
  method.check(config, need)
  fits = not EVAL_ITEM_FRAMES % unit
  need('method', fits, f'it sees {unit} frames together, where 1 or {EVAL_ITEM_FRAMES} can be')
  need(
    'data.item_frames',
    not data.item_frames % unit,
    f'the method sees {unit} frames of a clip together, use a multiple of them, or 0 for whole '
    'clips',
  )


def stage_of(config: ml_collections.ConfigDict) -> str:
  """'stage 1', 'stage 2' (which takes a prior) or 'end to end'."""
  if config.task == 'binary':
    return 'stage 1'
  return 'stage 2' if config.use_prior else 'end to end'


def task_of(config: ml_collections.ConfigDict) -> 'Task':
  """What the input pipeline needs to know of a config."""
  from aavs_jax.input_pipeline.items import Task
  from aavs_jax.input_pipeline.prior import Faults

  prior = config.prior
  return Task(
    semantic=config.task == 'semantic',
    num_classes=config.num_classes,
    image_size=config.data.image_size,
    eval_size=config.data.eval_size,
    max_targets=config.data.max_targets,
    all_frames=config.data.all_frames,
    use_prior=config.use_prior,
    masks='' if config.oracle_prior else config.data.masks,
    soft=prior.soft,
    predicted=prior.predicted,
    none=prior.none,
    negative_sound=config.data.negative_sound,
    faults=Faults(prior.missing, prior.added, prior.moved, prior.wrong),
  )


def require_fit(clips: Sequence[Clip], config: ml_collections.ConfigDict) -> None:
  """Raises UserError for clips that cannot be used with a config, before any of them is read."""
  from aavs_jax.input_pipeline.index import require_classes
  from aavs_jax.input_pipeline.prepared import require_sizes

  if config.task == 'semantic':
    require_classes(clips)
    classes = len(clips[0].data_set.classes)
    if config.num_classes > classes:
      raise UserError(
        f'config.num_classes is {config.num_classes}, but {clips[0].data_set.name} has {classes} '
        'classes: use at most as many'
      )
  require_sizes(clips, config.data.image_size, config.data.eval_size)


def to_json(config: ml_collections.ConfigDict) -> str:
  return json.dumps(config.to_dict(), indent=2)


def from_json(path: Path) -> ml_collections.ConfigDict:
  """The config that a work folder was trained with. Raises UserError if there is none.

  Keys that came after it was written get the values of configs/base.py, but for the sections of
  another method than that file's.
  """
  plain = files.read_json(path, dict, 'restore it, or name a work folder of `aavs train`')
  try:
    if 'task' in plain:  # else it is no config, which `check` says
      defaults = base.get_config().to_dict()
      if plain.get('method', defaults['method']) != defaults['method']:
        defaults = {key: value for key, value in defaults.items() if key not in _OF_METHOD}
      plain = _with_defaults(plain, defaults)
    config = ml_collections.ConfigDict(_tuples(plain))
    check(config)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'{path} is not a config of `aavs train` ({" ".join(str(error).split())[:200]}): restore it '
      'or train again'
    ) from error
  return config


def _with_defaults(values: dict, defaults: dict) -> dict:
  """The values, and the defaults of the keys that they lack, at every level."""
  nested = {
    key: _with_defaults(values[key], default)
    for key, default in defaults.items()
    if isinstance(default, dict) and key in values
  }
  return {**defaults, **values, **nested}


def _tuples(value):
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def differences(a: ml_collections.ConfigDict, b: ml_collections.ConfigDict) -> list[str]:
  """Dotted keys in which two configs differ, with both values."""

  def flat(config):
    return traverse_util.flatten_dict(_tuples(json.loads(to_json(config))), sep='.')

  old, new = flat(a), flat(b)
  return [
    f'{key} is {new.get(key)!r}, was {old.get(key)!r}'
    for key in sorted({*old, *new})
    if old.get(key) != new.get(key)
  ]

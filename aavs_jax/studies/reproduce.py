"""The paper's main table from released checkpoints: conversion, masks, evaluations, comparison.

And rows of the methods that the paper compares with, TPAVI and AVSegFormer, by the metrics of their
own releases.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections

from aavs_jax import config as config_lib
from aavs_jax import hand_over
from aavs_jax.console import say
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline import masks as mask_files
from aavs_jax.input_pipeline.avsbench import SUBSETS
from aavs_jax.input_pipeline.clips import Clip
from aavs_jax.input_pipeline.errors import UserError, may_pass
from aavs_jax.input_pipeline.index import read_index, require_classes
from aavs_jax.pytorch import maps_names, torch_files
from aavs_jax.pytorch.convert import KINDS, convert
from aavs_jax.scoring import tables
from aavs_jax.stepping_stones import Evaluation, scores

_SOURCE = 'source.json'  # in a converted folder: of which files, and for which data set
_RESTORE = 'restore it, or name another --workdir'
_SCORES = ('miou', 'fscore')
_ONE_LINK = " (the authors' page has linked MS3's and AVSS's to one and the same file)"
_HINTS = {  # what else to say where another checkpoint is given
  'ms3': _ONE_LINK,
  'stage1': ', or with --masks the folder of its masks, all that its authors have released of it',
  'stage2': _ONE_LINK,
}
_FOUND = {  # what a file may be: a kind of `aavs convert`, or what its model's config says
  **KINDS,
  'stage 1': 'a checkpoint of stage 1, S4 or MS3',
  'stage 2': 'a checkpoint of stage 2',
  'end to end': 'a model of classes without a prior',
}
_MODELS = {'s4': 'S4', 'ms3': 'MS3', 'stage1': 'stage 1 of AVSS', 'stage2': 'stage 2 of AVSS'}


class Row(NamedTuple):
  """A row of the table: what is evaluated, and what the paper reports (Table 1)."""

  name: str
  evaluation: Evaluation  # of a key of _MODELS, or of a folder of one of OTHERS
  paper: tuple[float, float]  # mIoU and F in percent


_OF_STAGE2 = Evaluation('stage2', prior='masks', subsets=tuple(SUBSETS))
ROWS = {
  's4': Row('S4', Evaluation('s4', subsets=('v1s',)), (83.2, 91.3)),
  'ms3': Row('MS3', Evaluation('ms3', subsets=('v1m',)), (67.3, 77.6)),
  'avss': Row('AVSS', _OF_STAGE2, (48.5, 53.2)),
  'avss_oracle': Row('AVSS, ground-truth masks', _OF_STAGE2._replace(prior='oracle'), (64.9, 67.0)),
}
# What is published of other methods, by method and backbone, then by task: TPAVI's of papers,
# AVSegFormer's of its released checkpoints.
OTHERS = {
  ('tpavi', 'resnet'): {'s4': (72.79, 84.8), 'ms3': (47.88, 57.8), 'avss': (20.18, 25.2)},
  ('tpavi', 'pvt_v2'): {'s4': (78.74, 87.9), 'ms3': (54.00, 64.5), 'avss': (29.77, 35.2)},
  ('avsegformer', 'resnet'): {'s4': (76.38, 86.7), 'ms3': (53.81, 65.6), 'avss': (26.58, 31.5)},
  ('avsegformer', 'pvt_v2'): {'s4': (83.06, 90.5), 'ms3': (61.33, 73.0), 'avss': (37.31, 42.8)},
}
_NAMES = {'tpavi': 'TPAVI', 'avsegformer': 'AVSegFormer', 'resnet': 'ResNet-50', 'pvt_v2': 'PVT-v2'}
_OF_TASK = {'s4': ('v1s',), 'ms3': ('v1m',), 'avss': tuple(SUBSETS)}


def reproduce(
  workdir: str | Path,
  *,
  data: str,
  stage2: str | Path = '',
  vggish: str | Path = '',
  stage1: str | Path = '',
  masks: str | Path = '',
  s4: str | Path = '',
  ms3: str | Path = '',
  others: Sequence[tuple[str, str | Path]] = (),
  batch_items: int = 1,
) -> dict[str, dict]:
  """Scores released checkpoints on the test split beside what the paper reports.

  The converted models, stage 1's masks and every evaluation stay in workdir; what is there already
  and was made of the same files is not made again, so a killed run goes on. The table is in
  WORKDIR/table.json and table.md.

  Args:
    workdir: where everything goes.
    data: AVSBench-semantic.
    stage2: released checkpoint of AVSS's second stage; '' leaves its rows empty.
    vggish: the audio network, see convert.convert; AVSegFormer has its own.
    stage1: checkpoint of AVSS's first stage, whose masks are the prior of the second; or
    masks: the folder of these masks, all that is released of the first stage.
    s4: released checkpoint of S4; '' leaves its row empty.
    ms3: likewise of MS3.
    others: released checkpoints of TPAVI and AVSegFormer, each after its task, a key of _OF_TASK.
    batch_items: pieces of five frames that go through a model at once.

  Returns:
    By key of ROWS, or of the folder of another method, what `beside` gives.

  Raises:
    UserError: a checkpoint is not of the stage, method or task it is given for; with stage2 not one
      of stage1 and masks is given, but none or both; no checkpoint is given; workdir holds
      something else or what was made of other files; faults of files or data.
  """
  for path in (workdir, data):
    files.refuse_bucket(path)
  workdir, data = Path(workdir).resolve(), str(Path(data).resolve())
  if batch_items < 1:
    raise UserError(f'--batch is {batch_items}: use 1 or more')
  if not stage2 and (stage1 or masks):
    raise UserError(f'{stage1 or masks} is the prior of stage 2: name its checkpoint with --stage2')
  if stage2 and bool(stage1) == bool(masks):
    raise UserError(
      f'--stage1 is {str(stage1)!r} and --masks {str(masks)!r}: give one of them, for the prior of '
      'stage 2'
    )
  given = {'s4': s4, 'ms3': ms3, 'stage1': stage1, 'stage2': stage2}
  for path in (*given.values(), *(path for _, path in others)):
    files.refuse_bucket(path or '')
  sources = {model: Path(path) for model, path in given.items() if path}
  tasks = {f'{task}_{Path(path).stem}': (task, Path(path)) for task, path in others}
  if not sources and not tasks:
    raise UserError('no checkpoint is given: name one with --stage2, --s4, --ms3 or --other')
  unknown = [task for task, _ in others if task not in _OF_TASK]
  if unknown:
    raise UserError(f'--other {unknown[0]}=...: write it as TASK=FILE, TASK being s4, ms3 or avss')
  if lacking := [task for task, path in others if not path]:
    raise UserError(f'--other {lacking[0]} names no file: write it as {lacking[0]}=FILE')
  if len(tasks) < len(others):
    raise UserError('two files of --other have the same task and name: rename one of them')
  evaluations = {k: row.evaluation for k, row in ROWS.items() if row.evaluation.stage in sources}
  evaluations |= {
    model: Evaluation(model, subsets=_OF_TASK[task]) for model, (task, _) in tasks.items()
  }
  for evaluation in evaluations.values():  # what is wrong with the data shows now, not in hours
    clips = read_index(data, 'test', evaluation.subsets)
    if evaluation.subsets == tuple(SUBSETS):
      require_classes(clips)
  say('[1] conversion of the released checkpoints')
  made_of = {'vggish': vggish and _identity(vggish), 'data': data}
  for model, source in sources.items():
    _convert(model, source, vggish, workdir / model, made_of)
  rows = dict(ROWS) if sources else {}
  for model, (task, source) in tasks.items():
    rows[model] = _convert_other(model, task, source, vggish, workdir / model, made_of)
  for model in (*sources, *tasks):
    _set_batch(workdir / model / 'config.json', batch_items)
  if stage2:
    say("[2] stage 1's masks of the test split, the prior of stage 2")
    masks = _masks(workdir, masks, data)
  say('[3] evaluation on the test split')
  found = scores(evaluations, workdir, data=data, masks=masks)
  result = {key: beside(row.name, row.paper, found.get(key)) for key, row in rows.items()}
  files.write_json(workdir / 'table.json', result)
  files.write_text(workdir / 'table.md', format_table(result) + '\n')
  return result


def beside(
  name: str, paper: tuple[float, float] | None, evaluation: Mapping | None
) -> dict[str, str | dict[str, float] | None]:
  """A row of a table of what is published and what we find.

  Args:
    name: of the row.
    paper: mIoU and F in percent, if they are published.
    evaluation: see evaluate.evaluate, if there is one.

  Returns:
    'name', and each {'miou', 'fscore'} in percent, or None: 'paper'; 'ours', by the metric that the
    published ones are by; 'difference' of these; 'corrected', where that metric has faults, by
    AVSBench's, see protocols.py.
  """
  paper = dict(zip(_SCORES, paper)) if paper else None
  ours = difference = corrected = None
  if evaluation:
    ours, corrected = _percent(evaluation['overall']), None
    if 'released' in evaluation:
      ours, corrected = _percent(evaluation['released']), ours
  if ours and paper:
    difference = {key: ours[key] - paper[key] for key in _SCORES}
  row = {'paper': paper, 'ours': ours, 'difference': difference, 'corrected': corrected}
  return {'name': name, **row}


def _percent(scores: Mapping[str, float]) -> dict[str, float]:
  return {name: 100 * scores[name] for name in _SCORES}


def format_table(result: Mapping[str, Mapping]) -> str:
  """What `reproduce` returns as an aligned Markdown table; '-' where there is no checkpoint."""

  def cell(scores, form):
    # Rounded before the sign is chosen, so that nothing is shown as -0.0.
    values = [f'{round(scores[name], 1) + 0.0:{form}}' for name in _SCORES] if scores else ['-']
    return ' / '.join(values)

  # As wide as most numbers, so that tables of two runs differ in numbers alone.
  columns = {'paper': '.1f', 'ours': '.1f', 'difference': '+.1f', 'corrected': '.1f'}
  if not any(row.get('corrected') for row in result.values()):
    del columns['corrected']
  widths = {'ours': 11, 'difference': 13}
  rows = [['test split, mIoU / F', *(f'{key:>{widths.get(key, 0)}}' for key in columns)]]
  for row in result.values():
    rows.append([row['name'], *(cell(row.get(key), form) for key, form in columns.items())])
  return tables.aligned(rows, 1, markdown=True)


def _identity(path: str | Path) -> str:
  """What tells a checkpoint from another: the digest of a file, the place of a folder."""
  path = Path(path)
  if path.is_dir():
    return str(path.resolve())
  try:
    return files.digest(path)
  except OSError as error:
    if may_pass(error):
      raise
    raise UserError(f'{path} cannot be read ({error.strerror}): name a checkpoint file') from error


def _convert(
  model: str, source: Path, vggish: str | Path, folder: Path, made_of: Mapping[str, str]
) -> None:
  """A work folder of a released checkpoint of AAVS; UserError for the wrong stage."""

  def require(kind, config):
    found = config_lib.stage_of(config) if kind == 'aavs' else kind
    if found != ('stage 2' if model == 'stage2' else 'stage 1'):
      wanted = f'{_MODELS[model]}{_HINTS.get(model, "")}'
      raise UserError(f'--{model} {source} is {_FOUND[found]}: give the checkpoint of {wanted}')

  _convert_once(source, vggish, folder, made_of, require)


def _convert_other(
  model: str, task: str, source: Path, vggish: str | Path, folder: Path, made_of: Mapping[str, str]
) -> Row:
  """A work folder of a released checkpoint of another method, and its row."""

  def require(kind, config):
    fits = kind in maps_names.CONFIGS and (config.task == 'semantic') == (task == 'avss')
    if not fits:
      found = f' of the {config.task} task' if kind in maps_names.CONFIGS else ''
      raise UserError(
        f'--other {task}={source} is {KINDS[kind]}{found}: give one of TPAVI or AVSegFormer of '
        f'{task.upper()}'
      )

  if maps_names.kind_of(torch_files.read_tensors(source)) == 'avsegformer':
    vggish, made_of = '', {**made_of, 'vggish': ''}  # it has its own
  _convert_once(source, vggish, folder, made_of, require)
  config = config_lib.from_json(folder / 'config.json')
  backbone = config.model.backbone.kind
  name = f'{_NAMES[config.method]}, {_NAMES[backbone]}, {task.upper()}'
  published = OTHERS[config.method, backbone][task]
  return Row(name, Evaluation(model, subsets=_OF_TASK[task]), published)


def _convert_once(
  source: Path,
  vggish: str | Path,
  folder: Path,
  made_of: Mapping[str, str],
  require: Callable[[str, ml_collections.ConfigDict], None],
) -> None:
  """A work folder of a checkpoint, unless it is there; `require` refuses what else it may be."""
  made_of = {'checkpoint': _identity(source), **made_of}
  if folder.exists():
    note = folder / _SOURCE
    if not note.exists() or files.read_json(note, dict, _RESTORE) != made_of:
      raise UserError(
        f'{folder} was not made of {source}, {vggish} and the data set given: name another '
        '--workdir'
      )
    return
  with files.writing(folder) as working:  # until it is known to be of the right kind
    kind = convert(source, working, vggish)['kind']
    require(kind, config_lib.from_json(working / 'config.json'))
    files.write_json(working / _SOURCE, made_of)


def _masks(workdir: Path, given: str | Path, data: str) -> Path:
  """The folder of stage 1's masks: the given one, once they are read, or one of its model's."""
  if given:
    size = config_lib.from_json(workdir / 'stage2' / 'config.json').data.eval_size
    claim_masks(workdir, str(given), read_index(data, 'test'), size)
    return Path(given)
  folder = workdir / 'masks'
  hand_over.write_masks(workdir / 'stage1', data=data, out=folder, splits=('test',))
  return folder


def claim_masks(
  workdir: Path, folder: str, clips: Sequence[Clip], size: int, soft: bool = False
) -> None:
  """Reads all masks of the clips, and notes or compares what they are.

  Masks need not tell of which model they are: scores of others would be taken for theirs.

  Raises:
    UserError: one is missing or damaged, or the work folder has been used with others.
  """
  files.refuse_bucket(folder)
  total = hashlib.sha256()
  for clip in clips:
    for t in range(clip.num_frames):
      total.update(mask_files.read_mask(folder, clip, t, size, soft).tobytes())
  note, digest = workdir / 'masks.json', total.hexdigest()
  if not note.exists():
    files.write_json(note, digest)
  elif files.read_json(note, str, _RESTORE) != digest:
    raise UserError(
      f'{workdir} was begun with other masks than those of {folder}: name another --workdir'
    )


def _set_batch(path: Path, batch_items: int) -> None:
  """Evaluation takes its batch from the config of the work folder."""
  shape = {'data': {'batch_items': int, ...: object}, ...: object}
  config = files.read_json(path, shape, _RESTORE)
  if config['data']['batch_items'] != batch_items:
    config['data']['batch_items'] = batch_items
    files.write_json(path, config)

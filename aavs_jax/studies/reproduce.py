"""The paper's main table from released checkpoints: conversion, masks, evaluations, comparison."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from aavs_jax import config as config_lib
from aavs_jax import hand_over
from aavs_jax.console import say
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline import masks as mask_files
from aavs_jax.input_pipeline.avsbench import SUBSETS
from aavs_jax.input_pipeline.clips import Clip
from aavs_jax.input_pipeline.errors import UserError, may_pass
from aavs_jax.input_pipeline.index import read_index, require_classes
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
  evaluation: Evaluation  # of a key of _MODELS
  paper: tuple[float, float]  # mIoU and F in percent


_OF_STAGE2 = Evaluation('stage2', prior='masks', subsets=tuple(SUBSETS))
ROWS = {
  's4': Row('S4', Evaluation('s4', subsets=('v1s',)), (83.2, 91.3)),
  'ms3': Row('MS3', Evaluation('ms3', subsets=('v1m',)), (67.3, 77.6)),
  'avss': Row('AVSS', _OF_STAGE2, (48.5, 53.2)),
  'avss_oracle': Row('AVSS, ground-truth masks', _OF_STAGE2._replace(prior='oracle'), (64.9, 67.0)),
}


def reproduce(
  workdir: str | Path,
  *,
  data: str,
  stage2: str | Path,
  vggish: str | Path,
  stage1: str | Path = '',
  masks: str | Path = '',
  s4: str | Path = '',
  ms3: str | Path = '',
  batch_items: int = 1,
) -> dict[str, dict]:
  """Scores released checkpoints on the test split beside what the paper reports.

  The converted models, stage 1's masks and every evaluation stay in workdir; what is there already
  and was made of the same files is not made again, so a killed run goes on. The table is in
  WORKDIR/table.json and table.md.

  Args:
    workdir: where everything goes.
    data: AVSBench-semantic.
    stage2: released checkpoint of AVSS's second stage.
    vggish: the audio network, see convert.convert.
    stage1: checkpoint of AVSS's first stage, whose masks are the prior of the second; or
    masks: the folder of these masks, all that is released of the first stage.
    s4: released checkpoint of S4; '' leaves its row empty.
    ms3: likewise of MS3.
    batch_items: pieces of five frames that go through a model at once.

  Returns:
    By key of ROWS: 'name', and 'paper', 'ours' and 'difference', each {'miou', 'fscore'} in
    percent; the last two are None where no checkpoint is given.

  Raises:
    UserError: a checkpoint is not of the stage it is given for; not one of stage1 and masks is
      given, but none or both; workdir holds something else or what was made of other files; faults
      of files or data.
  """
  workdir, data = Path(workdir).resolve(), str(Path(data).resolve())
  if batch_items < 1:
    raise UserError(f'--batch is {batch_items}: use 1 or more')
  if bool(stage1) == bool(masks):
    raise UserError(
      f'--stage1 is {str(stage1)!r} and --masks {str(masks)!r}: give one of them, for the prior of '
      'stage 2'
    )
  given = {'s4': s4, 'ms3': ms3, 'stage1': stage1, 'stage2': stage2}
  sources = {model: Path(path) for model, path in given.items() if path}
  evaluations = _evaluations(sources, data)
  say('[1] conversion of the released checkpoints')
  _convert_all(workdir, sources, vggish, data, batch_items)
  say("[2] stage 1's masks of the test split, the prior of stage 2")
  masks = _masks(workdir, masks, data)
  say('[3] evaluation on the test split')
  result = _beside_paper(scores(evaluations, workdir, data=data, masks=masks))
  files.write_json(workdir / 'table.json', result)
  files.write_text(workdir / 'table.md', format_table(result) + '\n')
  return result


def _evaluations(models: Collection[str], data: str) -> dict[str, Evaluation]:
  """Those of the rows whose model is there; what is wrong with the data shows now, not in hours."""
  result = {key: row.evaluation for key, row in ROWS.items() if row.evaluation.stage in models}
  for evaluation in result.values():
    clips = read_index(data, 'test', evaluation.subsets)
    if evaluation.stage == 'stage2':
      require_classes(clips)
  return result


def _beside_paper(evaluations: Mapping[str, Mapping]) -> dict[str, dict]:
  """The rows of the table, of those evaluations that there are."""
  result = {}
  for key, row in ROWS.items():
    paper = dict(zip(_SCORES, row.paper))
    ours = difference = None
    if key in evaluations:
      ours = {name: 100 * evaluations[key]['overall'][name] for name in _SCORES}
      difference = {name: ours[name] - paper[name] for name in _SCORES}
    result[key] = {'name': row.name, 'paper': paper, 'ours': ours, 'difference': difference}
  return result


def format_table(result: Mapping[str, Mapping]) -> str:
  """What `reproduce` returns as an aligned Markdown table; '-' where there is no checkpoint."""

  def cell(scores, form):
    # Rounded before the sign is chosen, so that nothing is shown as -0.0.
    values = [f'{round(scores[name], 1) + 0.0:{form}}' for name in _SCORES] if scores else ['-']
    return ' / '.join(values)

  # As wide as most numbers, so that tables of two runs differ in numbers alone.
  rows = [['test split, mIoU / F', 'paper', f'{"ours":>11}', f'{"difference":>13}']]
  for row in result.values():
    scores = cell(row['paper'], '.1f'), cell(row['ours'], '.1f'), cell(row['difference'], '+.1f')
    rows.append([row['name'], *scores])
  return tables.aligned(rows, 1, markdown=True)


def _identity(path: str | Path) -> str:
  """What tells a checkpoint from another: the digest of a file, the place of a folder."""
  path = Path(path)
  if path.is_dir():
    return str(path.resolve())
  try:
    with path.open('rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    if may_pass(error):
      raise
    raise UserError(f'{path} cannot be read ({error.strerror}): name a checkpoint file') from error


def _convert_all(
  workdir: Path, sources: Mapping[str, Path], vggish: str | Path, data: str, batch_items: int
) -> None:
  made_of = {'vggish': _identity(vggish), 'data': data}
  for model, source in sources.items():
    _convert(model, source, vggish, workdir / model, {'checkpoint': _identity(source), **made_of})
    _set_batch(workdir / model / 'config.json', batch_items)


def _convert(
  model: str, source: Path, vggish: str | Path, folder: Path, made_of: Mapping[str, str]
) -> None:
  """A work folder of a released checkpoint, unless it is there; UserError for the wrong stage."""
  if folder.exists():
    note = folder / _SOURCE
    if not note.exists() or files.read_json(note, dict, _RESTORE) != made_of:
      raise UserError(
        f'{folder} was not made of {source}, {vggish} and the data set given: name another '
        '--workdir'
      )
    return
  with files.writing(folder) as working:  # until it is known to be of the right stage
    kind = convert(source, working, vggish)['kind']
    config = config_lib.from_json(working / 'config.json')
    found = config_lib.stage_of(config) if kind == 'aavs' else kind
    if found != ('stage 2' if model == 'stage2' else 'stage 1'):
      wanted = f'{_MODELS[model]}{_HINTS.get(model, "")}'
      raise UserError(f'--{model} {source} is {_FOUND[found]}: give the checkpoint of {wanted}')
    files.write_json(working / _SOURCE, made_of)


def _masks(workdir: Path, given: str | Path, data: str) -> Path:
  """The folder of stage 1's masks: the given one, once they are read, or one of its model's."""
  if given:
    _claim_masks(workdir, str(given), read_index(data, 'test'))
    return Path(given)
  folder = workdir / 'masks'
  if not hand_over.write_masks(workdir / 'stage1', data=data, out=folder, splits=('test',)):
    say('  all there')
  return folder


def _claim_masks(workdir: Path, folder: str, clips: Sequence[Clip]) -> None:
  """Reads all masks of the clips, and notes or compares what they are.

  Raises:
    UserError: one is missing or damaged, or the work folder has been used with others.
  """
  files.refuse_bucket(folder)
  size = config_lib.from_json(workdir / 'stage2' / 'config.json').data.eval_size
  total = hashlib.sha256()
  for clip in clips:
    for t in range(clip.num_frames):
      total.update(mask_files.read_mask(folder, clip, t, size).tobytes())
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

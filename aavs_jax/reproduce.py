"""The paper's main table from released checkpoints: conversion, masks, evaluations, comparison."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from aavs_jax import checkpoint, evaluate
from aavs_jax import config as config_lib
from aavs_jax.convert import KINDS, convert
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline import masks as mask_files
from aavs_jax.input_pipeline.avsbench import SUBSETS
from aavs_jax.input_pipeline.clips import Clip
from aavs_jax.input_pipeline.errors import UserError, may_pass
from aavs_jax.input_pipeline.index import read_index, require_classes
from aavs_jax.logging import say
from aavs_jax.state import merge

_SOURCE = 'source.json'  # in a converted folder: of which files, and for which data set
_RESTORE = 'restore it, or name another --workdir'
_SCORES = ('miou', 'fscore')
_ONE_LINK = " (the authors' page has linked MS3's and AVSS's to one and the same file)"
_HINTS = {  # what else to say where another checkpoint is given
  'ms3': _ONE_LINK,
  'stage1': ', or with --masks the folder of its masks, all that its authors have released of it',
  'stage2': _ONE_LINK,
}
_MODELS = {'s4': 'S4', 'ms3': 'MS3', 'stage1': 'stage 1 of AVSS', 'stage2': 'stage 2 of AVSS'}


class Row(NamedTuple):
  """A row of the table: what is evaluated, and what the paper reports (Table 1)."""

  name: str
  model: str  # a key of _MODELS
  subsets: tuple[str, ...]
  oracle: bool  # ground truth as the prior
  paper: tuple[float, float]  # mIoU and F in percent


_ALL = tuple(SUBSETS)
ROWS = {
  's4': Row('S4', 's4', ('v1s',), False, (83.2, 91.3)),
  'ms3': Row('MS3', 'ms3', ('v1m',), False, (67.3, 77.6)),
  'avss': Row('AVSS', 'stage2', _ALL, False, (48.5, 53.2)),
  'avss_oracle': Row('AVSS, ground-truth masks', 'stage2', _ALL, True, (64.9, 67.0)),
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
  for row in ROWS.values():  # now, not after hours
    if row.model in sources:
      clips = read_index(data, 'test', row.subsets)
      if row.model == 'stage2':
        require_classes(clips)

  say('[1] conversion of the released checkpoints')
  audio = _identity(vggish)
  for model, source in sources.items():
    made_of = {'checkpoint': _identity(source), 'vggish': audio, 'data': data}
    _convert(model, source, vggish, workdir / model, made_of)
    _set_batch(workdir / model / 'config.json', batch_items)
  say("[2] stage 1's masks of the test split, the prior of stage 2")
  if masks:
    _claim_masks(workdir, str(masks), read_index(data, 'test'))
  else:
    masks = workdir / 'masks'
    if not evaluate.write_masks(workdir / 'stage1', data=data, out=masks, splits=('test',)):
      say('  all there')

  say('[3] evaluation on the test split')

  @functools.cache
  def origin(model):
    flat, step = checkpoint.load_params(workdir / model)
    return {'checkpoint_step': step, 'checkpoint_digest': evaluate.digest(merge(flat, {}))}

  result = {}
  for key, row in ROWS.items():
    ours = None
    if row.model in sources:
      prior = row.model == 'stage2' and not row.oracle
      out = workdir / 'eval' / f'{key}.json'
      wanted = origin(row.model) | {'masks_digest': evaluate.masks_digest(masks) if prior else None}
      scores = evaluate.reusable(out, wanted) or evaluate.evaluate(
        workdir / row.model,
        data=data,
        out=out,
        subsets=row.subsets,
        oracle=row.oracle,
        mask_folder=str(masks) if prior else '',
      )
      ours = {name: 100 * scores['overall'][name] for name in _SCORES}
    paper = dict(zip(_SCORES, row.paper))
    difference = ours and {name: ours[name] - paper[name] for name in _SCORES}
    result[key] = {'name': row.name, 'paper': paper, 'ours': ours, 'difference': difference}
  files.write_json(workdir / 'table.json', result)
  files.write_text(workdir / 'table.md', format_table(result) + '\n')
  return result


def format_table(result: Mapping[str, Mapping]) -> str:
  """What `reproduce` returns as an aligned Markdown table; '-' where there is no checkpoint."""

  def cell(scores, form):
    # Rounded before the sign is chosen, so that nothing is shown as -0.0.
    values = [f'{round(scores[name], 1) + 0.0:{form}}' for name in _SCORES] if scores else ['-']
    return ' / '.join(values)

  lines = [
    f'| {"test split, mIoU / F":24} | {"paper":>11} | {"ours":>11} | {"difference":>13} |',
    f'| {"-" * 24} | {"-" * 10}: | {"-" * 10}: | {"-" * 12}: |',
  ]
  for row in result.values():
    paper, ours = cell(row['paper'], '.1f'), cell(row['ours'], '.1f')
    difference = cell(row['difference'], '+.1f')
    lines.append(f'| {row["name"]:24} | {paper:>11} | {ours:>11} | {difference:>13} |')
  return '\n'.join(lines)


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
    stage1, stage2 = 'a checkpoint of stage 1, S4 or MS3', 'a checkpoint of stage 2'
    if kind != 'aavs':
      found = KINDS[kind]
    elif config.use_prior:
      found = stage2
    else:
      found = stage1 if config.task == 'binary' else 'a model of classes without a prior'
    if found != (stage2 if model == 'stage2' else stage1):
      wanted = f'{_MODELS[model]}{_HINTS.get(model, "")}'
      raise UserError(f'--{model} {source} is {found}: give the checkpoint of {wanted}')
    files.write_json(working / _SOURCE, made_of)


def _claim_masks(workdir: Path, folder: str, clips: Sequence[Clip]) -> None:
  """Reads all masks of the clips, and notes or compares what they are.

  Raises:
    UserError: one is missing or damaged, or the work folder has been used with others.
  """
  mask_files.refuse_bucket(folder)
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

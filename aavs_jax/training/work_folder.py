"""What a run of training says at first, and keeps beside its checkpoints: config, list of clips."""

import concurrent.futures
import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import optax
from etils import epath

from aavs_jax import config as config_lib
from aavs_jax import methods
from aavs_jax.console import say
from aavs_jax.devices import distributed
from aavs_jax.input_pipeline import avsbench, bad_clips, files, masks, prepared
from aavs_jax.input_pipeline.clips import Clip, fold_of
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.reader import label_digests
from aavs_jax.methods.method import Method
from aavs_jax.scoring.predictor import local_variables
from aavs_jax.training import checkpoint
from aavs_jax.training import start as start_lib
from aavs_jax.training.state import (
  Flat,
  TrainState,
  count,
  create,
  digest,
  flat_shapes,
  in_groups,
  unflatten,
)
from aavs_jax.types import Variables

# Keys in which a restarted run may differ from its beginning: they change no weight, given that the
# names of clips are compared, and what train.init, data.masks and data.root hold by digests, the
# last of a sample (claim_inputs).
_FREE_KEYS = (
  'train.log_every_steps', 'train.keep_checkpoints', 'train.checkpoint_every_steps', 'train.init',
  'train.stuck_after', 'mesh.', 'data.threads', 'data.workers', 'data.root', 'data.masks',
  'data.on_bad_clip', 'data.max_bad_clips',
)  # fmt: skip

_CLASSES = 'classes.json'  # names of the classes of the data set
CLIPS, BAD_CLIPS = 'clips.json', 'bad_clips.json'
_SEEN = 'seen.json'  # names of training clips, its own and those of what it began with
_VERSIONS = 'versions'  # in inputs.json
_RESTORE = 'restore it, or name a folder that `aavs train` has written'
# Of config.data: what may differ between processes, each of which may have a disk of its own.
_OWN_KEYS = ('root', 'masks', 'threads', 'workers')


class Clips(NamedTuple):
  train: Sequence[Clip]
  val: Sequence[Clip]
  bad: Sequence[dict[str, str]]  # left out of train: 'clip' and 'text', what is wrong with it


def read_clips(config: ml_collections.ConfigDict, workdir: epath.Path) -> Clips:
  """The clips to train and to validate on, without bad ones as config.data.on_bad_clip says.

  Raises:
    UserError: the data set cannot be read or does not fit the config; there are too many bad clips.
  """
  train = read_index(config.data.root, 'train', config.data.subsets)
  part, parts = config.data.leave_out
  train = [clip for clip in train if not parts or fold_of(clip, parts) != part]
  if not train:
    raise UserError(
      f'config.data.leave_out is {(part, parts)}, and all training clips of {config.data.root} are '
      'in that part: use more parts'
    )
  val = read_index(config.data.root, 'val', config.data.subsets)
  config_lib.require_fit(train + val, config)
  bad = [] if config.data.on_bad_clip == 'error' else _bad_clips(config, workdir, train)
  good = bad_clips.leave_out(train, bad, config.data.max_bad_clips)
  for row in bad:
    say(f'  left out {row["clip"]}: {row["text"]}')
  return Clips(good, val, bad)


def _bad_clips(
  config: ml_collections.ConfigDict, workdir: epath.Path, clips: Sequence[Clip]
) -> list[dict[str, str]]:
  """Those noted when the run began, which has a checkpoint; else all are read to find them."""
  listing = workdir / BAD_CLIPS
  begun = files.is_there(listing) and checkpoint.latest_step(workdir / 'checkpoints') is not None
  if any(distributed.gather(begun)):
    if config_lib.from_json(workdir / 'config.json').data.on_bad_clip == 'error':
      say(
        f'  WARNING: all clips stay in, since {workdir} was begun with '
        'config.data.on_bad_clip=error: mend a clip that cannot be read, or name another --workdir'
      )
    return files.read_json(listing, prepared.BAD_CLIPS, _RESTORE)
  say(f'  reading all {len(clips)} training clips once, to leave out bad ones')
  task = config_lib.task_of(config)
  bad = bad_clips.find_bad_clips(distributed.share(clips), task, config.data.threads)
  distributed.wait_for_all('bad clips found')
  place = {clip.key: i for i, clip in enumerate(clips)}
  return sorted(itertools.chain(*distributed.gather(bad)), key=lambda row: place[row['clip']])


def claim(
  workdir: epath.Path,
  config: ml_collections.ConfigDict,
  clips: Clips,
  latest: int | None,
) -> None:
  """Saves config and lists of clips, or, once there is a checkpoint, compares with those saved.

  Raises:
    UserError: on all processes, if they do not begin with the same.
  """
  path, listing = workdir / 'config.json', workdir / CLIPS
  found = [clip.name for clip in clips.train + clips.val]
  common = json.loads(config_lib.to_json(config))
  common['data'] = {key: value for key, value in common['data'].items() if key not in _OWN_KEYS}
  distributed.require_same(
    {
      'latest checkpoint': latest,
      'config': common,
      'list of clips': found,
      'set of versions': _versions(config),
    }
  )
  if latest is None:
    if distributed.is_first():
      files.write_json(path, config.to_dict())
      files.write_json(listing, found)
      files.write_json(workdir / BAD_CLIPS, clips.bad)
      files.write_json(workdir / _CLASSES, clips.train[0].data_set.classes)
      seen = seen_by(config.train.init) | {clip.name for clip in clips.train}
      files.write_json(workdir / _SEEN, sorted(seen))
    return
  if files.read_json(listing, [str], _RESTORE) != found:
    raise UserError(
      f'{workdir} was begun with other clips than those of {config.data.root} (see {listing}): '
      'use the same data set or another --workdir'
    )
  changed = [
    line
    for line in config_lib.differences(config_lib.from_json(path), config)
    if not line.startswith(_FREE_KEYS)
  ]
  if changed:
    raise UserError(
      f'{workdir} was begun with another config ({"; ".join(changed[:3])}): '
      'use the same values or another --workdir'
    )


def seen_by(init: str) -> set[str]:
  """Names of the training clips of a config.train.init, and of all that it began with."""
  if not init:
    return set()
  folder = start_lib.work_folder_of(init)
  for name in (_SEEN, CLIPS):  # folders of earlier versions have the latter alone
    if files.is_there(folder / name):
      return set(files.read_json(folder / name, [str], _RESTORE))
  return set()


def load_start(config: ml_collections.ConfigDict, method: Method, needed: bool) -> Flat | None:
  """The numbers of config.train.init; None if it names none, or none is there nor `needed`."""
  init = config.train.init
  there = init and (needed or files.is_there(init))
  return start_lib.load_start(config, method) if there else None


def claim_inputs(
  workdir: epath.Path,
  config: ml_collections.ConfigDict,
  clips: Clips,
  start: Flat | None,
  latest: int | None,
  goes_on: bool = True,
) -> None:
  """Saves digests of start, masks and some labels, whether frames are lossless, versions of code;
  once there is a checkpoint, compares with those saved.

  The masks are read here, and not in the middle of training. Other versions are said of a run that
  goes on, and not of one that is finished.

  Raises:
    UserError: on all processes, if they or this and an earlier start do not find the same.
  """
  frames = {prepared.frames_of(clip) for clip in clips.train + clips.val}
  sizes = config.data.image_size, config.data.eval_size
  found = {
    'data.root': ', '.join(sorted(frames)),
    'data.root/labels': label_digests(clips.train, *sizes) | label_digests(clips.val, *sizes),
  }
  if start is not None or not config.train.init:
    found['train.init'] = None if start is None else digest(start)

  def are_there(folder):  # of a finished run they may be gone, as its start may
    return goes_on or files.is_there(folder)

  if config.use_prior and not config.oracle_prior and are_there(config.data.masks):
    frames = [(clip, range(clip.num_frames)) for clip in clips.val]
    found['data.masks'] = _masks_digest(config, config.data.masks, frames)
  folder = os.path.join(config.data.masks, masks.CROSS_FITTED)
  if config.prior.predicted and are_there(folder):
    frames = [
      (clip, range(clip.num_frames) if config.data.all_frames else clip.labelled_frames)
      for clip in clips.train
    ]
    found[f'data.masks/{masks.CROSS_FITTED}'] = _masks_digest(config, folder, frames)
  distributed.require_same({f'content of config.{key}': digest for key, digest in found.items()})
  path = workdir / 'inputs.json'
  begun = latest is not None and files.is_there(path)
  saved = files.read_json(path, dict, _RESTORE) if begun else {}
  versions = _versions(config)
  for name, version in versions.items():
    before = saved.get(_VERSIONS, {}).get(name, version)
    if before != version and goes_on:
      say(
        f'  WARNING: {workdir} was begun with {name} {before} and goes on with {version}, which '
        'may change the order of clips and what is computed'
      )
  for key, content in found.items():
    before = saved.get(key, content)
    if isinstance(content, dict):  # of clips that both name
      before = content | {name: digest for name, digest in before.items() if name in content}
    if content != before:
      raise UserError(
        f'{workdir} was begun with another content of config.{key} than it has now: give it the '
        'folder that it began with, wherever that is now, or use another --workdir'
      )
  if distributed.is_first():
    known = versions | saved.get(_VERSIONS, {})
    files.write_json(path, {**found, **saved, _VERSIONS: known})


def _versions(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Of what decides in which order clips come and what is computed of them: libraries and code."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
  paths = {Path(methods.module_of(config).__file__)}  # which may be somebody else's
  for folder in (Path(__file__).parents[1], Path(files.__file__).parent):
    paths |= set(folder.rglob('*.py'))
  digests = ' '.join(sorted(files.digest(path) for path in paths))
  code = hashlib.sha256(digests.encode()).hexdigest()[:16]
  return {'aavs_jax': code, **{name: importlib.metadata.version(name) for name in names}}


def keep_config(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
  """Saves what a run that goes on may change and has, once nothing of it has been refused.

  `aavs eval` and others look there for masks. What was done with bad clips stays as it was.
  """
  if distributed.is_first():
    path, now = workdir / 'config.json', config.copy_and_resolve_references()
    now.data.on_bad_clip = config_lib.from_json(path).data.on_bad_clip
    files.write_json(path, now.to_dict())


def _masks_digest(
  config: ml_collections.ConfigDict, folder: str, frames: Sequence[tuple[Clip, Sequence[int]]]
) -> str:
  """Of the masks of clips and times; each process reads those of its share of the clips."""
  files.refuse_bucket(folder)
  masks.require_kind(folder, config.prior.soft)
  size, soft = config.data.eval_size, config.prior.soft

  def read(of_clip):
    clip, times = of_clip
    digest = hashlib.sha256()
    for t in times:
      digest.update(masks.read_mask(folder, clip, t, size, soft).tobytes())
    return [clip.subset, clip.uid, digest.hexdigest()]

  with concurrent.futures.ThreadPoolExecutor(config.data.threads) as pool:
    digests = list(pool.map(read, distributed.share(frames)))
  distributed.wait_for_all('masks read')
  everyones = sorted(itertools.chain(*distributed.gather(digests)))
  return hashlib.sha256(json.dumps(everyones).encode()).hexdigest()[:16]


def announce(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  lacking: Sequence[str],
  state: TrainState,
  clips: int,
  total: int,
  step: int,
) -> None:
  """Says what is trained on what, and for how long; `lacking`: see start.first."""
  trained, frozen = count(state.trained) / 1e6, count(state.frozen) / 1e6
  say(
    f'  {config.task} task, {trained + frozen:.2f} M parameters, {trained:.2f} M of them trained, '
    f'{clips} clips, {total} steps, {jax.device_count()} {jax.devices()[0].platform} '
    f'device{"s" * (jax.device_count() > 1)}; work folder {workdir}'
  )
  if frozen and not config.train.init:
    say(
      f'  WARNING: {frozen:.2f} M parameters stay at their random initialisation, since '
      'config.train.init names no start'
    )
  if lacking and not step:
    others = sorted(state.flat.keys() - set(lacking))
    say(f'  not in {config.train.init}, so initialised anew: {in_groups(lacking, others)}')
  if step:
    say(f'  going on from step {step}')


def write_converted(
  out: str | Path,
  config: ml_collections.ConfigDict,
  flat: Flat,
  note: dict[str, Any],
  beside: Mapping[str, Any] | None = None,
) -> None:
  """A work folder of numbers that no training here has made, under its name only when complete.

  Args:
    out: a new folder.
    config: of the model.
    flat: its numbers, or some of them, which are a start alone.
    note: see checkpoint.converted.
    beside: contents of JSON files that belong to it, by name.
  """
  with files.writing_folder(out) as working:
    with checkpoint.make_manager(working / 'checkpoints', keep=1) as manager:
      checkpoint.save(manager, create(flat, (), optax.identity()), 1, None)
    files.write_json(working / 'config.json', config.to_dict())
    for name, content in {checkpoint.CONVERTED: note, **(beside or {})}.items():
      files.write_json(working / name, content)


def load_trained(workdir: str | Path) -> tuple[ml_collections.ConfigDict, Variables, int]:
  """Config, model (see local_variables) and step of a work folder's best checkpoint.

  Raises:
    UserError: the folder holds no model, but a start for training or a checkpoint that does not
      fit its config.json, or numbers that are not finite.
  """
  note = checkpoint.converted(workdir)
  if note and note['lacking']:
    alone = note['kind'] == 'vggish'
    raise UserError(
      f'{workdir} holds no audio-visual model but what was made of {note["source"]}: '
      f'{"give it to that as --vggish" if alone else "train from it, with --config.train.init"}'
    )
  config = config_lib.from_json(epath.Path(workdir) / 'config.json')
  flat, step = checkpoint.load_flat(workdir)
  abstract = flat_shapes(methods.of(config))
  wrong = [p for p, leaf in abstract.items() if p not in flat or flat[p].shape != leaf.shape]
  wrong += [p for p in flat if p not in abstract]
  if wrong:
    raise UserError(
      f'the checkpoint of {workdir} does not fit its config.json ({len(wrong)} parameters, first '
      f'{wrong[0]}): restore the config it was trained with'
    )
  if bad := [path for path, values in flat.items() if not np.isfinite(values).all()]:
    raise UserError(
      f'the checkpoint of {workdir} has numbers that are not finite ({len(bad)} parameters, first '
      f'{bad[0]}): remove that checkpoint, or train again'
    )
  return config, local_variables(unflatten(flat)), step


class Trained(NamedTuple):
  config: ml_collections.ConfigDict
  variables: Variables


def load_stages(
  stage1: str | Path | None, stage2: str | Path | None
) -> tuple[Trained | None, Trained | None]:
  """The models of one or both stages, from their work folders.

  Raises:
    UserError: no model, a model of the other stage, or two that do not fit together.
  """
  if stage1 is None and stage2 is None:
    raise UserError('no model is given: name a work folder of `aavs train` with --stage1')
  first = None if stage1 is None else _load_stage(stage1, 'binary')
  second = None if stage2 is None else _load_stage(stage2, 'semantic')
  if second and second.config.use_prior:
    if first is None:
      raise UserError(f'{stage2} starts from masks of stage 1: name its work folder with --stage1')
    sizes = [stage.config.data.eval_size for stage in (first, second)]
    if sizes[0] != sizes[1]:
      raise UserError(
        f'data.eval_size is {sizes[0]} in {stage1} and {sizes[1]} in {stage2}: name the stage 1 '
        f'whose masks {stage2} was trained for'
      )
  return first, second


def _load_stage(workdir: str | Path, task: str) -> Trained:
  config, variables, _ = load_trained(workdir)
  if config.task != task:
    role, other = ('stage1', 'stage2') if task == 'binary' else ('stage2', 'stage1')
    raise UserError(
      f'{workdir} holds a model of the {config.task} task, but --{role} takes a {task} one: name '
      f'it with --{other}'
    )
  return Trained(config, variables)


def class_names(workdir: str | Path) -> Sequence[str]:
  """Names of a model's classes by id; those of AVSBench for a model that was converted.

  Raises:
    UserError: it has more classes than there are names.
  """
  path = epath.Path(workdir) / _CLASSES
  names = files.read_json(path, [str], _RESTORE) if files.is_there(path) else list(avsbench.CLASSES)
  count = config_lib.from_json(epath.Path(workdir) / 'config.json').num_classes
  if count > len(names):
    raise UserError(
      f'the model of {workdir} has {count} classes, of which {len(names)} have names: it is of '
      'another data set, use it as a start'
    )
  return names[:count]

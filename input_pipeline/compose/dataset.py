"""Composes a data set in a layout of AVSBench that can only be solved by listening.

Objects of different classes move over a textured background; in each second some of them sound.
Label t shows the visible pixels of the objects that sound in second t. Objects that stay silent
look the same as those that sound.
"""

import csv
import hashlib
import json
import os
import pathlib
import shutil
import wave
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from .. import avsbench, avsbench_object, errors, files, labels
from ..audio import SAMPLE_RATE
from ..avsbench import SUBSETS
from ..avsbench_object import ObjectClip
from ..clips import SPLITS
from . import scenes
from .scenes import CLASSES

_VERSION = 1  # of the drawing: raise it when the same settings give other bytes
_LAYOUTS = ('semantic', 'object')
_LARGEST = 4096
_OBJECT_SIZE = 224  # of frames and masks of AVSBench-object


def compose(
  root: str | os.PathLike,
  *,
  clips: dict[str, dict[str, int]],
  num_classes: int = 8,
  size: tuple[int, int] = (160, 120),
  seed: int = 0,
  sprites: str | os.PathLike | None = None,
  layout: str = 'semantic',
  visible: bool = False,
  progress: Callable[[int, int], None] | None = None,
) -> pathlib.Path:
  """Writes a data set, or finishes or reuses the one that the same settings wrote before.

  The bytes depend on the settings only: on one machine the same call gives the same files. A clip
  appears under its name when complete; the tables that list the clips come last, so that they mark
  a complete set.

  Args:
    root: folder to write; absent, empty, or written by an earlier call with the same settings.
    clips: number of clips by split and subset, such as {'train': {'v1s': 90, 'v1m': 60}}.
    num_classes: how many of CLASSES occur, 2 to 70; not used with sprites.
    size: width and height of the frames in pixels, 32 to 4096 each.
    seed: a non-negative integer.
    sprites: folder with CLASS/*.png (alpha) and CLASS/*.wav, *.ogg or *.flac to use instead of
      drawn shapes and synthetic sounds; the classes are those of the folder. Of several pictures
      or recordings of a class the last (by name) occurs in the test split only.
    layout: 'semantic', as AVSBench-semantic, or 'object', as AVSBench-object: the same clips, of
      v1s and v1m alone, their pictures resized to 224x224 and their labels binary.
    visible: label all that can be seen, and let nothing sound: to learn looks from.
    progress: called with (clips done, clips in all) after each clip.

  Returns:
    root as a path.

  Raises:
    UserError: a setting is out of range, a sprite is missing or broken, or root holds something
      other than what these settings write.
  """
  files.refuse_bucket(root)
  root = pathlib.Path(root)
  _check_settings(clips, num_classes, size, seed, layout)
  things = (
    scenes.drawn_things(num_classes)
    if sprites is None
    else scenes.sprite_things(pathlib.Path(sprites))
  )
  settings = {
    'version': _VERSION,
    'clips': {split: {s: clips.get(split, {}).get(s, 0) for s in SUBSETS} for split in SPLITS},
    'classes': [thing.name for thing in things],
    'size': list(size),
    'seed': seed,
    'sprites': None if sprites is None else _digest(pathlib.Path(sprites)),
  }
  if layout != 'semantic':  # a key that earlier sets have not
    settings['layout'] = layout
  if visible:
    settings['visible'] = visible
  counts = settings['clips'].values()
  tables = {s: root / _table_name(layout, s) for s in SUBSETS if any(of[s] for of in counts)}

  def folder_of(plan):
    if layout == 'semantic':
      return root / plan.subset / plan.uid
    return pathlib.Path(_object_clip(root, plan).folder)

  plans = [
    scenes.plan_clip(things, seed, split, subset, index, visible)
    for split in SPLITS
    for subset in SUBSETS
    for index in range(settings['clips'][split][subset])
  ]
  written = [*tables.values(), *map(folder_of, plans)]
  if _is_ours(root, settings) and all(path.exists() for path in written):
    return root

  files.write_text(root / 'compose.json', json.dumps(settings, indent=2) + '\n')
  if layout == 'semantic':
    indices = {name: class_id + 1 for class_id, name in enumerate(avsbench.CLASSES)}
    files.write_text(root / 'label2idx.json', json.dumps(indices, indent=2) + '\n')
  row, write = _metadata_row, _write_clip
  if layout == 'object':
    row, write = _object_row, _write_object_clip
  rows = {path: [] for path in tables.values()}
  for done, plan in enumerate(plans, 1):
    rows[tables[plan.subset]].append(row(plan))
    if not folder_of(plan).exists():  # else an interrupted run wrote it, whole
      write(root, plan, size)
    if progress:
      progress(done, len(plans))
  for path, listed in rows.items():
    _write_table(path, listed)
  return root


def _digest(folder: pathlib.Path) -> str:
  """SHA-256 over names and contents of a sprites folder."""
  total = hashlib.sha256()
  for path in sorted(folder.glob('*/*')):
    if path.is_file():
      total.update(path.relative_to(folder).as_posix().encode() + b'\0')
      total.update(hashlib.sha256(path.read_bytes()).digest())
  return total.hexdigest()


def _check_settings(clips, num_classes, size, seed, layout) -> None:
  for split, counts in clips.items():
    if split not in SPLITS or not set(counts) <= set(SUBSETS):
      raise errors.UserError(
        f'clips names {split!r} with {sorted(counts)}: use the splits {list(SPLITS)} and the '
        f'subsets {list(SUBSETS)}'
      )
    if layout == 'object' and counts.get('v2'):
      raise errors.UserError(
        f"clips[{split!r}]['v2'] is {counts['v2']!r}, but AVSBench-object has no v2: use 0"
      )
    for subset, count in counts.items():
      if not isinstance(count, int) or count < 0:
        raise errors.UserError(f'clips[{split!r}][{subset!r}] is {count!r}: use an integer >= 0')
  if not any(sum(counts.values()) for counts in clips.values()):
    raise errors.UserError(f'clips is {clips}: ask for at least one clip')
  if not 2 <= num_classes <= len(CLASSES):
    raise errors.UserError(f'num_classes is {num_classes}: use a number from 2 to {len(CLASSES)}')
  if len(size) != 2 or not all(32 <= side <= _LARGEST for side in size):
    raise errors.UserError(f'size is {size}: use a width and a height of 32 to {_LARGEST} pixels')
  if seed < 0:
    raise errors.UserError(f'seed is {seed}: use an integer >= 0')
  if layout not in _LAYOUTS:
    raise errors.UserError(f'layout is {layout!r}: use one of {", ".join(_LAYOUTS)}')


def _is_ours(root: pathlib.Path, settings: dict) -> bool:
  """Whether these settings wrote what root holds, be it all of the set or a part.

  Raises:
    UserError: root holds something else.
  """
  try:
    found = files.read_json(root / 'compose.json', dict, 'restore it')
  except errors.UserError:
    if root.exists() and not (
      root.is_dir() and all(path.suffix == files.UNFINISHED for path in root.iterdir())
    ):
      raise errors.UserError(
        f'{root} holds something that was not composed here (it has no readable compose.json): '
        'choose another folder for the composed set'
      ) from None
    return False
  differing = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
  if differing:
    raise errors.UserError(
      f'{root} holds a set composed with other settings ({", ".join(differing)} differ, see its '
      'compose.json): choose another folder or delete this one'
    )
  return True


def _table_name(layout: str, subset: str) -> str:
  if layout == 'semantic':
    return 'metadata.csv'
  return os.path.basename(avsbench_object.table_path('', subset))


def _metadata_row(plan: scenes.Plan) -> dict[str, str]:
  """A row of metadata.csv; "visible" and "seconds" are additions to AVSBench's columns."""
  video, start, end = plan.uid.rsplit('_', 2)
  names = np.array([thing.name for thing in plan.things])
  return {
    'vid': video,
    'uid': plan.uid,
    's_min': start,
    's_max': end,
    'a_obj': '_'.join(names[plan.labelled.any(0)]),
    'split': plan.split,
    'label': plan.subset,
    'visible': '_'.join(names),
    'seconds': '|'.join('_'.join(names[now]) for now in plan.sounding),
  }


def _object_row(plan: scenes.Plan) -> dict[str, str]:
  """A row of s4_meta_data.csv or ms3_meta_data.csv."""
  if plan.subset == 'v1m':
    return {'video_id': plan.uid, 'split': plan.split}
  return {'name': plan.uid, 'category': plan.things[0].name, 'split': plan.split}


def _write_clip(root: pathlib.Path, plan: scenes.Plan, size: tuple[int, int]) -> None:
  frames, targets, audio = scenes.render_clip(plan, size)
  labelled = 1 if (plan.subset, plan.split) == ('v1s', 'train') else len(frames)
  with files.writing_folder(root / plan.subset / plan.uid) as folder:
    for name in ('frames', 'labels_rgb', 'labels_semantic'):
      (folder / name).mkdir()
    for t, frame in enumerate(frames):
      jpeg = cv2.imencode('.jpg', frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
      jpeg.tofile(folder / 'frames' / f'{t}.jpg')
      if t < labelled:
        colours = avsbench.PALETTE.take(targets[t], axis=0)[..., ::-1]
        cv2.imencode('.png', colours)[1].tofile(folder / 'labels_rgb' / f'{t}.png')
        cv2.imencode('.png', targets[t])[1].tofile(folder / 'labels_semantic' / f'{t}.png')
    _write_wav(folder / 'audio.wav', audio)


def _object_clip(root: pathlib.Path, plan: scenes.Plan) -> ObjectClip:
  category = '' if plan.subset == 'v1m' else plan.things[0].name
  frames = SUBSETS[plan.subset]
  return ObjectClip(str(root), plan.uid, plan.subset, plan.split, frames, category)


def _write_object_clip(root: pathlib.Path, plan: scenes.Plan, size: tuple[int, int]) -> None:
  frames, targets, audio = scenes.render_clip(plan, size)
  clip = _object_clip(root, plan)
  masks = os.path.dirname(clip.label_ids_path(0))
  shutil.rmtree(masks, ignore_errors=True)  # of an interrupted run, whose frames did not appear
  side = (_OBJECT_SIZE, _OBJECT_SIZE)
  # The frames appear last, when all of the clip is there.
  with (
    files.writing_folder(clip.folder) as pictures,
    files.writing_folder(masks) as labelled,
    files.writing(clip.audio_path) as sound,
  ):
    for t, frame in enumerate(frames):
      small = np.array(Image.fromarray(frame).resize(side, Image.Resampling.BILINEAR))
      path = pictures / os.path.basename(clip.frame_path(t))
      cv2.imencode('.png', small[..., ::-1])[1].tofile(path)
      if t in clip.labelled_frames:
        mask = labels.resize_ids((targets[t] > 0).astype(np.uint8) * 255, _OBJECT_SIZE)
        path = labelled / os.path.basename(clip.label_ids_path(t))
        cv2.imencode('.png', mask)[1].tofile(path)
    _write_wav(sound, audio)


def _write_wav(path: str | os.PathLike, audio: np.ndarray) -> None:
  with wave.open(str(path), 'wb') as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(SAMPLE_RATE)
    file.writeframes(audio.astype('<i2').tobytes())


def _write_table(path: pathlib.Path, rows: list[dict[str, str]]) -> None:
  with (
    files.writing(path) as working,
    open(working, 'w', newline='', encoding='utf-8') as file,
  ):
    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)

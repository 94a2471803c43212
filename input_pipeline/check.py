"""What a data set on disk holds, and what is wrong with it: the engine of `aavs check-data`.

Every file that training and evaluation read is read once, by the same readers, clips in parallel.
"""

import collections
import concurrent.futures
import dataclasses
import os
import struct
from collections.abc import Callable, Iterable, Sequence

import cv2
import numpy as np

from . import audio, files, images, labels
from .clips import IGNORE, SPLITS, Clip
from .errors import UserError
from .index import read_index

_KINDS = {  # of files, as the report counts them
  'semantic': ('frames', 'labels_semantic', 'labels_rgb'),
  'binary': ('frames', 'gt_masks'),
}
_SPECK = 0.001  # of an image: smaller regions may be strays of the annotation
_MANY_SIZES = 5
_MANY_FINDINGS = 10  # texts of a kind that are printed
# Programs that write to a pipe put a huge length into the header, and some count its own 8 bytes.
_UNKNOWN_LENGTH = 0x7FFF0000
_HEADER_SLACK = 8


@dataclasses.dataclass
class _Result:
  """What was found in one clip: counts and texts, no pixels."""

  clip: Clip
  read: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  sizes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  classes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  unknown_pixels: int = 0
  digest: str | None = None
  problems: list[dict] = dataclasses.field(default_factory=list)
  notes: list[dict] = dataclasses.field(default_factory=list)

  @property
  def name(self) -> str:
    return self.clip.key

  def problem(self, kind: str, text: str) -> None:
    self.problems.append(_finding(kind, self.name, text))

  def note(self, kind: str, text: str) -> None:
    self.notes.append(_finding(kind, self.name, text))

  def attempt(self, read: Callable, path: str):
    """What `read` returns, or None and a problem that says why it cannot."""
    try:
      return read()
    except UserError as error:
      self.problem('unreadable file' if os.path.exists(path) else 'missing file', str(error))
      return None


def check_data(
  root: str | os.PathLike,
  *,
  progress: Callable[[int, int], None] | None = None,
) -> dict:
  """Reads a whole data set in either layout and reports on it.

  Args:
    root: folder of the data set.
    progress: called with (clips done, clips in all) after each clip, in the calling thread.

  Returns:
    A report that json can write; the same data give the same report:
      root: the folder.
      layout: AVSBench-semantic, AVSBench-object or the name of another data set.
      ok: whether `problems` is empty.
      counts: for each subset and split {'subset', 'split', 'clips': rows of the table,
        'published': clips of the published set, and files read without error, 'frames',
        'labels_semantic' and 'labels_rgb', or 'frames' and 'gt_masks' of AVSBench-object}; the
        latter has only the subsets that a table is there for.
      image_sizes: the commonest {'width', 'height', 'frames'}.
      other_sizes: frames of sizes that are not among those.
      classes: for each class {'id', 'name', 'train', 'val', 'test': labelled frames in which it
        occurs}; class 0 is the background, and 1 what sounds where labels are binary.
      unknown_colours: {'pixels', 'clips'} of labels_rgb with a colour of no class, or of binary
        masks with a value between the two.
      problems, notes: lists of {'kind', 'clip': 'SUBSET/UID' or None, 'text': one sentence}.
    Problems are files that are missing, unreadable or cut short, sounds too short for a single
    example, labels with unknown colours in more than half an image, splits whose labels show the
    background alone, and clips of different splits whose first frame and sound are the same bytes.
    All else that is odd is a note: sounds shorter than the frames, labels of another size than
    their frame, unknown colours, regions that may be strays of the annotation, files that are links
    out of their subset's folder, folders that no row names, numbers of clips that are not the
    published ones.

  Raises:
    UserError: the table is missing or bad (see index.read_index).
  """
  clips = read_index(root)
  data_set = clips[0].data_set
  kinds = _KINDS[data_set.label_kind]
  there = {clip.subset for clip in clips}
  # One table lists all subsets.
  subsets = [s for s in data_set.subsets if s in there or len(data_set.tables) == 1]

  read, sizes, classes = collections.Counter(), collections.Counter(), collections.Counter()
  unknown = {'pixels': 0, 'clips': 0}
  same_content = collections.defaultdict(list)
  problems, notes = [], []
  # Decoding releases the interpreter's lock.
  with concurrent.futures.ThreadPoolExecutor() as executor:
    for done, result in enumerate(executor.map(_check_clip, clips), 1):
      clip = result.clip
      for kind, number in result.read.items():
        read[clip.subset, clip.split, kind] += number
      for class_id, number in result.classes.items():
        classes[class_id, clip.split] += number
      sizes.update(result.sizes)
      unknown['pixels'] += result.unknown_pixels
      unknown['clips'] += result.unknown_pixels > 0
      if result.digest:
        same_content[result.digest].append(clip)
      problems += result.problems
      notes += result.notes
      if progress:
        progress(done, len(clips))

  problems += _duplicates(same_content.values())
  problems += _without_targets(clips, classes)
  notes += _unlisted_folders(clips)
  rows = collections.Counter((clip.subset, clip.split) for clip in clips)
  counts = [
    {'subset': subset, 'split': split, 'clips': rows[subset, split]}
    | ({'published': data_set.published[subset][place]} if data_set.published else {})
    | {kind: read[subset, split, kind] for kind in kinds}
    for subset in subsets
    for place, split in enumerate(SPLITS)
  ]
  notes += _differing_counts(counts)
  commonest = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:_MANY_SIZES]
  return {
    'root': os.fspath(root),
    'layout': data_set.name,
    'ok': not problems,
    'counts': counts,
    'image_sizes': [
      {'width': width, 'height': height, 'frames': number} for (width, height), number in commonest
    ],
    'other_sizes': sizes.total() - sum(number for _, number in commonest),
    'classes': [
      {'id': class_id, 'name': name} | {split: classes[class_id, split] for split in SPLITS}
      for class_id, name in enumerate(data_set.classes)
    ],
    'unknown_colours': unknown,
    'problems': problems,
    'notes': notes,
  }


def _finding(kind: str, clip: str | None, text: str) -> dict:
  return {'kind': kind, 'clip': clip, 'text': text}


def _check_clip(clip: Clip) -> _Result:
  result = _Result(clip)
  if not files.is_there(clip.folder):
    result.problem(
      'missing folder',
      f'{clip.folder} does not exist, but a row of {os.path.basename(clip.table)} names it: '
      'restore it or remove the row',
    )
    return result
  frame_sizes = _check_frames(result)
  _check_labels(result, frame_sizes)
  sound_is_good = _check_sound(result)
  _check_links(result)
  if 0 in frame_sizes and sound_is_good:
    result.digest = files.digest(clip.frame_path(0)) + files.digest(clip.audio_path)
  return result


def _check_frames(result: _Result) -> dict[int, tuple[int, int]]:
  """Width and height of each frame that can be read, by its number."""
  sizes = {}
  for t in range(result.clip.num_frames):
    path = result.clip.frame_path(t)
    pixels = result.attempt(lambda path=path: images.read_image(path), path)
    if pixels is not None:
      sizes[t] = pixels.shape[1::-1]
  result.read['frames'] = len(sizes)
  result.sizes.update(sizes.values())
  return sizes


def _check_labels(result: _Result, frame_sizes: dict[int, tuple[int, int]]) -> None:
  clip, data_set = result.clip, result.clip.data_set
  binary = data_set.label_kind == 'binary'
  specks = collections.Counter()  # regions of each class that has shown nothing larger so far
  large = set()  # the classes that have
  off_size = []
  unknown_pixels = unknown_images = 0
  for t in clip.labelled_frames:
    semantic = None if binary else _read_semantic(result, t)
    coloured, unknown = _read_mask(result, t) if binary else _read_colours(result, t)
    for path, ids in ((clip.label_ids_path(t), semantic), (clip.label_rgb_path(t), coloured)):
      if ids is not None and t in frame_sizes and ids.shape[::-1] != frame_sizes[t]:
        label_size, frame_size = (f'{w}x{h}' for w, h in (ids.shape[::-1], frame_sizes[t]))
        name = '/'.join(path.split(os.sep)[-2:])
        off_size.append(f'{name} is {label_size} and its frame {frame_size}')
    unknown_pixels += unknown
    unknown_images += unknown > 0
    ids = coloured if semantic is None else semantic
    if ids is not None:
      present = np.flatnonzero(np.bincount(ids.ravel(), minlength=256)[: len(data_set.classes)])
      result.classes.update(present.tolist())
      _find_specks(ids, present[present > 0].tolist(), specks, large)

  if off_size:
    more = f', and so on for {len(off_size) - 1} more' if len(off_size) > 1 else ''
    result.note('label size', f'{clip.folder}: {off_size[0]}{more}, and both are resized when read')
  if unknown_pixels:
    folder = os.path.dirname(clip.label_rgb_path(0))
    what = (
      'are between the two values and count as sounding'
      if binary
      else 'have a colour of no class and count as background'
    )
    result.note(
      'unknown colours', f'{folder}: {unknown_pixels} pixels in {unknown_images} labels {what}'
    )
  for class_id, regions in sorted(specks.items()):
    result.note(
      'stray specks',
      f'{clip.folder}: class {class_id} ({data_set.classes[class_id]}) occurs only as {regions} '
      f'regions of less than {_SPECK:.1%} of the image, which may be strays of the annotation',
    )


def _read_mask(result: _Result, t: int) -> tuple[np.ndarray | None, int]:
  """What sounds, and how many pixels are between the two values of a binary mask."""
  path = result.clip.label_ids_path(t)
  mask = result.attempt(lambda: images.read_mask(path), path)
  if mask is None:
    return None, 0
  result.read['gt_masks'] += 1
  result.unknown_pixels += mask[1]
  return mask


def _read_semantic(result: _Result, t: int) -> np.ndarray | None:
  path = result.clip.label_ids_path(t)
  if not files.is_there(path) and files.is_there(result.clip.label_rgb_path(t)):
    return None  # ordinary: training then reads the colours
  ids = result.attempt(lambda: images.load_label_ids(result.clip, t), path)
  result.read['labels_semantic'] += ids is not None
  return ids


def _read_colours(result: _Result, t: int) -> tuple[np.ndarray | None, int]:
  """Class ids, and how many pixels of a label that is good enough have an unknown colour."""
  path = result.clip.label_rgb_path(t)
  if not files.is_there(path):
    return None, 0  # ordinary where there are ids, else already reported with them
  rgb = result.attempt(lambda: images.load_label_rgb(result.clip, t), path)
  if rgb is None:
    return None, 0
  result.read['labels_rgb'] += 1
  ids, unknown = labels.colours_to_ids(rgb, result.clip.data_set.palette)
  result.unknown_pixels += unknown
  if unknown > images.MAX_UNKNOWN_COLOURS * ids.size:
    result.problem(
      'wrong palette',
      f'{path}: {unknown} of {ids.size} pixels have a colour of no class: write the label in the '
      f'palette of {result.clip.data_set.name}',
    )
    return None, 0
  return ids, unknown


def _find_specks(
  ids: np.ndarray, present: list[int], specks: collections.Counter, large: set[int]
) -> None:
  """Adds a label's classes to `large`, or their regions to `specks`, which leaves out `large`."""
  for class_id in present:
    if class_id not in large:
      _, _, regions, _ = cv2.connectedComponentsWithStats((ids == class_id).astype(np.uint8))
      areas = regions[1:, cv2.CC_STAT_AREA]
      if areas.max() >= _SPECK * ids.size:
        large.add(class_id)
        specks.pop(class_id, None)
      else:
        specks[class_id] += len(areas)


def _check_sound(result: _Result) -> bool:
  """Whether the sound can be used, if only in part."""
  path, frames = result.clip.audio_path, result.clip.num_frames
  sound = result.attempt(lambda: audio.read_wav(path), path)
  if sound is None:
    return False
  missing = _missing_bytes(path)
  if missing:
    result.problem(
      'truncated file',
      f'{path} ends {missing} bytes before its header says: copy or extract it again',
    )
    return False
  waveform, rate = sound
  samples = -(-len(waveform) * audio.SAMPLE_RATE // rate)  # after resampling
  seconds, needed = samples / audio.SAMPLE_RATE, audio.samples_needed(1) / audio.SAMPLE_RATE
  if samples < audio.samples_needed(1):
    result.problem(
      'sound too short',
      f'{path} lasts {seconds:.4f} s, and one example needs {needed} s: extract the whole clip or '
      'leave it out',
    )
    return False
  if samples < audio.samples_needed(frames):
    needed = audio.samples_needed(frames) / audio.SAMPLE_RATE
    result.note(
      'short sound',
      f'{path} lasts {seconds:.4f} s, and {frames} frames need {needed} s: its last example is '
      'repeated',
    )
  return True


def _check_links(result: _Result) -> None:
  """Notes files that are links to where a copy of the data set would not have them."""
  clip = result.clip
  # The folder of a whole subset may well be a link, to another disk.
  home = os.path.realpath(clip.subset_folder) + os.sep
  frames = [clip.frame_path(t) for t in range(clip.num_frames)]
  ids = [clip.label_ids_path(t) for t in clip.labelled_frames]
  colours = [clip.label_rgb_path(t) for t in clip.labelled_frames]
  paths = dict.fromkeys([*frames, *ids, *colours, clip.audio_path])
  outside = [path for path in paths if not os.path.realpath(path).startswith(home)]
  if outside:
    more = f', and so do {len(outside) - 1} more files of the clip' if len(outside) > 1 else ''
    result.note(
      'link out of the data set',
      f'{outside[0]} leads to {os.path.realpath(outside[0])}, outside {clip.subset_folder}{more}: '
      'put the files themselves there if the data set is to be copied',
    )


def _missing_bytes(path: str) -> int:
  """How many bytes a RIFF file lacks; sound readers take what is there and do not say."""
  with open(path, 'rb') as file:
    head = file.read(8)
    length = os.fstat(file.fileno()).st_size
  if len(head) < 8 or head[:4] != b'RIFF':
    return 0
  claimed = struct.unpack('<I', head[4:])[0]
  if claimed >= _UNKNOWN_LENGTH or claimed + 8 <= length + _HEADER_SLACK:
    return 0
  return claimed + 8 - length


def _duplicates(groups: Iterable[list[Clip]]) -> list[dict]:
  found = []
  for clips in groups:
    if len({clip.split for clip in clips}) > 1:
      names = ', '.join(f'{clip.key} ({clip.split})' for clip in clips)
      text = f'{names} have the same first frame and sound: keep the clip in one split'
      found.append(_finding('duplicate across splits', f'{clips[0].subset}/{clips[0].uid}', text))
  return found


def _unlisted_folders(clips: list[Clip]) -> list[dict]:
  listed = {clip.folder for clip in clips}
  subsets = list(clips[0].data_set.subsets)
  # Where clips lie, and where those of other subsets would.
  parents = {os.path.dirname(clip.folder): clip for clip in clips}
  if clips[0].data_set.label_kind == 'semantic':
    for subset in subsets:
      clip = dataclasses.replace(clips[0], subset=subset)
      parents.setdefault(clip.subset_folder, clip)
  found = []
  for parent, clip in sorted(parents.items(), key=lambda item: subsets.index(item[1].subset)):
    if not os.path.isdir(parent):
      continue
    with os.scandir(parent) as entries:
      names = sorted(entry.name for entry in entries if entry.is_dir())
    for name in names:
      folder = os.path.join(parent, name)
      if folder not in listed:
        # A name on disk need not be text that can be printed.
        shown = name if name.isprintable() else ascii(name)
        table = os.path.basename(clip.table)
        text = f'{os.path.join(parent, shown)} is a folder that no row of {table} names'
        found.append(_finding('unlisted folder', f'{clip.subset}/{shown}', text))
  return found


def _without_targets(clips: Sequence[Clip], classes: collections.Counter) -> list[dict]:
  """Of splits with nothing to learn: a problem if labels were read there."""
  found = []
  for split in SPLITS:
    shown = {class_id for class_id, where in classes if where == split}
    if shown == {0}:
      text = (
        f'no label of {split} in {clips[0].root} shows a class: pixels of what sounds hold the id '
        f'of its class, where {IGNORE} means that they are ignored'
      )
      found.append(_finding('no targets', None, text))
  return found


def _differing_counts(counts: list[dict]) -> list[dict]:
  differing = [
    f'{row["clips"]} of {row["published"]} in {row["subset"]} {row["split"]}'
    for row in counts
    if row['clips'] != row.get('published', row['clips'])
  ]
  text = f'the numbers of clips are not those of the published set: {", ".join(differing)}'
  return [_finding('clip counts', None, text)] if differing else []


def format_check(report: dict) -> str:
  """The report of `check_data` as plain text, several lines; of each kind only the first ten."""
  parts = [
    f'{report["root"]} ({report["layout"]})',
    '',
    *_table(tuple(report['counts'][0]), report['counts']),
    '',
  ]

  sizes = [f'{row["width"]}x{row["height"]} ({row["frames"]})' for row in report['image_sizes']]
  if report['other_sizes']:
    sizes.append(f'others ({report["other_sizes"]})')
  parts.append(f'image sizes (frames): {", ".join(sizes) or "none"}')
  unknown = report['unknown_colours']
  parts.append(f'unknown colours: {unknown["pixels"]} pixels in {unknown["clips"]} clips')

  occurring = [row for row in report['classes'] if any(row[split] for split in SPLITS)]
  parts += ['', 'labelled frames in which each class occurs']
  parts += _table(('id', 'name', *SPLITS), occurring)
  absent = len(report['classes']) - len(occurring)
  if absent:
    parts.append(f'{absent} of {len(report["classes"])} classes occur in no label')

  for title in ('problems', 'notes'):
    parts += ['', f'{title}: {len(report[title]) or "none"}']
    by_kind = collections.defaultdict(list)
    for finding in report[title]:
      by_kind[finding['kind']].append(finding['text'])
    for kind, texts in by_kind.items():
      parts.append(f'  {kind} ({len(texts)})')
      parts += [f'    {text}' for text in texts[:_MANY_FINDINGS]]
      if len(texts) > _MANY_FINDINGS:
        parts.append(f'    ... and {len(texts) - _MANY_FINDINGS} more')
  return '\n'.join(parts)


def _table(heads: tuple[str, ...], rows: list[dict]) -> list[str]:
  """Columns as wide as they need; text to the left, numbers to the right."""
  widths = [max(len(str(cell)) for cell in (head, *(row[head] for row in rows))) for head in heads]
  lines = [heads, *(tuple(row[head] for head in heads) for row in rows)]
  is_number = [bool(rows) and isinstance(rows[0][head], int) for head in heads]
  return [
    '  '.join(
      str(cell).rjust(width) if number else str(cell).ljust(width)
      for cell, width, number in zip(line, widths, is_number, strict=True)
    ).rstrip()
    for line in lines
  ]

"""What a clip is made to hear: its own sound, another one, silence or noise."""

import itertools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from . import audio, clips
from .clips import Clip
from .errors import UserError
from .reader import load_log_mel

CHOICES = ('true', 'other', 'silence', 'noise', 'offscreen')
SILENCE = float(audio.log_magnitudes(0.0))  # log-mel of digital silence
NOISE_RMS = 0.1  # of full scale

Sound = Clip | str  # a clip whose audio is heard, 'silence' or 'noise'


def load_sound(clip: Clip, sound: Sound) -> np.ndarray:
  """What a clip hears, float32 [num_frames, 96, 64]. Raises UserError as reader.load_log_mel."""
  if sound == 'silence':
    shape = (clip.num_frames, audio.EXAMPLE_FRAMES, audio.MEL_BANDS)
    return np.full(shape, SILENCE, np.float32)
  if sound == 'noise':
    return noise_log_mel(clip)
  # Off-screen sound may come from a subset whose clips are shorter or longer.
  return audio.fit_examples(load_log_mel(sound), clip.num_frames)[0]


def noise_log_mel(clip: Clip) -> np.ndarray:
  """White Gaussian noise of fixed power, float32 [num_frames, 96, 64]; a clip's is always the same.

  The waveform goes through the same log-mel as recorded sound.
  """
  rng = np.random.default_rng(zlib.crc32(clip.key.encode()))
  waveform = rng.standard_normal(audio.samples_needed(clip.num_frames))
  waveform *= NOISE_RMS / np.sqrt(np.mean(waveform**2))
  return audio.log_mel_examples(waveform.astype(np.float32))


def choose_sounds(split: Sequence[Clip], choice: str) -> list[Sound]:
  """What each clip of a split hears; it depends on the list of clips alone.

  Args:
    split: the clips.
    choice: 'true', its own sound; 'other', that of another clip of its subset; 'offscreen', that of
      a clip in which nothing sounds that this one shows; 'silence'; or 'noise', see noise_log_mel.

  Raises:
    UserError: an unknown choice, or a clip for which there is no such sound.
  """
  if choice == 'true':
    return list(split)
  if choice == 'other':
    return other_sounds(split)
  if choice == 'offscreen':
    return offscreen_sounds(split)
  if choice in CHOICES:
    return [choice] * len(split)
  raise UserError(f'the audio {choice!r} is unknown: choose one of {", ".join(CHOICES)}')


def other_sounds(split: Sequence[Clip]) -> list[Clip]:
  """For each clip another one of the same subset, whose audio it gets in the listening test."""
  chosen = {}
  for subset, members in _by_subset(split).items():
    if len(members) < 2:
      raise UserError(
        f'subset {subset} has one clip in this split, so there is no other audio to play to it: '
        'leave the subset out or add clips'
      )
    for place, clip in enumerate(members):
      chosen[clip] = next(_from_half_way_round(members, place))
  return [chosen[clip] for clip in split]


def offscreen_sounds(split: Sequence[Clip]) -> list[Clip]:
  """For each clip another one in which something sounds, but nothing that the first shows.

  It is of the same subset or, where that has none, of any other.
  """
  objects = _read_objects(split)
  chosen = {}
  for members in _by_subset(split).values():
    for place, clip in enumerate(members):
      visible = objects[clip][1]
      candidates = itertools.chain(_from_half_way_round(members, place), split)
      fitting = (c for c in candidates if objects[c][0] and not objects[c][0] & visible)
      chosen[clip] = next(fitting, None)
      if chosen[clip] is None:
        raise UserError(
          f'{clip.key} shows {", ".join(sorted(visible))}, and every clip of this '
          'split with a sound has one of these in it, so there is no off-screen audio: add clips '
          'or choose another audio'
        )
  return [chosen[clip] for clip in split]


Objects = tuple[set[str], set[str]]  # names of the classes that sound in a clip, and it shows


def known_objects(split: Sequence[Clip]) -> list[Objects | None]:
  """Of each clip; None where the labels of its data set do not tell classes.

  Raises:
    UserError: they do, but the clip's table does not.
  """
  telling = [c for c in split if c.category or c.data_set.label_kind == 'semantic']
  found = _read_objects(telling)
  return [found.get(clip) for clip in split]


def negative_sound(
  split: Sequence[Clip],
  place: int,
  objects: Sequence[Objects | None],
  rng: np.random.Generator,
) -> Sound:
  """Silence, noise or the sound of a clip in which nothing sounds that clip number `place` shows.

  The latter only if it is known what the clip shows, and if there is one. AVSBench tells of what
  sounds alone: what is seen there without a sound may be heard then, with nothing to find.
  """
  shown = objects[place]
  choice = rng.integers(2 if shown is None else 3)
  if choice == 2:
    begin = int(rng.integers(len(split)))
    for other in itertools.chain(range(begin, len(split)), range(begin)):
      if objects[other] and objects[other][0] and not objects[other][0] & shown[1]:
        return split[other]
  return 'silence' if choice == 0 else 'noise'


def _by_subset(split: Sequence[Clip]) -> dict[str, list[Clip]]:
  groups = {}
  for clip in split:
    groups.setdefault(clip.subset, []).append(clip)
  return groups


def _from_half_way_round(members: Sequence[Clip], place: int) -> Iterator[Clip]:
  """All members, the farthest first: neighbours in the list may be cut from the same video."""
  count = len(members)
  return (members[(place + count // 2 + k) % count] for k in range(count))


def _read_objects(split: Sequence[Clip]) -> dict[Clip, Objects]:
  """For each clip the names of the classes that sound in it, and of those that it shows.

  From the columns a_obj and visible of metadata.csv, names joined by "_". Only made data sets have
  the latter: elsewhere what sounds stands for what is seen. In S4 the clip's folder tells both.

  Raises:
    UserError: a clip's table does not tell.
  """
  rows = {}
  for table in {clip.table for clip in split if not clip.category}:
    columns = ('label', 'uid', 'a_obj')
    try:  # what is wrong beside the last column is found again without it
      read = clips.read_table(table, (*columns, 'visible'))
    except UserError:
      read = clips.read_table(table, columns)
    rows |= {(table, row['label'], row['uid']): row for _, row in read}

  def objects(clip):
    if clip.category:
      return {clip.category}, {clip.category}
    row = rows[clip.table, clip.subset, clip.uid]
    sounding, visible = row['a_obj'], row.get('visible', row['a_obj'])
    return tuple({name for name in names.split('_') if name} for names in (sounding, visible))

  return {clip: objects(clip) for clip in split}

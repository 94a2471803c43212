"""Training clips with files that cannot be used: finding them, and leaving them out."""

import concurrent.futures
import functools
from collections.abc import Sequence

from . import items, prepared
from .clips import Clip
from .errors import UserError
from .reader import load_log_mel, read_clip


def find_bad_clips(clips: Sequence[Clip], task: items.Task, threads: int) -> list[dict[str, str]]:
  """Training clips with a file that cannot be used, in order; reads every frame, sound and label.

  Frames without a label as well: other methods train on them, and masks are made of them.
  Of prepared clips, whose files were read when they were prepared, only labels that may hold
  classes which the model lacks.

  Returns:
    {'clip': 'SUBSET/UID', 'text': a sentence that names the file and what is wrong with it} each.
  """
  with concurrent.futures.ThreadPoolExecutor(threads) as executor:
    faults = zip(clips, executor.map(functools.partial(_fault, task=task), clips))
    return [{'clip': c.key, 'text': fault} for c, fault in faults if fault]


def _fault(clip: Clip, task: items.Task) -> str | None:
  is_prepared = isinstance(clip, prepared.PreparedClip)
  if is_prepared and (not task.semantic or task.num_classes >= len(clip.data_set.classes)):
    return None
  try:
    reader = read_clip(clip, task.image_size, task.eval_size)
    for t in clip.labelled_frames:
      items.classes_of(reader, t, items.targets_of(reader, t, task), task)
    if not is_prepared:
      for t in range(clip.num_frames):
        reader.frame(t)
      load_log_mel(clip)
  except UserError as error:
    return str(error)
  return None


def leave_out(clips: Sequence[Clip], bad: Sequence[dict[str, str]], limit: int) -> list[Clip]:
  """Training clips without bad ones.

  They are found before the first batch and left out of the list of clips, instead of met and
  replaced on the way: the stream is then that of a data set without them, for any number of
  threads and processes, and all that a restarted run must remember is which they are.

  Raises:
    UserError: there are more than `limit` bad ones, or no others.
  """
  if len(bad) > limit:
    raise UserError(
      f'{len(bad)} of {len(clips)} training clips cannot be used, but data.max_bad_clips is '
      f'{limit}: mend them (`aavs check-data` lists all faults) or raise it; the first is '
      f'{bad[0]["text"]}'
    )
  names = {row['clip'] for row in bad}
  good = [clip for clip in clips if clip.key not in names]
  if not good:
    raise UserError(f'no training clip can be used: mend the data; the first is {bad[0]["text"]}')
  return good

"""Stage 1's masks on disk: MASKS/SUBSET/UID/{0..}.png, 0 or 255.

They are the prior of stage 2 in validation and test.
"""

import io
import os
import pathlib
import re
import shutil

import numpy as np
from PIL import Image

from . import files, index
from .clips import Clip, tables_in
from .errors import UserError, of_disk

SOURCE = 'source.json'  # in a folder of masks: which model wrote them
_PNG_FRAME = 1 << 16  # bytes of a PNG beside its pixels, at most


def mask_path(root: str, clip: Clip, t: int) -> str:
  return os.path.join(root, clip.subset, clip.uid, f'{t}.png')


def refuse_data_set(root: str | os.PathLike) -> None:
  """Raises UserError if maps below root would replace a data set's clips, or are in a bucket."""
  files.refuse_bucket(root)
  tables = [table for kind in index.KINDS for table in tables_in(root, kind.data_set)]
  if tables:
    raise UserError(f'{tables[0]} says that {root} is a data set: name another folder for the maps')


def write_clip_masks(root: str, clip: Clip, masks: np.ndarray) -> None:
  """Writes one clip's maps, uint8 [T, e, e], as grey PNGs; all of them appear at once or none.

  Maps that are there already are replaced. Raises UserError if anything else is in their folder.
  """
  final = os.path.join(root, clip.subset, clip.uid)
  for name in sorted(os.listdir(final)) if os.path.isdir(final) else ():
    if not re.fullmatch(r'\d+\.png', name):
      raise UserError(
        f'{final} holds {name}, which is no map, so it is not replaced: name another folder for '
        'the maps'
      )
  with files.writing_folder(final) as working:
    for t, mask in enumerate(masks):
      Image.fromarray(mask).save(working / f'{t}.png')
    if os.path.isdir(final):
      shutil.rmtree(final)


def read_mask(root: str, clip: Clip, t: int, size: int) -> np.ndarray:
  """uint8 [size, size] of 0 and 255. Raises UserError if missing, damaged or of another size."""
  path = mask_path(root, clip, t)
  advice = 'restore it, or write the masks again with `aavs masks`'
  try:
    # From memory, since Pillow asks a file for as many bytes as a broken header says; a sound mask
    # is smaller than its pixels and the frame of a PNG.
    with open(path, 'rb') as file:
      data = file.read(size * size + _PNG_FRAME)
    with Image.open(io.BytesIO(data), formats=('PNG',)) as image:
      if image.size != (size, size):
        raise UserError(
          f'{path} is {image.width}x{image.height}, expected {size}x{size}: {advice} at this config'
        )
      mask = np.asarray(image)
  except UserError:
    raise
  except FileNotFoundError:
    raise UserError(f'{path} is missing: {advice}') from None
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    if of_disk(error):
      raise
    raise UserError(f'{path} is not a readable PNG ({error}): {advice}') from None
  if mask.ndim != 2 or mask.dtype != np.uint8 or not np.isin(mask, (0, 255)).all():
    raise UserError(f'{path} holds values other than 0 and 255: {advice}')
  return mask


def read_source(root: str | os.PathLike) -> dict | None:
  """Which model wrote a folder of masks: 'checkpoint', 'step', 'digest'; None if it is unknown."""
  note = pathlib.Path(root, SOURCE)
  if not note.exists():
    return None
  shape = {'checkpoint': str, 'step': int, 'digest': str}
  return files.read_json(note, shape, 'restore it, or write the masks anew in another folder')


def source_digest(root: str | os.PathLike) -> str | None:
  """Digest of the model that wrote a folder of masks; None if it is unknown."""
  source = read_source(root)
  return source and source['digest']


def is_complete(root: str, clip: Clip, size: int) -> bool:
  """Whether every mask of the clip is there and sound."""
  try:
    for t in range(clip.num_frames):
      read_mask(root, clip, t, size)
  except UserError:
    return False
  return True

"""Stage 1's masks on disk: MASKS/SUBSET/UID/{0..}.png.

They are the prior of stage 2 in validation and test. Hard ones, the published kind, are what stage
1 has decided, 0 or 255; soft ones are 255 times the probability of sound, see of_scores. A folder
holds masks of one kind.

MASKS/cross_fitted/ is such a folder of training clips, each predicted by a model that has not been
trained on it: the prior of training, where config.prior.predicted asks for it.
"""

import io
import os
import pathlib
import re
import shutil

import numpy as np
from PIL import Image

from . import files, images, index
from .clips import Clip, tables_in
from .errors import UserError

SOURCE = 'source.json'  # in a folder of masks: which model wrote them, and of which kind they are
CROSS_FITTED = 'cross_fitted'
_PNG_FRAME = 1 << 16  # bytes of a PNG beside its pixels, at most


def mask_path(root: str, clip: Clip, t: int) -> str:
  return os.path.join(root, clip.subset, clip.uid, f'{t}.png')


def refuse_data_set(root: str | os.PathLike) -> None:
  """Raises UserError if what is written to root would come among a data set's clips or be in a
  bucket.
  """
  files.refuse_bucket(root)
  tables = [table for kind in index.KINDS for table in tables_in(root, kind.data_set)]
  if tables:
    raise UserError(f'{tables[0]} says that {root} is a data set: name another folder')


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


def of_scores(scores: np.ndarray, soft: bool) -> np.ndarray:
  """Masks uint8 [T, e, e] of stage 1's scores [T, 2, e, e] of silence and sound, 0 or more each.

  Hard ones are 255 where the score of sound is the larger one. The probability of soft ones is the
  share that sound has of both scores; 128 or more is exactly where a hard mask is 255. Raises
  UserError if there can be no share, FloatingPointError if the scores are no numbers.
  """
  require_finite(scores)
  sounds = np.argmax(scores, 1) == 1
  if not soft:
    return (sounds * 255).astype(np.uint8)
  if scores.min() < 0:
    raise UserError('this method has scores below 0, of which no mask is a share: leave soft out')
  silence, sound = np.moveaxis(np.maximum(scores, 1e-12), 1, 0)
  level = np.rint(255 * sound / (silence + sound))
  return np.where(sounds, np.maximum(level, 128), np.minimum(level, 127)).astype(np.uint8)


def require_finite(scores: np.ndarray) -> None:
  """Raises FloatingPointError for scores that are no numbers: they would be taken for silence."""
  if not np.isfinite(scores).all():
    raise FloatingPointError(
      'scores of the model are not finite, so its weights are not or it overflows: use another '
      'checkpoint, or config.dtype float32'
    )


def read_mask(root: str, clip: Clip, t: int, size: int, soft: bool = False) -> np.ndarray:
  """uint8 [size, size]; of 0 and 255, or from 0 to 255 if soft.

  Raises UserError if missing, damaged or of another size.
  """
  path = mask_path(root, clip, t)
  advice = f'restore it, or write the masks again with `{_writer(root)}`'
  if not files.is_there(path):
    raise UserError(f'{path} is missing: {advice}')
  data = files.read_file(path, size * size + _PNG_FRAME, 'a mask of this size', advice)
  try:
    images.check_sums(data)
    # From memory, since Pillow asks a file for as many bytes as a broken header says.
    with Image.open(io.BytesIO(data), formats=('PNG',)) as image:
      if image.size != (size, size):
        raise UserError(
          f'{path} is {image.width}x{image.height}, expected {size}x{size}: {advice} at this config'
        )
      mask = np.asarray(image)
  except UserError:
    raise
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise UserError(f'{path} is not a readable PNG ({error}): {advice}') from None
  if mask.ndim != 2 or mask.dtype != np.uint8 or not (soft or np.isin(mask, (0, 255)).all()):
    values = '8-bit grey' if soft else '0 and 255'
    raise UserError(f'{path} holds values other than {values}: {advice}')
  return mask


def read_source(root: str | os.PathLike) -> dict | None:
  """Which model wrote a folder of masks, 'checkpoint', 'step' and 'digest', and of which 'kind'.

  None if it is unknown. Folders that do not tell their kind hold hard masks.
  """
  note = pathlib.Path(root, SOURCE)
  if not note.exists():
    return None
  shape = {'checkpoint': str, 'step': int, 'digest': str, ...: object}
  found = files.read_json(note, shape, 'restore it, or write the masks anew in another folder')
  return {'kind': kind_of(soft=False), **found}


def _writer(root: str | os.PathLike) -> str:
  return 'aavs cross-fit' if os.path.basename(root) == CROSS_FITTED else 'aavs masks'


def kind_of(soft: bool) -> str:
  return 'soft' if soft else 'hard'


def require_kind(root: str | os.PathLike, soft: bool) -> None:
  """Raises UserError if a folder holds masks of the other kind than a config reads."""
  write = f'{_writer(root)}{" --soft" * soft}'
  if not os.path.isdir(root):
    raise UserError(f'{root} is missing: name a folder of masks, which `{write}` writes')
  found = (read_source(root) or {'kind': kind_of(soft=False)})['kind']
  if found != kind_of(soft):
    raise UserError(
      f'{root} holds {found} masks, but config.prior.soft is {soft}: name a folder of '
      f'{kind_of(soft)} ones, which `{write}` writes'
    )


def source_digest(root: str | os.PathLike) -> str | None:
  """Digest of the model that wrote a folder of masks; None if it is unknown."""
  source = read_source(root)
  return source and source['digest']


def is_complete(root: str, clip: Clip, size: int, soft: bool = False) -> bool:
  """Whether every mask of the clip is there and sound."""
  try:
    for t in range(clip.num_frames):
      read_mask(root, clip, t, size, soft)
  except UserError:
    return False
  return True

"""Files as bytes and as JSON: a wrong one is the user's to mend, a disk that fails is not."""

import json
import os
import stat
from typing import Any

from .errors import UserError, of_disk

_TYPES = {
  str: 'a text',
  int: 'a whole number',
  float: 'a number',
  dict: 'an object',
  list: 'a list',
}


def is_there(path: str | os.PathLike) -> bool:
  """As os.path.exists, which takes every file for missing while the disk fails."""
  try:
    os.stat(path)
  except (OSError, ValueError) as error:  # ValueError: no file has such a name
    if of_disk(error):
      raise
    return False
  return True


def read_file(path: str, limit: int, what: str, advice: str) -> bytes:
  """All of a file.

  Args:
    path: names it.
    limit: the most bytes it may have.
    what: it should be; and `advice`, what to do if it is not, both for the message.

  Raises:
    UserError: it is missing, too large or no file at all.
    OSError: the disk fails.
  """
  try:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
      raise UserError(f'{path}: not a file; put {what} in this place.')
    if found.st_size > limit:
      raise UserError(
        f'{path}: {found.st_size} bytes, too many for {what} (at most {limit}); {advice}.'
      )
    with open(path, 'rb') as file:
      return file.read()
  except (OSError, ValueError) as error:
    if isinstance(error, UserError) or of_disk(error):
      raise
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'{path}: {what} cannot be read ({reason}); {advice}.') from error


def read_json(path: os.PathLike, shape: Any, advice: str) -> Any:
  """What a JSON file of ours holds.

  Args:
    path: of pathlib or, in a bucket, of epath.
    shape: of the content, see `require_shape`.
    advice: what to do about a damaged file.

  Raises:
    UserError: it is missing, damaged or of another shape.
    OSError: the disk fails.
  """
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as error:
    if of_disk(error):
      raise
    if isinstance(error, FileNotFoundError):
      raise UserError(f'{path} is missing: {advice}') from None
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'{path} is not valid JSON ({reason}): {advice}') from error
  require_shape(path, content, shape, advice)
  return content


def require_shape(path: os.PathLike, value: Any, shape: Any, advice: str, key: str = '') -> None:
  """Raises UserError, which names file and key, for a JSON value of another shape.

  Args:
    path: the file it is from.
    value: as json reads it.
    shape: a type; [shape], a list of any length; or {key: shape}, with these keys and no others
      unless one of them is ..., whose shape is that of all others.
    advice: what to do about it.
    key: where in the file the value stands; '' for all of it.
  """
  inside = f'{key}.' if key else ''
  kind = shape if isinstance(shape, type) else type(shape)
  allowed = (int, float) if kind is float else kind
  if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not object):
    found = ascii(value)
    found = f'{found[:60]} ...' if len(found) > 64 else found
    raise UserError(f'{path}: {key or "the content"} is {found}, not {_TYPES[kind]}: {advice}')
  if isinstance(shape, list):
    for i, item in enumerate(value):
      require_shape(path, item, shape[0], advice, f'{key}[{i}]')
  elif isinstance(shape, dict):
    missing = [name for name in shape if name is not ... and name not in value]
    if missing:
      raise UserError(f'{path} lacks {inside}{missing[0]}: {advice}')
    for name, item in value.items():
      if name not in shape and ... not in shape:
        raise UserError(f'{path} holds an unknown key, {ascii(inside + name)[:64]}: {advice}')
      require_shape(path, item, shape.get(name, shape.get(...)), advice, inside + name)


def write_json(path: str, value) -> None:
  """Writes JSON under its final name only when it is complete."""
  write_text(path, json.dumps(value, indent=1))


def write_text(path: str, text: str) -> None:
  """Writes a file under its final name only when it is complete."""
  if '://' in str(path):  # a bucket's objects are written as a whole or not at all
    __import__('etils.epath').epath.Path(path).write_text(text)
    return
  path = __import__('pathlib').Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Always the same name, so that what a killed writer leaves is there until the next one at most.
  working = path.with_name(f'.writing-{path.name}')
  try:
    working.write_text(text)
    working.replace(path)
  except BaseException:
    working.unlink(missing_ok=True)
    raise

"""Files and folders, in and out: a wrong one is the user's to mend, a disk that fails is not.

What is written has its name only once it is complete.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from .errors import UserError, may_pass, of_disk

UNFINISHED = '.writing'  # suffix of what is not complete yet
# What file systems answer that know no flock, such as Lustre's usual mount.
NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)

_TYPES = {
  str: 'a text',
  int: 'a whole number',
  float: 'a number',
  dict: 'an object',
  list: 'a list',
}


def is_there(path: str | os.PathLike) -> bool:
  """As os.path.exists, which takes every file for missing while disk or bucket fail."""
  in_bucket = '://' in str(path)
  try:
    epath.Path(path).stat() if in_bucket else os.stat(path)
  except (OSError, ValueError) as error:  # ValueError: no file has such a name
    if of_disk(error) or (in_bucket and not isinstance(error, FileNotFoundError)):
      raise
    return False
  return True


def refuse_bucket(path: str | os.PathLike) -> None:
  """Raises UserError for gs:// and the like, where folders do not appear whole.

  To be asked before pathlib makes a local path of it.
  """
  if '://' in str(path):
    raise UserError(f'{path} is in a bucket, where this cannot be: mount it or name a shared disk')


def new_folder(path: str | os.PathLike) -> pathlib.Path:
  """The absolute path of a folder to be written, which does not exist or is empty, or UserError."""
  refuse_bucket(path)
  target = pathlib.Path(path).resolve()
  if str(path) == '-':
    raise UserError('- would be standard output, but a folder is written: name a new one')
  if target.exists() and not target.is_dir():
    raise UserError(f'{path} is a file: name a new folder for the output')
  if target.is_dir() and any(target.iterdir()):
    raise UserError(f'{path} is not empty: name a new folder for the output or empty this one')
  if target.is_mount():
    raise UserError(f'{path} is a mount point: name a new folder inside it for the output')
  return target


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
      raise UserError(f'{path} is not a file: put {what} in this place')
    if found.st_size > limit:
      raise UserError(
        f'{path} has {found.st_size} bytes, too many for {what} (at most {limit}): {advice}'
      )
    with open(path, 'rb') as file:
      return file.read()
  except (OSError, ValueError) as error:
    if isinstance(error, UserError) or of_disk(error):
      raise
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'{path}: {what} cannot be read ({reason}): {advice}') from error


def digest(path: str | os.PathLike) -> str:
  """SHA-256 of a file, also in a bucket, in hexadecimal."""
  with epath.Path(path).open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


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
  except FileNotFoundError:
    raise UserError(f'{path} is missing: {advice}') from None
  except (OSError, ValueError, RecursionError) as error:
    # What libraries for buckets raise has no number of the system's.
    if isinstance(error, OSError) and (may_pass(error) or error.errno is None):
      raise
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


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Where to write a file (or make a folder) that appears as `path` when the block ends, whole.

  Nothing is left after an exception, no folder made for it either. What a killed process has left
  stands beside `path` as .NAME.writing until the next one writes that name. In a bucket the file
  goes there at the end; its objects are written as a whole or not at all.

  Args:
    path: a file there is replaced, an empty folder too; its folder is made.

  Yields:
    A local path of the same name, where nothing is yet.

  Raises:
    UserError: there can be no such file, or another process is writing it now.
    OSError: the disk fails.
  """
  path = epath.Path(path)
  if '://' in str(path):
    with tempfile.TemporaryDirectory() as folder:
      working = epath.Path(folder, path.name)
      yield pathlib.Path(working)
      working.copy(path, overwrite=True)
    return
  with _working_folder(path) as folder:
    working = folder / path.name
    yield working
    os.replace(working, path)
    shutil.rmtree(folder)


def require_place(path: str | os.PathLike) -> None:
  """Raises what `writing` would, before what is to be written has been computed."""
  if pathlib.Path(path).is_dir():
    raise UserError(f'{path} is a folder: name a file')
  if '://' not in str(path):
    with _working_folder(path) as folder:
      folder.rmdir()
    return
  path = epath.Path(path)
  probe = path.with_name(f'.{path.name}{UNFINISHED}')
  try:
    probe.write_text('')
    probe.unlink()
  except FileNotFoundError as error:  # of a bucket that is not there
    raise UserError(f'{path} cannot be written ({error}): name another place') from error


@contextlib.contextmanager
def writing_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """As `writing`, of a local folder, which is empty at first; `path` may be an empty one."""
  refuse_bucket(path)
  with _working_folder(path) as folder:
    yield folder
    try:
      os.replace(folder, path)
    except OSError as error:
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        raise
      raise UserError(f'{path} is not empty: name another folder, or remove it') from error


@contextlib.contextmanager
def _working_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """An empty folder beside `path`, this process's alone; removed if the block raises."""
  path = pathlib.Path(path).absolute()
  made = [folder for folder in path.parents if not folder.exists()]
  working = path.with_name(f'.{path.name}{UNFINISHED}')
  with alone_in(working, path):
    try:
      for left in working.iterdir():  # by a process that was killed
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
      yield working
    except BaseException:
      shutil.rmtree(working, ignore_errors=True)
      for folder in made:
        with contextlib.suppress(OSError):  # others may have put something into it
          folder.rmdir()
      raise


@contextlib.contextmanager
def alone_in(folder: os.PathLike, name: os.PathLike | None = None) -> Iterator[None]:
  """Makes a folder, and keeps other processes of this machine that call this out of it.

  Where there are no locks, as in a bucket, nobody is kept out.

  Args:
    folder: to be alone in.
    name: what an error names, if not the folder.

  Raises:
    UserError: another process is in it, or there can be no such folder.
    OSError: the disk fails.
  """
  if '://' in str(folder):
    epath.Path(folder).mkdir(parents=True, exist_ok=True)
    yield
    return
  name = name or folder
  with contextlib.ExitStack() as held:
    try:
      pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
      handle = os.open(folder, os.O_RDONLY)
      held.callback(os.close, handle)
      _lock(handle)
      # It was another's a moment ago, who is done with it.
      if not (is_there(folder) and os.path.samestat(os.fstat(handle), os.stat(folder))):
        raise BlockingIOError
    except BlockingIOError as error:
      raise UserError(
        f'{name} is being written by another process: wait for it, or name another place'
      ) from error
    except OSError as error:
      if may_pass(error):
        raise
      raise UserError(f'{name} cannot be written ({error.strerror}): name another place') from error
    yield


def _lock(handle: int) -> None:
  """Until the handle is closed or this process ends, however; BlockingIOError if another has it."""
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno not in NO_FLOCK:
      raise


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a file, as `writing` does."""
  with writing(path) as working:
    working.write_text(text, encoding='utf-8')


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a JSON file, as `writing` does."""
  write_text(path, json.dumps(value, indent=1))


def remove_folder(path: pathlib.Path) -> None:
  """Deletes a folder, if there is one; killed half-way, it leaves no half one under the name.

  What is left then goes when it is called again.
  """
  hidden = path.with_name(f'.{path.name}.removing')
  for folder in (hidden, path):
    if folder.exists():
      folder.rename(hidden)
      shutil.rmtree(hidden)

"""One run at a time in a work folder: a second start is refused and learns who is there."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator

from etils import epath

from aavs_jax.console import say
from aavs_jax.devices import distributed
from aavs_jax.input_pipeline.errors import UserError, is_refused, may_pass
from aavs_jax.input_pipeline.files import NO_FLOCK

# Seconds. A lease has no owner once it has not been renewed for _PATIENCE: the run was killed.
_RENEWED_EVERY = 15
_PATIENCE = 60
LOCK, LEASE = 'run.lock', 'run.lease'
_SHOWN_WITHIN = 60  # network file systems show new files late
_SETTLED = 3  # two that take a lease at the same moment both see whose was written last


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
  """Keeps other runs out of a work folder, which it makes if there is none.

  By a file or object that is renewed again and again; on a disk first by flock, with which a run
  that was killed on this host is known to be gone, and only one of another host is waited for. Of
  several processes, all of which must call this, the first one holds it for all.

  Raises:
    BlockingIOError: on all processes, another run is in the folder; it names host and process.
    UserError: there can be no such folder; on all processes, they do not share it.
  """
  with contextlib.ExitStack() as held:
    refusal = None
    if distributed.is_first():
      try:
        workdir.mkdir(parents=True, exist_ok=True)
        held.enter_context(_lease(workdir) if '://' in str(workdir) else _flock(workdir))
      except BlockingIOError as error:
        refusal = str(error)
      except OSError as error:
        if may_pass(error) or (is_refused(error) and '://' in str(workdir)):
          raise
        raise UserError(
          f'{workdir} cannot be written ({error.strerror or error}): name another place'
        ) from error
    refusal, *_ = distributed.gather(refusal)
    if refusal:
      raise BlockingIOError(refusal)
    _require_shared(workdir)
    yield


def _require_shared(workdir: epath.Path) -> None:
  """UserError on all processes if one does not see what the first one writes into the folder.

  Else each would save into a folder of its own, and wait for the others to do the same there.
  """
  token, *others = distributed.gather(secrets.token_hex(8))
  if not others:
    return
  path = workdir / f'.seen-by-all-{token}'
  if distributed.is_first():
    path.touch()
  distributed.wait_for_all('work folder')
  end = time.monotonic() + _SHOWN_WITHIN
  while not (seen := path.exists()) and time.monotonic() < end:
    time.sleep(1)
  blind = [index for index, sees in enumerate(distributed.gather(seen)) if not sees]
  if distributed.is_first():
    path.unlink()
  if blind:
    raise UserError(
      f'--workdir is {workdir}, in which process {blind[0]} does not see what process 0 writes: '
      'name a folder that all of them share, such as gs://BUCKET/runs/stage1'
    )


@contextlib.contextmanager
def _flock(workdir: epath.Path) -> Iterator[None]:
  # Never removed: whoever has opened it by then would hold a lock that nobody else can see.
  with open(workdir / LOCK, 'a+') as file:
    file.seek(0)
    locked = True
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise _in_use(workdir, json.loads(file.read() or '{}')) from None
    except OSError as error:
      if error.errno not in NO_FLOCK:
        raise
      locked = False
    # Some mounts lock for one host alone: NFS with local_lock=flock, Lustre with localflock.
    with _lease(workdir, locked):
      file.truncate(0)
      file.write(json.dumps(_whose()))
      file.flush()
      yield


@contextlib.contextmanager
def _lease(workdir: epath.Path, locked: bool = False) -> Iterator[None]:
  """`locked`: by flock, so that no other run of this host can be in the folder."""
  path = workdir / LEASE
  at_once = locked and _make(path)
  found = None if at_once else _read(path)
  if locked and found and found.get('host') == socket.gethostname():
    at_once, found = True, None  # that one was killed
  if found:
    say(f'  {path} names {_name(found)}: waiting {_PATIENCE} s, to see whether that run goes on')
  end = time.monotonic() + _PATIENCE
  # Whether it changes is all that counts: clocks of hosts differ.
  while found and time.monotonic() < end:
    time.sleep(1)
    now = _read(path)
    if now and now != found:
      raise _in_use(workdir, now)
    found = now
  mine = {**_whose(), 'run': secrets.token_hex(8)}
  renewed = time.monotonic()

  def write():
    nonlocal renewed
    path.write_text(json.dumps({**mine, 'time': time.time()}))
    renewed = time.monotonic()

  def lost_to():
    """The run that has taken the lease, if one has."""
    holder = _read(path)
    if holder is None:
      # Another may have come and gone while this one could not renew; without the folder, which
      # this one then removes, none has.
      return {} if time.monotonic() - renewed > _PATIENCE and workdir.exists() else None
    return holder if holder.get('run', mine['run']) != mine['run'] else None

  write()
  if not at_once:
    time.sleep(_SETTLED)
    if (other := lost_to()) is not None:
      raise _in_use(workdir, other)
  ended = threading.Event()

  def renew():
    # Before another that has taken it at the same moment finds that settled, and begins.
    pause = _SETTLED / 2
    while not ended.wait(pause):
      pause = _RENEWED_EVERY
      # A bucket out of reach for a moment is no reason to end.
      with contextlib.suppress(Exception):
        if (other := lost_to()) is not None:
          # This process slept for longer than others wait. It must not write one byte more, and
          # a work folder survives the end of its run at any moment.
          print(f'aavs: {_in_use(workdir, other)}', file=sys.stderr, flush=True)
          os._exit(1)
        write()

  thread = threading.Thread(target=renew, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    if lost_to() is None:
      path.unlink(missing_ok=True)


def _make(path: epath.Path) -> bool:
  """Whether this process has made the file, as only one of all hosts can."""
  try:
    open(path, 'x').close()
  except FileExistsError:
    return False
  return True


def _read(path: epath.Path) -> dict | None:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except ValueError:  # written at this moment, or half: somebody's, until _PATIENCE is over
    return {'pid': 'unknown'}


def _whose() -> dict[str, str | int]:
  return {'host': socket.gethostname(), 'pid': os.getpid()}


def _name(holder: dict) -> str:
  return f'process {holder.get("pid", "unknown")} on {holder.get("host", "an unknown host")}'


def _in_use(workdir: epath.Path, holder: dict) -> BlockingIOError:
  return BlockingIOError(
    f'{workdir} is in use by another run, {_name(holder)}: wait for its end, or name another '
    '--workdir'
  )

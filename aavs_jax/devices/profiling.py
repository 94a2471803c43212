"""A trace of a few training steps, for XProf or Perfetto."""

from typing import Any

import jax
from etils import epath

from aavs_jax.console import say
from aavs_jax.input_pipeline.errors import UserError


class Profiler:
  """Traces the steps after number `start` up to number `stop`, of those the run comes to.

  Every process writes a trace of its own, which JAX names after its machine. An interrupted run
  writes what it has.

  Raises:
    UserError: there are no such steps.
  """

  def __init__(self, steps: tuple[int, int] | None, folder: epath.Path, total: int):
    self._start, self._stop = steps or (total, total)
    if steps and not 0 <= self._start < self._stop <= total:
      raise UserError(
        f'--profile {self._start}:{self._stop} is not within the steps of this run: use '
        f'START:STOP with 0 <= START < STOP <= {total}'
      )
    self._folder = folder
    self._running = False

  def __enter__(self):
    return self

  def at(self, step: int, state: Any) -> None:
    """To be called at the beginning and after every step, with its number and what it made."""
    inside = self._start <= step < self._stop
    if inside != self._running:
      # The host is ahead of the devices, which finish what comes before.
      jax.block_until_ready(state)
      if inside:
        # Not of Python's calls, for which every thread would be hooked, those of readers too.
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(str(self._folder), profiler_options=options)
        self._running = True
      else:
        self._end()

  def _end(self) -> None:
    self._running = False
    try:
      jax.profiler.stop_trace()
    except Exception as error:  # of any kind; the training is worth more than its trace
      say(f'  WARNING: no trace in {self._folder}: {" ".join(str(error).split())[:200]}')
    else:
      say(f'  trace written to {self._folder}; open it with XProf or ui.perfetto.dev')

  def __exit__(self, *_):
    if self._running:
      self._end()

"""Whole clips in batches of a fixed number of frames.

A batch has slots of five frames. A clip of v1s and v1m fills one, a clip of v2 two; none is split
between batches, so that the loss of a clip can be what it is where the clip is a batch of its own.
Of all of AVSBench that leaves no slot empty. Only batches of three slots, each with room for one
clip of v2, are 7 % empty: there are fewer clips of one slot than of two.
"""

import array
import collections
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

SLOT_FRAMES = 5
LOOK_AHEAD = 64  # clips that may wait for a batch with room while later ones go before


class Slot(NamedTuple):
  """Five frames of a batch."""

  clip: int
  part: int  # which five frames of the clip, from 0
  begin: int  # slot of the batch in which the clip begins
  empty: bool  # nothing fits: the first slot's frames again, without weight


def endless_clips(count: int, seed: int) -> Iterator[int]:
  """Clips 0 to count - 1 in an order drawn anew for each epoch, epoch after epoch."""
  epoch = 0
  while True:
    # Raw bits, sorted: numpy keeps these the same from version to version, its permutations not.
    yield from np.argsort(np.random.PCG64([seed, epoch]).random_raw(count), kind='stable').tolist()
    epoch += 1


def pack(stream: Iterator[int], slots: Sequence[int], batch_slots: int) -> Iterator[list[int]]:
  """Clips of each batch, in order, but that a clip which fits goes before one that does not.

  What is passed over comes first in the next batch. Slots stay empty only if none of the next
  LOOK_AHEAD clips fits.

  Args:
    stream: endless clips.
    slots: how many each clip fills.
    batch_slots: of a batch, at least those of the longest clip.
  """
  waiting = collections.deque()  # drawn and in no batch yet
  while True:
    clips, left, place = [], batch_slots, 0
    while left and place < LOOK_AHEAD:
      if place == len(waiting):
        waiting.append(next(stream))
      if slots[waiting[place]] <= left:
        clips.append(waiting[place])
        left -= slots[waiting[place]]
        del waiting[place]
      else:  # nor will it later, when still less is left
        place += 1
    yield clips


def batches_an_epoch(slots: Sequence[int], batch_slots: int) -> float:
  """How many batches of `pack` hold as many clips as there are, on average over many epochs.

  In mixtures of one and two slots a batch has room for so many slots, and for half as many pairs.
  The latter counts where batches are odd and clips of one slot too few to fill them up.
  """
  pairs = sum(count == 2 for count in slots)
  return max(sum(slots) / batch_slots, pairs / (batch_slots // 2) if pairs else 0.0)


class PackedSlots:
  """The slots of all batches of a run one after the other, as a source for grain.

  What slot i holds follows from the arguments alone. It is found by packing from the beginning, as
  far as asked for: the 60 epochs of the recipe on all of AVSBench take a second, 8 bytes a slot.
  """

  def __init__(self, slots: Sequence[int], batch_slots: int, seed: int):
    self._arguments = slots, batch_slots, seed
    self._batch_slots = batch_slots
    self._slots = slots
    self._batches = pack(endless_clips(len(slots), seed), slots, batch_slots)
    self._clips, self._parts = array.array('i'), array.array('i')
    self._lock = threading.Lock()

  def __reduce__(self):  # for loader processes, each of which packs anew
    return PackedSlots, self._arguments

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> Slot:
    with self._lock:
      while len(self._clips) <= index:
        self._append(next(self._batches))
    clip, part = self._clips[index], self._parts[index]
    place = index % self._batch_slots
    if clip < 0:
      return Slot(self._clips[index - place], 0, place, empty=True)
    return Slot(clip, part, place - part, empty=False)

  def _append(self, clips: list[int]) -> None:
    begin = len(self._clips)
    for clip in clips:
      for part in range(self._slots[clip]):
        self._clips.append(clip)
        self._parts.append(part)
    rest = self._batch_slots - (len(self._clips) - begin)
    self._clips.extend([-1] * rest)
    self._parts.extend([0] * rest)

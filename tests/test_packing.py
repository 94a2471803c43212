"""Packing: whole clips, every one as often as the others, hardly an empty slot."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aavs_jax.input_pipeline import packing

SINGLE, PAIRS = 3452 + 296, 4750  # clips of v1s and v1m, and of v2, that train as published
PUBLISHED = [1] * SINGLE + [2] * PAIRS


def _batches(slots, batch_slots, count, seed=0):
  source = packing.PackedSlots(slots, batch_slots, seed)
  return [[source[b * batch_slots + i] for i in range(batch_slots)] for b in range(count)]


def _padding(slots, batch_slots, epochs):
  count = epochs * sum(slots) // batch_slots
  batches = _batches(slots, batch_slots, count)
  return np.mean([slot.empty for batch in batches for slot in batch])


@pytest.mark.parametrize('batch_slots', [2, 4, 5, 8, 32])
def test_the_published_mix_leaves_no_slot_empty(batch_slots):
  assert _padding(PUBLISHED, batch_slots, 3) == 0
  assert packing.batches_an_epoch(PUBLISHED, batch_slots) == sum(PUBLISHED) / batch_slots


def test_three_slots_are_as_full_as_whole_clips_can_fill_them():
  # Each clip of v2 needs a batch of its own then, and there are too few others for all of these.
  fewest = PAIRS
  assert packing.batches_an_epoch(PUBLISHED, 3) == fewest
  assert _padding(PUBLISHED, 3, 3) == pytest.approx(1 - sum(PUBLISHED) / (3 * fewest), abs=2e-3)


@pytest.mark.parametrize('batch_slots', [3, 5, 7])
def test_clips_of_two_slots_alone_leave_one_of_an_odd_batch_empty(batch_slots):
  batches = _batches([2] * 10, batch_slots, 50)
  full = [False] * (batch_slots - 1)
  assert all([slot.empty for slot in batch] == [*full, True] for batch in batches)
  assert packing.batches_an_epoch([2] * 10, batch_slots) == 10 / (batch_slots // 2)


@pytest.mark.parametrize('batch_slots', [3, 8])
def test_clips_come_equally_often_and_an_epoch_is_as_long_as_said(batch_slots):
  epochs = 4
  count = round(epochs * packing.batches_an_epoch(PUBLISHED, batch_slots))
  begun = [
    slot.clip
    for batch in _batches(PUBLISHED, batch_slots, count)
    for slot in batch
    if slot.part == 0 and not slot.empty
  ]
  counts = np.bincount(begun, minlength=len(PUBLISHED))
  assert counts.min() >= epochs - 1 and counts.max() <= epochs + 1
  assert (counts == epochs).mean() > 0.97
  first = begun[: len(PUBLISHED)]
  assert len(set(first)) > 0.97 * len(first)
  assert first != begun[len(PUBLISHED) : 2 * len(PUBLISHED)]  # another order


def test_what_does_not_fit_comes_first_in_the_next_batch():
  slots = [1, 2, 2, 1, 1]
  batches = packing.pack(itertools.cycle(range(5)), slots, 2)
  # Clip 3 fits beside 0, clips 1 and 2 do not; then 0 of the second round beside 4.
  assert list(itertools.islice(batches, 6)) == [[0, 3], [1], [2], [4, 0], [1], [2]]


def test_no_more_than_so_many_clips_wait():
  slots = [1, 2]
  stream = itertools.chain([0], itertools.repeat(1, packing.LOOK_AHEAD - 1), itertools.repeat(0))
  assert next(packing.pack(stream, slots, 2)) == [0, 0]
  stream = itertools.chain([0], itertools.repeat(1, packing.LOOK_AHEAD), itertools.repeat(0))
  assert next(packing.pack(stream, slots, 2)) == [0]


@settings(max_examples=40, deadline=None)
@given(
  slots=st.lists(st.integers(1, 2), min_size=1, max_size=12),
  batch_slots=st.integers(2, 7),
  seed=st.integers(0, 5),
)
def test_every_batch_holds_whole_clips_of_the_stream(slots, batch_slots, seed):
  begun = []
  for batch in _batches(slots, batch_slots, 30, seed):
    place = 0
    while place < batch_slots and not batch[place].empty:
      clip = batch[place].clip
      for part in range(slots[clip]):
        assert batch[place + part] == packing.Slot(clip, part, place, False)
      begun.append(clip)
      place += slots[clip]
    for rest in range(place, batch_slots):
      assert batch[rest] == packing.Slot(batch[0].clip, 0, rest, True)
  # Nothing is left out or taken twice: with those that wait it is the stream up to some point.
  drawn = itertools.islice(packing.endless_clips(len(slots), seed), len(begun) + packing.LOOK_AHEAD)
  available = np.bincount(list(drawn), minlength=len(slots))
  assert (np.bincount(begun, minlength=len(slots)) <= available).all()


def test_the_order_of_an_epoch_is_what_it_has_always_been():
  # Recorded: runs that were begun with it go on with it, whatever numpy they find.
  order = list(itertools.islice(packing.endless_clips(8, seed=3), 24))
  assert [sorted(order[i : i + 8]) for i in (0, 8, 16)] == [list(range(8))] * 3
  assert order[:16] == [0, 4, 7, 1, 5, 6, 3, 2, 0, 6, 2, 1, 3, 7, 4, 5]


def test_any_slot_can_be_asked_for_by_any_process():
  source = packing.PackedSlots([1, 2, 2, 1, 1], 3, 7)
  later = source[299]
  assert [source[i] for i in range(300)][-1] == later
  copy = pickle.loads(pickle.dumps(source))
  assert copy[299] == later and copy[11] == source[11]

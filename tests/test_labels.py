"""Palette, label conversion and label resizing."""

import cv2
import numpy as np
import pytest
from PIL import Image

from aavs_jax.input_pipeline import avsbench, labels


def test_palette_bit_by_bit():
  for class_id in range(71):
    digits = [int(digit) for digit in reversed(oct(class_id)[2:])]
    want = [
      sum((digit >> c & 1) * 2 ** (7 - i) for i, digit in enumerate(digits)) for c in range(3)
    ]
    assert avsbench.PALETTE[class_id].tolist() == want
  assert avsbench.PALETTE.shape == (71, 3)
  assert avsbench.PALETTE.dtype == np.uint8
  assert avsbench.PALETTE[[0, 1, 2, 4, 8, 64, 70]].tolist() == [
    [0, 0, 0], [128, 0, 0], [0, 128, 0], [0, 0, 128], [64, 0, 0], [32, 0, 0], [32, 128, 128],
  ]  # fmt: skip


def test_values_are_those_of_np_unique():
  rng = np.random.default_rng(0)
  for some in ([0], [255], [0, 70, 255], [1, 2, 3, 128, 254], range(256)):
    ids = rng.choice(np.array(some, np.uint8), (40, 30))
    ids.setflags(write=False)
    np.testing.assert_array_equal(labels.values(ids), np.unique(ids))


def test_class_names():
  assert len(avsbench.CLASSES) == len(set(avsbench.CLASSES)) == 71
  for class_id, name in ((0, 'background'), (28, 'guitar'), (41, 'man'), (70, 'woman')):
    assert avsbench.CLASSES[class_id] == name


def test_colours_and_ids_round_trip():
  ids = np.random.default_rng(0).permutation(np.arange(142) % 71).reshape(2, 71).astype(np.uint8)
  rgb = labels.ids_to_colours(ids, avsbench.PALETTE)
  assert rgb.shape == (2, 71, 3) and rgb.dtype == np.uint8
  back, unknown = labels.colours_to_ids(rgb, avsbench.PALETTE)
  np.testing.assert_array_equal(back, ids)
  assert back.dtype == np.uint8
  assert unknown == 0


def test_unknown_colours_are_counted_and_become_background():
  rgb = labels.ids_to_colours(np.full((4, 5), 41), avsbench.PALETTE)
  strange = [[1, 0, 0], [255, 255, 255], [129, 128, 0], [0, 0, 1], [64, 64, 65]]
  rgb[2] = strange
  ids, unknown = labels.colours_to_ids(rgb, avsbench.PALETTE)
  assert unknown == 5
  assert (ids[2] == 0).all()
  assert (np.delete(ids, 2, axis=0) == 41).all()


def test_ignored_pixels_become_black():
  assert labels.ids_to_colours(np.array([255, 1]), avsbench.PALETTE).tolist() == [
    [0, 0, 0],
    [128, 0, 0],
  ]


@pytest.mark.parametrize('target', [1, 7, 56, 224, 384])
@pytest.mark.parametrize('height, width', [(1, 3), (37, 53), (224, 224), (360, 640), (720, 1280)])
def test_resize_ids_is_pillow_nearest(height, width, target):
  ids = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
  want = np.array(Image.fromarray(ids).resize((target, target), Image.Resampling.NEAREST))
  got = labels.resize_ids(ids, target)
  np.testing.assert_array_equal(got, want)
  assert got.dtype == np.uint8


def object_label():
  ids = np.zeros((60, 100), np.uint8)
  ids[20:41, 30:71] = 41
  ids[50:, :7] = 1
  return labels.ids_to_colours(ids, avsbench.PALETTE)


@pytest.mark.parametrize('size', [24, 60, 224])
def test_binary_metric_target_is_opencv_bilinear_of_the_colours(size):
  rgb = object_label()
  grey = cv2.cvtColor(cv2.resize(rgb, (size, size)), cv2.COLOR_RGB2GRAY)  # bilinear by default
  got = labels.binary_metric_target(rgb, size)
  np.testing.assert_array_equal(got, grey > 0)
  assert got.dtype == bool and got.shape == (size, size)


def test_binary_metric_target_only_dilates():
  rgb = object_label()
  target = labels.binary_metric_target(rgb, 224)
  nearest = labels.resize_ids(rgb.any(axis=2).astype(np.uint8), 224) > 0
  assert target[nearest].all()
  extra = target & ~nearest
  assert 0 < extra.sum() < 0.2 * nearest.sum()
  # By less than one pixel of the label: 224 / 60 rows and 224 / 100 columns.
  reach = cv2.dilate(nearest.astype(np.uint8), np.ones((9, 7), np.uint8)) > 0
  assert reach[target].all()


def test_binary_metric_target_of_silence_is_empty():
  assert not labels.binary_metric_target(np.zeros((30, 40, 3), np.uint8), 224).any()

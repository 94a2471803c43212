"""Overlays: colours where they belong, visible on any background, untouched frames elsewhere."""

import numpy as np
import pytest

from aavs_jax.input_pipeline.avsbench import CLASSES
from aavs_jax.media.overlay import SOUNDING_COLOUR, legend_colour, overlay, overlay_binary


def square(size=20, value=1):
  ids = np.zeros((size, size), np.uint8)
  ids[5:15, 5:15] = value
  return ids


def test_legend_colours_are_distinct_and_bright():
  colours = [legend_colour(class_id) for class_id in range(1, len(CLASSES))]
  assert len(set(colours)) == len(CLASSES) - 1
  assert min(max(colour) for colour in colours) >= 110
  assert legend_colour(8) != legend_colour(1)  # palette (64, 0, 0) and (128, 0, 0)
  assert legend_colour(1)[0] > legend_colour(1)[1]  # still red


def test_blend_contour_and_rest():
  frame = np.full((20, 20, 3), 100, np.uint8)
  drawn = overlay(frame, square(), alpha=0.5)
  expected = np.round((100 + np.array(legend_colour(1))) / 2)
  np.testing.assert_allclose(drawn[10, 10], expected, atol=1)
  np.testing.assert_array_equal(drawn[5, 10], [255, 255, 255])
  np.testing.assert_array_equal(drawn[4, 10], [0, 0, 0])
  np.testing.assert_array_equal(drawn[0, 0], [100, 100, 100])
  np.testing.assert_array_equal(frame, 100)  # the frame itself is not written to


@pytest.mark.parametrize('grey', [0, 50, 128, 255])
def test_every_class_stands_out_from_any_background(grey):
  frame = np.full((20, 20, 3), grey, np.uint8)
  for class_id in range(1, len(CLASSES)):
    drawn = overlay(frame, square(value=class_id)).astype(int)
    # All along the outline, on its inner or its outer side.
    assert max(np.abs(drawn[row, 5:15] - grey).min() for row in (4, 5)) > 100


def test_alpha_one_gives_the_legend_colour_itself():
  frame = np.zeros((20, 20, 3), np.uint8)
  np.testing.assert_array_equal(
    overlay(frame, square(value=37), alpha=1.0)[10, 10], legend_colour(37)
  )


def test_ids_are_resized_to_a_frame_that_is_not_square():
  ids = np.zeros((4, 4), np.uint8)
  ids[:, 2:] = 3
  drawn = overlay(np.zeros((30, 60, 3), np.uint8), ids, alpha=1.0)
  assert drawn.shape == (30, 60, 3)
  assert not drawn[:, :29].any()
  np.testing.assert_array_equal(drawn[15, 45], legend_colour(3))


def test_border_between_two_classes_is_drawn():
  ids = np.full((20, 20), 1, np.uint8)
  ids[:, 10:] = 2
  drawn = overlay(np.zeros((20, 20, 3), np.uint8), ids)
  np.testing.assert_array_equal(drawn[10, 9:11], 255)


@pytest.mark.parametrize('value', [0, 255])
def test_background_and_ignored_pixels_are_not_drawn(value):
  frame = np.random.default_rng(0).integers(0, 255, (20, 20, 3)).astype(np.uint8)
  np.testing.assert_array_equal(overlay(frame, square(value=value)), frame)


@pytest.mark.parametrize('mask', [square(value=255), square(value=1) > 0])
def test_binary_overlay_has_one_colour(mask):
  drawn = overlay_binary(np.zeros((20, 20, 3), np.uint8), mask, alpha=1.0)
  np.testing.assert_array_equal(drawn[10, 10], SOUNDING_COLOUR)
  assert not drawn[0].any()

"""Shapes and records that every module shares.

Dimension letters that files share; others are of the file that has them:

  B clips, T frames of a clip, n = B*T frames (the batch axis of the model), s prediction sets,
  q queries, k targets of a frame (padded), c classes, h w image or map size, d hidden size,
  p points, e side of the maps that metrics are computed on.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

Params = Mapping[str, Any]  # a pytree of arrays, as Flax makes it


class Variables(NamedTuple):
  """All numbers of a model."""

  params: Params
  statistics: Params  # {} without; measured in training, not trained: running means of BatchNorm


Batch = Mapping[str, jax.Array]
# Keys of a batch, all with the leading axis n:
#   frames          uint8 [n h w 3]    RGB at the model's input size
#   log_mel         float32 [n 96 64]  VGGish example of the frame's second
#   labels          uint8 [n h w]      class ids (binary stage: 0 or 1), 255 = ignored
#   target_classes  int32 [n k]        label values present in the frame, ascending, -1 = padding
#   prior           uint8 [n e e]      0 to 255: what sounds (stage 2 only); e is data.eval_size
#   weight          float32 [n]        1, or 0 for padding and frames without loss
#   position        int32 [n]          place in the batch of all processes (training)
#   group           int32 [n]          frames of one item have the same (training); < n
# Batches of evaluation have, instead of labels and target_classes,
#   target          uint8 [n e e]      ground truth as the metric of the stage defines it
#   clip, frame     int32 [n]          which clip of the index, which of its frames

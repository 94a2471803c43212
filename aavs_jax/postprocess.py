"""From the final prediction set to score maps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aavs_jax.models.sampling import resize
from aavs_jax.types import Outputs


def class_scores(outputs: Outputs, image_size: int, out_size: int) -> Float[Array, 'n c e e']:
  """score[c] = sum over queries of class probability times mask probability (method: 3.7).

  Masks are resized to the image before the sigmoid, scores to out_size after the sum; both
  bilinear without antialiasing. The argmax over c is the predicted map.
  """
  masks = resize(outputs.mask_logits[-1], (image_size, image_size))
  classes = jax.nn.softmax(outputs.class_logits[-1], -1)[..., :-1]
  scores = jnp.einsum('nqc,nqhw->nchw', classes, jax.nn.sigmoid(masks))
  return resize(scores, (out_size, out_size))

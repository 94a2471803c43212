"""Stochastic depth, as the release has it: on the attention of every block alike, sample by sample.

What the blocks compute without it is compared with the released code in test_model_parity.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from aavs_jax.models.swin import Swin, SwinBlock

DROP, SAMPLES, WIDTH = 0.3, 600, 8
KEEP = 1 - DROP


def _change(params, patterns):
  """Parameters with new values where a path ends in one of the patterns."""
  flat = traverse_util.flatten_dict(params, sep='/')
  for end, value in patterns.items():
    found = [path for path in flat if path.endswith(end)]
    assert found, end
    flat |= {path: jnp.full_like(flat[path], value) for path in found}
  return traverse_util.unflatten_dict(flat, sep='/')


class TestBlock:
  def outputs(self, patterns):
    """Of a block with some of its parameters changed: input, output in evaluation, in training."""
    block = SwinBlock(2, 2, True, 2, DROP, jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((SAMPLES, 2, 2, WIDTH)), jnp.float32)
    params = _change(block.init(jax.random.key(0), x, False)['params'], patterns)
    rngs = {'drop_path': jax.random.key(1)}
    run = jax.jit(
      lambda train: block.apply({'params': params}, x, train, rngs=rngs), static_argnums=0
    )
    return np.array(x), np.array(run(False)), np.array(run(True))

  def test_a_sample_has_all_or_nothing_of_the_attention(self):
    x, whole, training = self.outputs({'fc2/kernel': 0.0})  # so that the MLP adds nothing
    attention, found = whole - x, training - x
    kept = (found != 0).any(axis=(1, 2, 3))
    assert kept.mean() == pytest.approx(KEEP, abs=4 * (KEEP * DROP / SAMPLES) ** 0.5)
    np.testing.assert_array_equal(found[~kept], 0)
    # So its mean over the draws is what evaluation adds.
    np.testing.assert_allclose(found[kept], attention[kept] / KEEP, rtol=1e-4, atol=1e-6)

  def test_the_mlp_is_never_dropped(self):
    x, whole, training = self.outputs({'attention/projection/kernel': 0.0})
    np.testing.assert_allclose(training, whole, rtol=1e-4, atol=1e-5)
    assert (whole != x).any(axis=(1, 2, 3)).all()


@functools.cache
def _kept(blocks, drop_path=DROP, train=True):
  """seed -> which samples [n blocks] keep which blocks of the first stage.

  Block i adds to channel i alone. Four blocks are scanned over, two are not.
  """
  swin = Swin(WIDTH, (blocks, 0, 0, 0), (1, 1, 1, 1), 2, 1, drop_path)
  frames = jnp.zeros((SAMPLES, 8, 8, 3))
  params = jax.jit(lambda key: swin.init(key, frames[:1], False)['params'])(jax.random.key(0))
  params = _change(params, {'fc2/kernel': 0.0, 'attention/projection/kernel': 0.0})
  for i in range(blocks):
    attention = params[f'stage0_block{i}']['attention']
    attention['projection']['bias'] = jax.nn.one_hot(i, WIDTH)
    attention['adapter']['up']['kernel'] *= 0

  @jax.jit
  def run(key):
    first, *_ = swin.apply({'params': params}, frames, train, rngs={'drop_path': key})
    return first[..., :blocks] > first[..., -1:]  # normalised; the last channel was 0

  def of_seed(seed):
    kept = np.array(run(jax.random.key(seed)))
    assert (kept == kept[:, :1, :1]).all()  # everywhere alike
    return kept[:, 0, 0]

  return of_seed


@pytest.mark.parametrize('blocks', [2, 4])
def test_every_block_draws_for_itself_at_the_same_rate(blocks):
  kept = _kept(blocks)(1)
  np.testing.assert_allclose(kept.mean(axis=0), KEEP, atol=4 * (KEEP * DROP / SAMPLES) ** 0.5)
  together = np.corrcoef(kept.T) - np.eye(blocks)
  assert np.abs(together).max() < 4 / SAMPLES**0.5
  np.testing.assert_array_equal(_kept(blocks)(1), kept)
  assert (_kept(blocks)(2) != kept).any(axis=0).all()


def test_nothing_is_dropped_in_evaluation_or_at_a_rate_of_0():
  assert _kept(4, train=False)(1).all()
  assert _kept(4, drop_path=0.0)(1).all()

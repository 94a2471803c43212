"""Stochastic depth, as the release has it: on the attention of every block alike, sample by sample.

What the blocks compute without it is compared with the released code in test_model_parity.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from aavs_jax.models import swin
from aavs_jax.models.swin import Swin, SwinBlock

DROP, SAMPLES, WIDTH = 0.3, 400, 8
KEEP = 1 - DROP


class TestBlock:
  @pytest.fixture(scope='class')
  def run(self):
    """Of a block without one of its kernels: input, output in evaluation, output in training."""
    block = SwinBlock(2, 2, True, 2, DROP, jnp.float32)
    x = jnp.asarray(
      np.random.default_rng(0).standard_normal((SAMPLES, 1, 1, 4, WIDTH)), jnp.float32
    )
    params = jax.jit(lambda key: block.init(key, x, 2, 2, False)['params'])(jax.random.key(0))

    @functools.partial(jax.jit, static_argnums=1)
    def apply(params, train):
      return block.apply({'params': params}, x, 2, 2, train, rngs={'drop_path': jax.random.key(1)})

    def outputs(without):
      flat = traverse_util.flatten_dict(params, sep='/')
      flat[without] *= 0
      changed = traverse_util.unflatten_dict(flat, sep='/')
      return np.array(x), np.array(apply(changed, False)), np.array(apply(changed, True))

    return outputs

  def test_a_sample_has_all_or_nothing_of_the_attention(self, run):
    x, whole, training = run(without='fc2/kernel')  # so that the MLP adds nothing
    attention, found = whole - x, training - x
    kept = (found != 0).any(axis=(1, 2, 3, 4))
    assert kept.mean() == pytest.approx(KEEP, abs=4 * (KEEP * DROP / SAMPLES) ** 0.5)
    np.testing.assert_array_equal(found[~kept], 0)
    # So its mean over the draws is what evaluation adds.
    np.testing.assert_allclose(found[kept], attention[kept] / KEEP, rtol=1e-4, atol=1e-6)

  def test_the_mlp_is_never_dropped(self, run):
    x, whole, training = run(without='attention/projection/kernel')
    np.testing.assert_allclose(training, whole, rtol=1e-4, atol=1e-5)
    assert (whole != x).any(axis=(1, 2, 3, 4)).all()


@functools.cache
def _kept(blocks, train=True):
  """seed -> which samples [n blocks] keep which blocks of the first stage.

  Block i adds to channel i alone. Four blocks are scanned over, two are not.
  """
  swin = Swin(WIDTH, (blocks, 0, 0, 0), (1, 1, 1, 1), 2, 1, DROP)
  frames = jnp.zeros((SAMPLES, 8, 8, 3))
  init = functools.partial(swin.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), frames)['params']
  params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
  params['stage0_norm']['scale'] += 1
  for i in range(blocks):
    params[f'stage0_block{i}']['attention']['projection']['bias'] = jax.nn.one_hot(i, WIDTH)

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


@pytest.mark.parametrize(('dtype', 'error'), [('float32', 1e-6), ('bfloat16', 8e-3)])
def test_scores_have_the_same_gradients_in_both_forms(dtype, error):
  """That of TPUs never runs here otherwise."""
  rng = np.random.default_rng(0)
  query, key = (jnp.asarray(rng.standard_normal((2, 3, 4, 2, 8)), dtype) for _ in range(2))
  g = jnp.asarray(rng.standard_normal((2, 3, 2, 4, 4)), jnp.float32)

  def plain(query, key):
    return jnp.einsum('nvqhc,nvkhc->nvhqk', query, key) * 8**-0.5

  exact = [array.astype(jnp.float32) for array in (query, key)]
  scores, pull = jax.vjp(plain, *exact)
  found, pull_found = jax.vjp(swin.scaled_scores, query, key)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, scores, rtol=error, atol=2 * error)
  scaled = g * 8**-0.5
  for gradients in (
    pull_found(g),
    swin._by_float32_scores(scaled, query, key),
    swin._by_scores_as_queries(scaled, query, key),
  ):
    for gradient, wanted in zip(gradients, pull(g)):
      assert gradient.dtype == dtype
      np.testing.assert_allclose(gradient.astype(jnp.float32), wanted, rtol=error, atol=2 * error)


def test_nothing_is_dropped_in_evaluation():
  assert _kept(4, train=False)(1).all()


@pytest.mark.parametrize(('window', 'height', 'width'), [(4, 8, 12), (5, 10, 15), (3, 7, 4)])
def test_shifted_windows_are_those_of_the_rolled_map(window, height, width):
  x = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)
  windows = swin.partition(x, window)
  np.testing.assert_array_equal(swin.unite(windows, window, height, width), x)

  padded = np.pad(x, ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
  rolled = np.roll(padded, (-(window // 2),) * 2, (1, 2))
  n, rows, columns, length, _ = windows.shape
  plain = rolled.reshape(n, rows, window, columns, window, 3).transpose(0, 1, 3, 2, 4, 5)
  plain = plain.reshape(n, rows, columns, length, 3)
  moved = swin.shifted(windows, window)
  np.testing.assert_array_equal(moved, plain[..., swin.quarters(window, -(-window // 2)), :])
  np.testing.assert_array_equal(swin.shifted_back(moved, window), windows)

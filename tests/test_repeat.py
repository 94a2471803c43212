"""Scanned layers are the same function as the layers one after the other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aavs_jax.models.repeat import REMAT_POLICIES, run_layers

LAYERS, PERIOD = 6, 2


class Layer(nn.Module):
  """One of two kinds; returns its input scaled as well, and may draw."""

  kind: int
  noisy: bool

  @nn.compact
  def __call__(self, x):
    h = nn.tanh(nn.Dense(x.shape[-1], name='dense')(x))
    if self.noisy:
      h = h * jax.random.bernoulli(self.make_rng('noise'), 0.5, x.shape[:1])[:, None]
    return (x + h, h.sum()) if self.kind == 0 else (x * h, h.mean())


class Stack(nn.Module):
  remat: str
  noisy: bool = False
  period: int = PERIOD

  @nn.compact
  def __call__(self, x):
    return run_layers(
      self,
      [lambda i=i, **kwargs: Layer(i % PERIOD, self.noisy, **kwargs) for i in range(LAYERS)],
      [f'layer{i}' for i in range(LAYERS)],
      lambda layer, kind, x: layer(x),
      x,
      period=self.period,
      remat=self.remat,
      rng='noise' if self.noisy else None,
    )


X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)


def one_by_one(params, x):
  outputs = []
  for i in range(LAYERS):
    x, output = Layer(i % PERIOD, False).apply({'params': params[f'layer{i}']}, x)
    outputs.append(output)
  return x, outputs


@pytest.mark.parametrize('remat', REMAT_POLICIES)
def test_values_and_gradients_are_those_of_the_layers(remat):
  params = Stack(remat).init(jax.random.key(1), X)['params']
  assert sorted(params) == [f'layer{i}' for i in range(LAYERS)]

  def total(run):
    def loss(params):
      x, outputs = run(params, X)
      return jnp.sum(x**2) + sum((i + 1) * output for i, output in enumerate(outputs))

    return jax.value_and_grad(loss)(params)

  value, gradient = total(lambda params, x: Stack(remat).apply({'params': params}, x))
  wanted, wanted_gradient = total(one_by_one)
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, wanted_gradient
  )


def test_layers_that_do_not_repeat_keep_nothing_where_all_is_computed_again(capsys):
  def kept(remat):
    stack = Stack(remat, period=LAYERS)
    params = stack.init(jax.random.key(1), X)['params']
    jax.ad_checkpoint.print_saved_residuals(
      lambda params: stack.apply({'params': params}, X)[0].sum(), params
    )
    lines = capsys.readouterr().out.splitlines()
    return sum('from the argument' not in line for line in lines)

  assert kept('none') == kept('dots') > kept('full') == LAYERS  # what goes into each


def test_every_layer_draws_its_own_numbers():
  stack = Stack('dots', noisy=True)
  rngs = {'params': jax.random.key(0), 'noise': jax.random.key(1)}
  params = stack.init(rngs, X)['params']
  ones = jax.tree.map(jnp.ones_like, params)  # then an output tells how many rows were kept
  many = jnp.ones((64, 4))

  def outputs(seed):
    run = stack.apply({'params': ones}, many, rngs={'noise': jax.random.key(seed)})
    return np.array(run[1])[::PERIOD]

  assert len(set(outputs(2).tolist())) == LAYERS // PERIOD
  np.testing.assert_array_equal(outputs(2), outputs(2))
  assert (outputs(2) != outputs(3)).any()

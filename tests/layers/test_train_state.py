"""The Linen train state against a loop by hand."""

import functools

from flax import linen
import jax
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from optax_ranger import layers

X = np.random.default_rng(0).standard_normal([8, 3]).astype(np.float32)


@functools.cache
def dense():
  model = linen.Dense(2)
  return model.apply, jax.jit(model.init)(jax.random.key(0), X)


def start(tx):
  apply, params = dense()
  return layers.TrainState.create(apply_fn=apply, params=params, tx=tx)


@jax.jit
def gradient(params):
  apply, _ = dense()
  return jax.grad(lambda params: (apply(params, X) ** 2).mean())(params)


def predictions(call):
  drawn = np.random.default_rng(call).uniform(size=[3, 4]).astype(np.float32)
  return {
    "predictions": drawn / drawn.sum(axis=1, keepdims=True),
    "example_ids": np.arange(3, dtype=np.int32),
  }


CASES = {
  "weight": (
    lambda: ranger.accumulate(optax.sgd(0.1), 2),
    lambda call: {"weight": np.float32(1 + call)},
  ),
  "value": (
    lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    lambda call: {"value": np.float32(1)},
  ),
  "predictions": (
    lambda: optax.chain(ranger.smooth_predictions(3, 4), optax.sgd(0.1)),
    predictions,
  ),
  "none": (lambda: optax.sgd(0.1), lambda call: {}),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", CASES)
def test_extra_args_reach_the_optimizer(name):
  make, extra = CASES[name]
  tx = make()
  with jax.numpy_dtype_promotion("standard"):
    state = start(tx)
    params, opt_state = state.params, state.opt_state
    step = jax.jit(
      lambda state, extra: state.apply_gradients(grads=gradient(state.params), **extra)
    )

    @jax.jit
    def by_hand(params, opt_state, extra):
      updates, opt_state = tx.update(gradient(params), opt_state, params, **extra)
      return optax.apply_updates(params, updates), opt_state

    for call in range(5):  # A window is open at the end.
      params, opt_state = by_hand(params, opt_state, extra(call))
      state = step(state, extra(call))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
  jax.tree.map(close, (state.params, state.opt_state), (params, opt_state))
  assert int(state.step) == 5
  assert state.tx is tx


def test_fields_are_replaced_as_flax_does():
  state = start(optax.sgd(0.1))
  after = state.apply_gradients(grads=gradient(state.params), apply_fn=None)
  assert after.apply_fn is None
  assert after.tx is state.tx


def test_another_optimizer_takes_its_place():
  state = layers.TrainState.create(
    apply_fn=None, params={"w": np.ones([], np.float32)}, tx=optax.sgd(1.0)
  )
  other = optax.sgd(0.5)
  grads = {"w": np.ones([], np.float32)}
  assert state.apply_gradients(grads=grads, tx=other).tx is other
  assert state.apply_gradients(grads=grads).tx is state.tx

"""Windows of `accumulate` that close early: each is one batch of all its examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from tests.helpers import close_to_largest

_RNG = np.random.default_rng(0)
X = _RNG.standard_normal([40, 3]).astype(np.float32)
Y = _RNG.standard_normal([40]).astype(np.float32)
# Rows of each micro-batch in two epochs. Every third one closes a window, and so does
# the end of an epoch: after one micro-batch, and after two.
EPOCHS = [[4, 1, 5, 3], [2, 6, 3, 7, 1]]
WINDOWS = [10, 3, 11, 8]


def mean_loss(params, x, y):
  return ((jnp.tanh(x @ params["w"]) - y) ** 2).mean()


def parts(sizes):
  ends = np.cumsum(sizes)
  return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def start():
  return {"w": np.array([0.5, -1.0, 2.0], np.float32)}


def on_whole_windows(inner, reduce):
  """One step of the inner optimizer on all examples of each window."""

  @jax.jit
  def update(params, state, x, y):
    # The sum is the mean times the examples of the window.
    count = len(x) if reduce == "sum" else 1
    grads = jax.grad(lambda *args: count * mean_loss(*args))(params, x, y)
    updates, state = inner.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params, found = start(), []
  state = inner.init(params)
  for rows in parts(WINDOWS):
    params, state = update(params, state, X[rows], Y[rows])
    found.append(params)
  return found


@pytest.mark.parametrize("every", [3, lambda count: 3 + 0 * count], ids=["3", "traced"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_window_that_closes_early_is_one_batch(reduce, every):
  """At the end of an epoch, with uneven micro-batches and momentum."""
  inner = optax.sgd(0.01, momentum=0.9)
  step = ranger.accumulate(inner, every, reduce=reduce)

  @jax.jit
  def update(params, state, x, y, last):
    grads = jax.grad(mean_loss)(params, x, y)
    updates, state = step.update(grads, state, params, weight=len(x), last=last)
    return optax.apply_updates(params, updates), state

  params, found = start(), []
  state = step.init(params)
  sizes = [size for epoch in EPOCHS for size in epoch]
  ends = np.cumsum([len(epoch) for epoch in EPOCHS]) - 1
  for call, rows in enumerate(parts(sizes)):
    params, state = update(params, state, X[rows], Y[rows], call in ends)
    if int(state.gradient_step) > len(found):
      found.append(params)
      assert int(state.mini_step) == float(state.weight_sum) == 0
  close_to_largest(found, on_whole_windows(inner, reduce), rtol=1e-6)

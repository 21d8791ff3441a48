"""Published examples: linear regression on five points, and a small CNN."""

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [0.02, 0.03, 0.04])
def test_line_through_five_points(learning_rate):
  """Y = 2 x from x = 1 to 5 falls below 1e-6 within 100 iterations.

  The sources' rate 0.1 diverges with plain gradient descent, whose limit here is
  0.085 (two over the largest curvature); these rates are taken instead, with
  acceleration.
  """
  x = jnp.arange(1.0, 6.0)
  losses = lambda params, batch: (params["w"] * batch + params["b"] - 2 * batch) ** 2
  tx = ranger.ranger(
    learning_rate,
    momentum=0.8,
    acceleration=1.0,
    hyper_rate=0.01,
    bounds=(0.5, 2.0),
  )
  grad_fn = ranger.value_and_grad(losses, ranger.ranger_head())
  neighbors = ranger.neighbors.nearest(x[:, None], k=2)
  params = {"w": jnp.float32(0), "b": jnp.float32(0)}

  @jax.jit
  def step(params, state):
    _, grads = grad_fn(params, x, neighbors=neighbors)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in range(100):
    params, state = step(params, state)
  assert losses(params, x).mean() < 1e-6


@jax.jit
def train(rates, momentum):
  """The losses after 300 steps from each rate."""
  x = jnp.arange(1.0, 6.0)
  loss = lambda params: ((params[0] * x + params[1] - 2 * x) ** 2).mean()

  @jax.vmap
  def train_at(rate):
    tx = ranger.ranger(rate, momentum=momentum)

    def step(carry, _):
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params), state, params)
      return (optax.apply_updates(params, updates), state), None

    start = jnp.zeros([2])
    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=300)
    return loss(params)

  return train_at(rates)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.7, 0.8, 0.9])
def test_line_through_five_points_at_any_rate(momentum):
  """No starting rate of five decades diverges, whatever the momentum."""
  rates = np.array([1e-5, 1e-4, 1e-3, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0], np.float32)
  assert (np.asarray(train(rates, momentum)) < 1e-3).all()


def test_geometric_restarts_as_published():
  schedule = ranger.geometric_restart_schedule(0.3, 0.4, period=7)
  steps = np.arange(30)
  expected = [0.3 * (0.3 / 0.4) ** (t // 7) for t in steps]
  np.testing.assert_allclose([schedule(int(t)) for t in steps], expected, rtol=1e-6)
  jitted = jax.jit(chex.assert_max_traces(schedule, 1))
  np.testing.assert_allclose([jitted(t) for t in steps], expected, rtol=1e-6)
  np.testing.assert_allclose(jax.vmap(schedule)(steps), expected, rtol=1e-6)
  assert schedule(jnp.int32(2**31 - 1)) == 0


def test_geometric_restarts_are_swept_without_recompiling():
  @jax.jit
  @chex.assert_max_traces(1)
  def rate(initial, maximum, period, count):
    return ranger.geometric_restart_schedule(initial, maximum, period)(count)

  assert rate(0.5, 1.0, 4, 3) == 0.5
  assert rate(0.5, 1.0, 3, 3) == 0.25
  assert rate(0.5, 0.5, 3, 100) == 0.5


class Cnn(nnx.Module):
  def __init__(self, *, rngs: nnx.Rngs):
    self.conv = nnx.Conv(1, 32, (3, 3), rngs=rngs)
    self.dense = nnx.Linear(14 * 14 * 32, 10, rngs=rngs)

  def __call__(self, x):
    x = nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), strides=(2, 2))
    return self.dense(x.reshape(x.shape[0], -1))


@pytest.mark.slow
def test_small_cnn_falls_below_the_published_loss():
  """Conv 32, pool, dense 10; rate 0.001, momentum 0.9: below 0.2298 by epoch three."""
  rng = np.random.default_rng(0)
  templates = rng.uniform(0, 1, [10, 28, 28, 1])
  labels = np.tile(np.arange(10), 64)
  images = templates[labels] + 0.3 * rng.standard_normal([640, 28, 28, 1])
  images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
  model = Cnn(rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model, nnx.Param)
  tx = ranger.ranger(1e-3, momentum=0.9, acceleration=1.0)

  def losses(params, batch):
    logits = nnx.merge(graphdef, params)(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

  grad_fn = ranger.value_and_grad(losses, ranger.aggregate_by_mean())

  def step(carry, ids):
    params, state = carry
    value, grads = grad_fn(params, {"image": images[ids], "label": labels[ids]})
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value.mean()

  epoch = jax.jit(lambda carry, order: jax.lax.scan(step, carry, order))
  carry = params, tx.init(params)
  for _ in range(3):
    order = rng.permutation(640).reshape(-1, 32)
    carry, means = epoch(carry, order)
  assert means.mean() < 0.2298

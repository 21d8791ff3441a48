"""Step 3 against an oracle in NumPy and Nesterov SGD, and its guarantees."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger


def draw(count, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal([count, 5]).astype(np.float32)


def run(step, gradients):
  state, results, factors = step.init(jnp.zeros([5])), [], []
  update = jax.jit(step.update)
  for gradient in gradients:
    updates, state = update(jnp.asarray(gradient), state)
    results.append(updates)
    factors.append(float(optax.tree.get(state, "acceleration")))
  return np.stack(results), np.array(factors)


def test_ngs_equals_numpy():
  gradients = draw(30)
  results, factors = run(
    ranger.scale_by_ngs(0.8, acceleration=0.99, hyper_rate=0.3, bounds=(0.9, 1.4)),
    gradients,
  )
  a, m = 0.99, np.zeros(5)
  for g, result, factor in zip(gradients.astype(float), results, factors, strict=True):
    norms = np.linalg.norm(g) * np.linalg.norm(m)
    a = np.clip(a * np.exp(0.3 * (g @ m / norms if norms else 0)), 0.9, 1.4)
    m = 0.8 * m + g
    np.testing.assert_allclose(factor, a, rtol=1e-5)
    np.testing.assert_allclose(result, a * (g + 0.8 * m), rtol=1e-4, atol=1e-5)
  assert factors.min() < 0.95
  assert factors.max() > 1.3


@pytest.mark.parametrize("acceleration", [1.0, 0.25])
def test_no_hyper_rate_is_nesterov_sgd(acceleration):
  step = ranger.scale_by_ngs(0.9, acceleration=acceleration, hyper_rate=0.0)
  gradients = draw(20)
  results, _ = run(step, gradients)
  sgd = optax.trace(decay=0.9, nesterov=True)
  state = sgd.init(jnp.zeros([5]))
  for gradient, result in zip(gradients, results, strict=True):
    expected, state = jax.jit(sgd.update)(jnp.asarray(gradient), state)
    np.testing.assert_array_equal(result, acceleration * expected)


@settings(max_examples=20, deadline=None)
@given(
  st.lists(
    st.sampled_from([0.0, 1.0, -1.0, 1e30, -1e-30, np.nan, np.inf]),
    min_size=5,
    max_size=20,
  )
)
def test_acceleration_stays_within_bounds(values):
  step = ranger.scale_by_ngs(0.9, hyper_rate=1.0, bounds=(0.5, 2.0))
  results, factors = run(step, [np.full(5, v, np.float32) for v in values])
  assert np.isfinite(results).all()
  assert (factors >= 0.5).all()
  assert (factors <= 2.0).all()


def test_acceleration_is_scale_free():
  gradients = draw(20)
  _, factors = run(ranger.scale_by_ngs(), gradients)
  _, scaled = run(ranger.scale_by_ngs(), 1024 * gradients)
  np.testing.assert_allclose(scaled, factors, rtol=1e-6)


def test_factors_are_swept_without_recompiling():
  traces = []

  @jax.jit
  def one(hyper_rate, gradients):
    traces.append(1)
    step = ranger.scale_by_ngs(hyper_rate=hyper_rate)
    body = lambda state, g: step.update(g, state)[::-1]
    return jax.lax.scan(body, step.init(gradients[0]), gradients)[0].acceleration

  gradients = jnp.asarray(np.abs(draw(10)))
  factors = [float(one(rate, gradients)) for rate in (0.0, 0.1, 0.2)]
  assert len(traces) == 1
  assert factors[0] == 1.0
  assert factors == sorted(factors)
  swept = jax.vmap(one, in_axes=(0, None))(jnp.array([0.0, 0.1, 0.2]), gradients)
  np.testing.assert_allclose(swept, factors, rtol=1e-5)


def test_acceleration_finds_a_rate_decades_too_small():
  """On a quadratic, a rate 100 times too small still converges."""
  curvature = jnp.array([1.0, 3.0, 10.0])

  def train(step):
    tx = optax.chain(step, optax.scale(-1e-4))
    params = jnp.ones([3])

    def body(carry, _):
      params, state = carry
      updates, state = tx.update(curvature * params, state, params)
      return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), length=300)
    return float((curvature * params**2).sum())

  plain = train(optax.trace(0.9, nesterov=True))
  accelerated = train(ranger.scale_by_ngs())
  assert plain > 1
  assert accelerated < 1e-6


def test_float16_does_not_overflow():
  step = ranger.scale_by_ngs(0.9)
  state = step.init(jnp.zeros([3], jnp.float16))
  for value in (3e4, 3e4, 3e4, 1.0, 1.0):
    updates, state = step.update(jnp.full([3], value, jnp.float16), state)
    assert np.isfinite(updates).all()
    assert np.isfinite(state.momentum).all()
  assert int(state.num_skipped) == 0

"""Step 1 against oracles in NumPy, and its guarantees."""

import functools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from tests.laws import registry


def oracle(gradients, neighbors, include_self=True, normalize="batch", member=None):
  """g'_i = s_i g_i + sum_j w_ij g_j, in plain loops."""
  n, k = neighbors.indices.shape
  member = np.ones(n) if member is None else np.asarray(member, float)
  gradients = np.asarray(gradients, float)
  result, rows = np.zeros_like(gradients), np.zeros(n)
  for i in range(n):
    for j in range(k):
      other, weight = int(neighbors.indices[i, j]), float(neighbors.weights[i, j])
      if other < 0 or member[i] == 0 or member[other] == 0:
        continue
      result[i] += weight * (gradients[other] + include_self * gradients[i])
      rows[i] += weight * (1 + include_self)
  if normalize == "batch":
    total = (member * rows).sum()
    result *= member.sum() / total if total > 0 else 0
  elif normalize == "graph":
    result /= 0.7 * (1 + include_self)
  return result


@pytest.mark.parametrize(
  ("include_self", "normalize"),
  [(self, over) for over in ("batch", "graph", None) for self in (True, False)],
)
@pytest.mark.parametrize("absent", [False, True])
def test_average_neighbors_equals_a_loop(include_self, normalize, absent):
  gradients = np.random.default_rng(0).standard_normal([6, 4]).astype(np.float32)
  neighbors = registry.neighbors(3)
  indices = np.array(neighbors.indices)
  indices[2, 1] = -1
  neighbors = neighbors._replace(indices=indices)
  member = np.array([1.0, 2.0, 0.0, 1.0, 1.0, 0.5], np.float32) if absent else None
  step = ranger.average_neighbors(include_self=include_self, normalize=normalize)
  averaged, _ = jax.jit(step.update)(
    gradients,
    step.init({}),
    neighbors=neighbors,
    graph_weight=0.7,
    member_weights=member,
  )
  expected = oracle(gradients, neighbors, include_self, normalize, member)
  np.testing.assert_allclose(averaged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.guarantees(
  "average_neighbors", "If all other examples are neighbors of equal weight, then"
)
def test_complete_uniform_neighbors_are_the_mean():
  rng = np.random.default_rng(1)
  features = rng.standard_normal([7, 2]).astype(np.float32)
  neighbors = ranger.neighbors.nearest(features, k=6)
  gradients = rng.standard_normal([7, 3]).astype(np.float32)
  head = ranger.ranger_head()
  mean, _ = jax.jit(head.update)(gradients, head.init({}), neighbors=neighbors)
  np.testing.assert_allclose(mean, gradients.mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.guarantees(
  "average_neighbors", "Permuting the examples permutes the result"
)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), size=st.sampled_from([(2, 1), (5, 4), (9, 3)]))
def test_average_neighbors_permutes(seed, size):
  n, k = size
  rng = np.random.default_rng(seed)
  features = rng.standard_normal([n, 3]).astype(np.float32)
  gradients = rng.standard_normal([n, 2]).astype(np.float32)
  order = rng.permutation(n)
  np.testing.assert_allclose(
    average(features[order], gradients[order], k),
    np.asarray(average(features, gradients, k))[order],
    rtol=1e-4,
    atol=1e-5,
  )


@functools.partial(jax.jit, static_argnums=2)
def average(features, gradients, k):
  found = ranger.neighbors.nearest(features, k)
  neighbors = ranger.neighbors.weigh(found, kernel="inverse_distance")
  step = ranger.average_neighbors()
  return step.update(gradients, step.init({}), neighbors=neighbors)[0]


@pytest.mark.guarantees(
  "average_neighbors", "A non-finite example, or one of weight zero, is no"
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("by_weight", [True, False])
def test_absent_examples_average_nothing(value, by_weight):
  gradients = np.ones([6, 4], np.float32)
  gradients[2, 3] = value
  neighbors = registry.neighbors()
  member = (np.arange(6) != 2).astype(np.float32) if by_weight else None
  step = ranger.average_neighbors(normalize=None)
  averaged, state = jax.jit(step.update)(
    gradients, step.init({}), neighbors=neighbors, member_weights=member
  )
  alive = np.asarray(neighbors.indices) != 2
  expected = 2 * (np.asarray(neighbors.weights) * alive).sum(axis=1)
  expected[2] = 0
  np.testing.assert_allclose(averaged, np.tile(expected[:, None], 4), rtol=1e-5)
  assert int(state.num_dropped) == (not by_weight)


@pytest.mark.guarantees("average_neighbors", "A total weight of zero gives zeros")
def test_zero_total_weight_is_zero():
  neighbors = registry.neighbors()._replace(weights=np.zeros([6, 2], np.float32))
  for normalize in ("batch", None):
    step = ranger.average_neighbors(normalize=normalize)
    averaged, _ = jax.jit(step.update)(
      np.ones([6, 4], np.float32), step.init({}), neighbors=neighbors
    )
    assert not np.asarray(averaged).any()


@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0])
def test_unusable_neighbor_weights_are_zero(weight):
  neighbors = registry.neighbors()
  broken = neighbors._replace(weights=neighbors.weights.at[1, 0].set(weight))
  empty = neighbors._replace(weights=neighbors.weights.at[1, 0].set(0))
  step = ranger.average_neighbors()
  gradients = registry.gradients(registry.CASES[0], 0, jnp.zeros([4]))
  update = jax.jit(step.update)
  averaged, _ = update(gradients, step.init({}), neighbors=broken)
  expected, _ = update(gradients, step.init({}), neighbors=empty)
  np.testing.assert_array_equal(averaged, expected)


def test_worked_example_of_the_sources():
  """Linear model, eta 0.1, m = 4, k = 3, w = 1/3: residuals are minus gradients."""
  x = np.array([1.0, 2.0, 3.0, 4.0])
  y = np.array([2.0, 3.0, 5.0, 4.0])
  # At (w0, w1) = (0, 1) the residuals y - w0 - w1 x are 1, 1, 2, 0.
  residuals = np.array([1.0, 1.0, 2.0, 0.0])
  np.testing.assert_allclose(y - 0 - 1 * x, residuals)
  gradients = {
    "w0": -residuals.astype(np.float32),
    "w1": -(residuals * x).astype(np.float32),
  }
  neighbors = ranger.neighbors.nearest(x[:, None], k=3)
  step = ranger.average_neighbors(include_self=False, normalize=None)
  averaged, _ = jax.jit(step.update)(gradients, step.init({}), neighbors=neighbors)
  # g'_1 = 1/3 (r_2 + r_3 + r_4) = 1, as printed; ours has the other sign.
  np.testing.assert_allclose(averaged["w0"], [-1, -1, -2 / 3, -4 / 3], rtol=1e-6)
  # r x is 1, 2, 6, 0.
  np.testing.assert_allclose(averaged["w1"], [-8 / 3, -7 / 3, -1, -3], rtol=1e-6)
  tx = optax.chain(step, ranger.aggregate_by_mean(), optax.sgd(0.1))
  params = {"w0": np.float32(0), "w1": np.float32(1)}
  updates, _ = jax.jit(tx.update)(
    gradients, tx.init(params), params, neighbors=neighbors
  )
  moved = optax.apply_updates(params, updates)
  # 0 + 0.1 (1 + 1 + 2/3 + 4/3) / 4 and 1 + 0.1 (8/3 + 7/3 + 1 + 3) / 4.
  np.testing.assert_allclose(moved["w0"], 0.1, rtol=1e-6)
  np.testing.assert_allclose(moved["w1"], 1.225, rtol=1e-6)

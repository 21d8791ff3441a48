"""Mixing of nearest members, against NumPy, and where it helps."""

import jax
import numpy as np
import pytest

import optax_ranger as ranger
from tests.helpers import close

INNER = {
  "mean": ranger.aggregate_by_mean(),
  "median": ranger.aggregate_by_median(),
  "krum": ranger.aggregate_by_krum(2),
  "geometric": ranger.aggregate_by_geometric_median(),
}


def draw(n=9, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return {"a": normal(n, 3, 2), "b": normal(n)}


def mixed(tree, num_corrupt, there):
  leaves = [np.asarray(leaf, float).reshape(len(leaf), -1) for leaf in tree.values()]
  rows = np.concatenate(leaves, axis=1)
  squared = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
  squared[:, ~there] = np.inf
  nearest = np.argsort(squared, axis=1)[:, : there.sum() - num_corrupt]
  return jax.tree.map(lambda leaf: leaf[nearest].mean(axis=1), tree)


@pytest.mark.parametrize("name", sorted(INNER))
@pytest.mark.parametrize("num_corrupt", [1, 3])
def test_it_is_the_inner_one_on_means(name, num_corrupt):
  tree, inner = draw(), INNER[name]
  there = np.arange(9) != 4
  weights = there.astype(np.float32)
  step = ranger.mix_nearest(inner, num_corrupt)
  found, _ = jax.jit(step.update)(tree, step.init(tree), member_weights=weights)
  means = mixed(tree, num_corrupt, there)
  expected, _ = jax.jit(inner.update)(means, inner.init(means), member_weights=weights)
  close(found, expected, atol=1e-4)


@pytest.mark.guarantees("mix_nearest", "num_corrupt=0 gives all members their mean")
def test_with_none_corrupt_all_are_the_mean():
  tree = draw()
  step = ranger.mix_nearest(ranger.aggregate_by_median(), 0)
  found, _ = jax.jit(step.update)(tree, step.init(tree))
  close(found, jax.tree.map(lambda leaf: leaf.mean(axis=0), tree), atol=1e-6)


@pytest.mark.guarantees("mix_nearest", "A non-finite member is left out before")
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_bad_member_is_left_out(bad):
  tree = draw()
  there = np.arange(9) != 2
  step = ranger.mix_nearest(ranger.aggregate_by_median(), 2)
  wrong = {**tree, "b": np.where(there, tree["b"], np.float32(bad))}
  update = jax.jit(step.update)
  found, state = update(wrong, step.init(wrong))
  expected, _ = update(tree, step.init(tree), member_weights=there.astype(np.float32))
  close(found, expected, atol=1e-6)
  assert int(state.num_dropped) == 1


@pytest.mark.guarantees("mix_nearest", "Permuting the members changes nothing")
def test_the_order_does_not_matter():
  tree, order = draw(), np.random.default_rng(1).permutation(9)
  step = ranger.mix_nearest(ranger.aggregate_by_krum(2), 2)
  results = [
    jax.jit(step.update)(rows, step.init(rows))[0]
    for rows in (tree, jax.tree.map(lambda leaf: leaf[order], tree))
  ]
  close(*results, atol=1e-5)


def test_it_rescues_krum_from_members_that_differ():
  """Members of two kinds, a few corrupt: Krum takes one kind, mixed ones both."""
  rng = np.random.default_rng(0)
  kinds = np.repeat([[3.0], [-3.0]], 6, axis=0) * np.eye(1, 8)
  honest = kinds + 0.3 * rng.standard_normal([12, 8])
  rows = np.concatenate([honest, np.full([2, 8], 20.0)]).astype(np.float32)
  error = lambda step: np.linalg.norm(
    jax.jit(step.update)(rows, step.init(rows))[0] - honest.mean(axis=0)
  )
  krum = ranger.aggregate_by_krum(2)
  assert error(krum) > 2.5
  assert error(ranger.mix_nearest(krum, 2)) < 1.2

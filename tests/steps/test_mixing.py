"""Mixing of nearest members, against NumPy, and where it helps."""

import jax
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from tests.helpers import close

INNER = {
  "mean": ranger.aggregate_by_mean(),
  "median": ranger.aggregate_by_median(),
  "krum": ranger.aggregate_by_krum(2),
  "geometric": ranger.aggregate_by_geometric_median(),
  "regions": ranger.aggregate_by_regions(3),
}


MIXED_MEDIAN = ranger.mix_nearest(INNER["median"], 2)


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
  # Weights and other arguments are those of the inner one.
  weights = np.where(there, 1 + np.arange(9) % 3, 0).astype(np.float32)
  extra = {"member_weights": weights, "regions": np.arange(9) % 3}
  step = ranger.mix_nearest(inner, num_corrupt)
  found, _ = jax.jit(step.update)(tree, step.init(tree), **extra)
  means = mixed(tree, num_corrupt, there)
  expected, _ = jax.jit(inner.update)(means, inner.init(means), **extra)
  close(found, expected, atol=1e-4)


def test_norms_of_the_members_are_not_those_of_the_mixed():
  chain = optax.chain(ranger.clip_examples(0.5), ranger.aggregate_by_mean())
  tree, step = draw(), ranger.mix_nearest(chain, 1)
  update, state = jax.jit(step.update), step.init(draw())
  found, _ = update(tree, state, norms=np.zeros(9, np.float32))
  expected, _ = update(tree, state)
  close(found, expected, atol=1e-6)


def test_with_few_members_left_each_is_itself():
  tree, there = draw(), np.isin(np.arange(9), [2, 5])
  step = ranger.mix_nearest(ranger.aggregate_by_mean(), 3)
  extra = {"member_weights": there.astype(np.float32), "num_dropped": np.int32(7)}
  found, state = jax.jit(step.update)(tree, step.init(tree), **extra)
  close(found, jax.tree.map(lambda leaf: leaf[there].mean(axis=0), tree), atol=1e-6)
  assert int(state.num_dropped) == 7  # Counted by the caller.


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
  wrong = {**tree, "b": np.where(there, tree["b"], np.float32(bad))}
  step, update = MIXED_MEDIAN, jax.jit(MIXED_MEDIAN.update)
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

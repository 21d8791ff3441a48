"""New rows among the rows of a data set, against a full sort."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ranger as ranger
from optax_ranger import graph
from tests.graph import graphs
from tests.graph.test_precision import WIDE
from tests.graph.test_precision import exact_sort


def full_sort(features, queries, k, metric):
  """As `graphs.full_sort`, of the queries among the features alone."""
  n, both = len(features), np.concatenate([features, queries])
  distances, indices = graphs.full_sort(both, len(both) - 1, metric)
  found = []
  for row in range(n, len(both)):
    usable = (indices[row] >= 0) & (indices[row] < n)
    some = np.full(k, -1), np.full(k, np.inf)
    places = np.flatnonzero(usable)[:k]
    some[0][: len(places)] = indices[row][places]
    some[1][: len(places)] = distances[row][places]
    found.append(some)
  indices, distances = (np.stack(part) for part in zip(*found, strict=True))
  return indices, distances


@pytest.mark.guarantees("graph.query", "It equals a full sort, in exact numbers too")
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", ["normal", "integers", "clusters"])
def test_queries_equal_a_full_sort(name, metric):
  rows = graphs.data()[name]
  features, queries = rows[:300], rows[300:]
  found = graph.query(features, queries, 5, metric=metric)
  indices, distances = full_sort(features, queries, 5, metric)
  np.testing.assert_allclose(found.distances, distances, rtol=1e-5, atol=1e-7)
  if metric == "euclidean":
    np.testing.assert_array_equal(found.indices, indices)
  np.testing.assert_array_equal(
    found.weights, np.where(indices >= 0, 0.2, 0).astype("f")
  )
  assert found.indices.dtype == jnp.int32


@pytest.mark.guarantees("graph.query", "It equals a full sort, in exact numbers too")
@pytest.mark.parametrize(
  "name", ["unix nanoseconds", "far from each other", "both ends"]
)
def test_wide_queries_keep_their_digits(name):
  rows = WIDE[name]
  wanted = exact_sort(rows, 49)[::10]
  queries, features = rows[::10], np.delete(rows, np.s_[::10], axis=0)
  place = np.delete(np.arange(50), np.s_[::10])
  wanted = [[j for j in row if j % 10][:4] for row in wanted]
  found = graph.query(features, queries, 4)
  np.testing.assert_array_equal(place[np.asarray(found.indices)], wanted)


@pytest.mark.guarantees(
  "graph.query", "Rows that are left out of a graph have the neighbors there"
)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, np.float64, np.float16])
def test_queries_agree_with_the_graph(kind, metric):
  """A row of the data set finds itself, and then its neighbors in the graph."""
  rows = kind(np.random.default_rng(0).standard_normal([80, 6]).astype(np.float32))
  found = jax.device_get(graph.query(rows, rows, 4, metric=metric))
  whole = graph.build(rows, 3, metric=metric)
  np.testing.assert_array_equal(found.indices[:, 0], np.arange(80))
  np.testing.assert_array_equal(found.indices[:, 1:], whole.indices)
  np.testing.assert_allclose(found.distances[:, 1:], whole.distances, rtol=1e-5)


def test_queries_of_few_and_none():
  features = np.arange(3.0)[:, None]
  found = jax.device_get(graph.query(features, np.array([[0.5], [np.nan]]), 3))
  np.testing.assert_array_equal(found.indices, [[0, 1, 2], [-1, -1, -1]])
  np.testing.assert_array_equal(found.weights[1], [0, 0, 0])
  features[1] = np.inf
  found = graph.query(features, [[0.5]], 3)
  np.testing.assert_array_equal(found.indices, [[0, 2, -1]])
  assert graph.query(features, np.zeros([0, 1]), 2).indices.shape == (0, 2)
  ahead_and_behind = np.array([[1.0], [2.0], [-1.0]])
  zero = graph.query(ahead_and_behind, np.zeros([1, 1]), 3, metric="cosine")
  np.testing.assert_array_equal(zero.distances, [[1, 1, 1]])


def test_queries_need_no_matrix_of_all_pairs():
  rng = np.random.default_rng(0)
  features = rng.standard_normal([10_000, 12]).astype(np.float32)
  queries = rng.standard_normal([5_000, 12]).astype(np.float32)
  graph.query(features[:300], queries[:100], 5)
  tracemalloc.start()
  found = jax.device_get(graph.query(features, queries, 5))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 5_000 * 10_000  # bytes: a fourth of all pairs in float32
  # Of every tile of queries, some against all rows.
  for i in (0, 2047, 2048, 4999):
    far = ((features.astype(np.float64) - queries[i]) ** 2).sum(axis=1)
    np.testing.assert_array_equal(found.indices[i], np.argsort(far)[:5])
    np.testing.assert_allclose(found.distances[i] ** 2, np.sort(far)[:5], rtol=1e-4)


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (
      lambda x: graph.query(x[0], x, 1),
      ValueError,
      r"features must have shape \[n, d\]",
    ),
    (
      lambda x: graph.query(x, x[0], 1),
      ValueError,
      r"queries must have shape .* \[2\]",
    ),
    (lambda x: graph.query(x, x[:, :1], 1), ValueError, "as many columns .* 2, got 1"),
    (lambda x: graph.query(x, x, 4), ValueError, "k must be at most .* n = 3, got 4"),
    (lambda x: graph.query(x, x, 1.0), TypeError, "k sets the shape"),
    (lambda x: graph.query(x, x, 1, metric="l1"), ValueError, "metric must be one of"),
    (lambda x: graph.query(x, x * 1j, 1), TypeError, "queries must be real"),
    (
      lambda x: graph.query(x.astype(np.int64), x.astype(np.uint64), 1),
      TypeError,
      "must have a type in common, got int64 and uint64",
    ),
  ],
)
def test_query_refusals(call, error, message):
  with pytest.raises(error, match=message):
    call(np.ones([3, 2]))


def test_labels_of_queries():
  """What they are for: the class of held-out rows by their neighbors' labels."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 400)
  rows = 6 * np.eye(3, 12)[labels] + rng.standard_normal([400, 12])
  found = graph.query(rows[:300], rows[300:], 5)
  votes = np.eye(3)[labels[:300]][np.asarray(found.indices)].sum(axis=1)
  assert (votes.argmax(axis=1) == labels[300:]).mean() > 0.95
  assert isinstance(found, ranger.Neighbors)

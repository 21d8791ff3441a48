"""Neighbors from graphs and distances of other libraries."""

import jax
import numpy as np
import pytest
from scipy import sparse
from sklearn import neighbors as sklearn_neighbors

import optax_ranger as ranger


def draw(n=60, d=5, seed=0):
  return np.random.default_rng(seed).standard_normal([n, d]).astype(np.float32)


@pytest.mark.guarantees("neighbors.from_graph", "It equals a loop over the entries")
@pytest.mark.parametrize(
  "form", [sparse.csr_array, sparse.coo_matrix, sparse.csc_array]
)
@pytest.mark.parametrize("k", [None, 1, 4, 9])
def test_from_graph_equals_a_loop(form, k):
  rng = np.random.default_rng(0)
  dense = rng.integers(1, 4, [20, 20]) * (rng.random([20, 20]) < 0.2) * 1.0
  dense[3], dense[5, 6], dense[7, 8] = 0, np.nan, np.inf
  found = jax.device_get(ranger.neighbors.from_graph(form(dense), k))
  rows = []
  for i in range(20):
    entries = [(dense[i, j], j) for j in range(20) if j != i and dense[i, j]]
    rows.append(sorted(entry for entry in entries if np.isfinite(entry[0])))
  width = k or max(map(len, rows))
  assert found.indices.shape == (20, width)
  for i, row in enumerate(rows):
    row = row[:width] + [(np.inf, -1)] * (width - len(row))
    assert found.indices[i].tolist() == [j for _, j in row]
    assert found.distances[i].tolist() == [far for far, _ in row]
    wanted = [1 / width if j >= 0 else 0 for _, j in row]
    np.testing.assert_allclose(found.weights[i], wanted, rtol=1e-6)


@pytest.mark.guarantees(
  "neighbors.from_graph", "Of scikit-learn's graph it makes the neighbors of nearest"
)
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_from_graph_of_scikit_learn(metric, include_self):
  rows = draw()
  nearest = ranger.neighbors.nearest(rows, 4, metric=metric)
  edges = sklearn_neighbors.kneighbors_graph(
    rows, 4 + include_self, mode="distance", metric=metric, include_self=include_self
  )
  found = ranger.neighbors.from_graph(edges)
  np.testing.assert_array_equal(found.indices, nearest.indices)
  np.testing.assert_allclose(found.distances, nearest.distances, rtol=1e-3, atol=1e-6)
  np.testing.assert_array_equal(found.weights, nearest.weights)
  fewer = ranger.neighbors.from_graph(edges, 2)
  np.testing.assert_array_equal(fewer.indices, np.asarray(nearest.indices)[:, :2])


def test_from_graph_by_connectivity():
  rows = draw()
  edges = sklearn_neighbors.kneighbors_graph(rows, 4, mode="connectivity")
  found = ranger.neighbors.from_graph(edges, mode="connectivity")
  nearest = ranger.neighbors.nearest(rows, 4)
  np.testing.assert_array_equal(found.indices, np.sort(nearest.indices, axis=1))
  np.testing.assert_array_equal(found.distances, np.ones([60, 4]))
  np.testing.assert_array_equal(found.weights, nearest.weights)
  weighed = ranger.neighbors.weigh(found, kernel="gaussian")
  np.testing.assert_allclose(weighed.weights, np.full([60, 4], np.exp(-0.5) / 4), 1e-6)
  with pytest.raises(ValueError, match="at least the 4 neighbors of the fullest row"):
    ranger.neighbors.from_graph(edges, 2, mode="connectivity")


def test_stored_zeros_and_repeated_entries():
  """Copies are neighbors at distance zero; of repeated entries the nearest counts."""
  row, column = np.array([0, 0, 0, 1, 2, 2]), np.array([2, 1, 0, 0, 1, 1])
  data = np.array([0.0, 1.0, 0.0, 0.0, 3.0, 2.0])
  edges = sparse.csr_array((data, column, np.searchsorted(row, np.arange(4))), (3, 3))
  found = ranger.neighbors.from_graph(edges)
  assert found.indices.tolist() == [[2, 1], [0, -1], [1, -1]]
  assert found.distances.tolist() == [[0, 1], [0, np.inf], [2, np.inf]]
  empty = ranger.neighbors.from_graph(sparse.csr_array((3, 3)))
  assert empty.indices.tolist() == [[-1]] * 3


@pytest.mark.guarantees("neighbors.from_distances", "It equals a full sort")
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, "ties"])
@pytest.mark.parametrize("cells", [50, 2**22])
def test_from_distances_equals_a_full_sort(dtype, cells, monkeypatch):
  from optax_ranger.neighbors import _convert

  monkeypatch.setattr(_convert, "_CELLS", cells)
  rng = np.random.default_rng(0)
  matrix = rng.random([30, 30]) * 100
  matrix = rng.integers(0, 3, [30, 30]) if dtype == "ties" else matrix.astype(dtype)
  found = jax.device_get(ranger.neighbors.from_distances(matrix, 7))
  for i in range(30):
    order = sorted((float(matrix[i, j]), j) for j in range(30) if j != i)[:7]
    assert found.indices[i].tolist() == [j for _, j in order]
    np.testing.assert_allclose(found.distances[i], [far for far, _ in order], rtol=1e-6)


def test_from_distances_leaves_out_what_is_not_finite():
  matrix = np.array([[0, np.inf, 1], [np.nan, 0, np.inf], [1e300, 2, 0]])
  found = jax.device_get(ranger.neighbors.from_distances(matrix, 2))
  assert found.indices.tolist() == [[2, -1], [-1, -1], [1, 0]]
  assert found.weights.tolist() == [[0.5, 0], [0, 0], [0.5, 0.5]]
  assert np.isfinite(found.distances[2]).all()
  features = draw()
  far = sklearn_neighbors.NearestNeighbors(n_neighbors=59).fit(features)
  far = far.kneighbors_graph(mode="distance").toarray()
  np.testing.assert_array_equal(
    ranger.neighbors.from_distances(far, 4).indices,
    ranger.neighbors.nearest(features, 4).indices,
  )


REFUSED = {
  "graph must be a sparse matrix of SciPy, got ndarray": (
    lambda: ranger.neighbors.from_graph(np.eye(3))
  ),
  "graph must have shape [n, n], got [2, 3]": (
    lambda: ranger.neighbors.from_graph(sparse.csr_array(np.ones([2, 3])))
  ),
  "graph must hold distances, which are not negative, got -1.0": (
    lambda: ranger.neighbors.from_graph(sparse.csr_array(-np.ones([3, 3])))
  ),
  "mode must be one of 'distance', 'connectivity'; got 'both'": (
    lambda: ranger.neighbors.from_graph(sparse.csr_array(np.eye(3)), mode="both")
  ),
  "k sets the shape": (
    lambda: ranger.neighbors.from_graph(sparse.csr_array(np.eye(3)), 1.0)
  ),
  "distances must have shape [n, n], got [3]": (
    lambda: ranger.neighbors.from_distances(np.ones(3), 1)
  ),
  "distances must hold distances, which are not negative, got -0.5": (
    lambda: ranger.neighbors.from_distances(-0.5 * np.ones([3, 3]), 1)
  ),
  "k must be less than the number of examples, n = 3, got 3": (
    lambda: ranger.neighbors.from_distances(np.ones([3, 3]), 3)
  ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_convert_refusals(message):
  pattern = message.replace("[", r"\[").replace("]", r"\]")
  with pytest.raises((TypeError, ValueError), match=pattern):
    REFUSED[message]()

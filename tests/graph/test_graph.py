"""Graphs of whole data sets: every builder against a full sort, and each other."""

import sys
import tracemalloc
import types

import jax
import numpy as np
import pytest
from scipy import sparse

import optax_ranger as ranger
from optax_ranger import graph
from optax_ranger.graph import _duplicates
from optax_ranger.graph import _exact
from optax_ranger.graph import _faiss
from optax_ranger.graph import _sparse
from tests.graph import graphs
from tests.helpers import run_processes

COSINE_TOO = pytest.param("cosine", marks=pytest.mark.slow)
each_metric = pytest.mark.parametrize("metric", ["euclidean", "cosine"])


@pytest.mark.guarantees(
  "graph.build", "Every exact backend, 8 devices, and two processes give one"
)
@pytest.mark.few(2)
@each_metric
@pytest.mark.parametrize("name", graphs.data())
def test_backends_give_one_graph(name, metric):
  rows = graphs.data()[name]
  first = ranger.neighbors.nearest(rows, 5, metric=metric, block_size=64)
  first = jax.device_get(first)
  graphs.same(graph.build(rows, 5, metric=metric, backend="jax"), first)
  graphs.same(graph.build(rows, 5, metric=metric, backend="faiss"), first)
  distances, indices = graphs.full_sort(rows, 5, metric)
  np.testing.assert_allclose(first.distances, distances, rtol=2e-5, atol=1e-6)
  if name == "normal":
    distinct = ~np.isin(np.arange(400), np.r_[:10, 200:240])
    np.testing.assert_array_equal(first.indices[distinct], indices[distinct])


@pytest.mark.parametrize("backend", ["jax", "faiss"])
def test_blocks_of_queries_give_the_graph_of_one(backend, monkeypatch):
  rows = graphs.points()
  whole = graph.build(rows, 5, backend=backend)
  monkeypatch.setattr(_exact, "_BLOCK", 64)
  monkeypatch.setattr(_exact, "_CHUNK", 64)
  monkeypatch.setattr(_faiss, "_QUERIES", 150)
  graphs.same(graph.build(rows, 5, backend=backend), whole)


@pytest.mark.guarantees(
  "graph.build", "Every exact backend, 8 devices, and two processes give one"
)
@pytest.mark.few(1)
@pytest.mark.parametrize("metric", ["euclidean", COSINE_TOO])
@pytest.mark.parametrize("name", graphs.data())
def test_devices_give_the_graph_of_one(name, metric):
  """Eight devices, which share the rows evenly, and seven, which don't."""
  rows = graphs.data()[name]
  alone = graph.build(rows, 5, metric=metric, backend="jax")
  for size in (8, 7) if name == "normal" else (8,):
    mesh = jax.make_mesh((size,), ("data",), devices=jax.devices()[:size])
    found = graph.build(rows, 5, metric=metric, mesh=mesh)
    graphs.same(found, alone)
    assert len(found.indices) == len(rows)


def test_devices_hold_their_rows_only():
  from optax_ranger.graph import _sharded

  mesh = jax.make_mesh((8,), ("data",))
  split = jax.NamedSharding(mesh, jax.P("data"))
  found = graph.build(graphs.points(), 5, mesh=mesh)
  assert all(leaf.sharding.is_equivalent_to(split, 2) for leaf in found)
  n, d = 65536, 256
  features = jax.ShapeDtypeStruct((n, d), np.float32, sharding=split)
  search = _sharded._search_of(mesh, "data", 5, "euclidean", n)
  memory = search.lower(features).compile().memory_analysis()
  # All rows are 67 MB; a device has an eighth, one block, and tiles.
  assert memory.argument_size_in_bytes == 4 * n * d // 8
  assert memory.temp_size_in_bytes < 60e6 + 4 * 1024 * 8192 * 2


@pytest.mark.slow
@pytest.mark.guarantees(
  "graph.build", "Every exact backend, 8 devices, and two processes give one"
)
def test_two_processes_give_the_graph_of_one():
  """Over gloo: five devices in the first, three in the second."""
  shards = run_processes("tests.graph.graphs", [5, 3], timeout=100)
  for name, rows in graphs.data().items():
    alone = graph.build(rows, 5, backend="jax")
    parts = [part for shard in shards for part in shard[name]]
    assert len(parts) == 16
    for start, leaf, digest in parts:
      expected = np.asarray(alone[leaf])[start : start + len(rows) // 8]
      assert digest == graphs.digest(expected)


@pytest.mark.guarantees(
  "graph.build", "It is exact for clusters that lie thousands of radii"
)
@pytest.mark.guarantees(
  "neighbors.nearest", "The same neighbors as a full sort, for clusters far apart"
)
@pytest.mark.few(2)
@pytest.mark.parametrize("metric", ["euclidean", COSINE_TOO])
@pytest.mark.parametrize("build", ["jax", "faiss", "tiles"])
@pytest.mark.parametrize(("scale", "ratio"), [(1e-30, 1e3), (1, 1e6), (1e30, 1e3)])
def test_exact_where_rounding_is_worst(metric, build, scale, ratio):
  """Distances are those of a full sort, whatever the tiles could tell."""
  # FAISS measures by differences, without cancellation, in less than some hundred.
  d = 784 if build == "faiss" else 12
  rows = scale * graphs.clusters(ratio, d=d).astype(np.float64)
  rows = rows.astype(np.float32)
  if build == "tiles":
    found = ranger.neighbors.nearest(rows, 5, metric=metric, block_size=32)
  else:
    found = graph.build(rows, 5, metric=metric, backend=build)
  distances, _ = graphs.full_sort(rows, 5, metric)
  tiny = 1e-12 if metric == "cosine" else 0
  if metric == "cosine" and ratio == 1e6:
    tiny = 1e-13  # unit vectors in float32 are no finer than that
  np.testing.assert_allclose(found.distances, distances, rtol=1e-5, atol=tiny)


@pytest.mark.parametrize("backend", ["jax", "faiss"])
def test_ordinary_data_needs_no_repairs(backend):
  """The candidates beside the k best are enough; without them they aren't."""
  rows = 3 + np.random.default_rng(0).standard_normal([1500, 64])
  build = lambda: graph.build(
    rows.astype(np.float32), 5, backend=backend, with_report=True
  )
  assert build()[1].num_repaired == 0


@pytest.mark.guarantees(
  "graph.build", "The recall is exact for the rows of recall_sample"
)
@pytest.mark.guarantees(
  "graph.measure_recall", "It equals the recall of a full search, also if the given"
)
def test_recall_is_measured():
  rows = np.random.default_rng(0).standard_normal([1200, 24]).astype(np.float32)
  distances, _ = graphs.full_sort(rows, 5, "euclidean")
  recalls = {}
  for backend, effort in (("hnsw", 6), ("hnsw", 64), ("ivf", 1), ("ivf", 10**6)):
    found, report = graph.build(
      rows, 5, backend=backend, effort=effort, recall_sample=1200, with_report=True
    )
    share = (np.asarray(found.distances) <= distances[:, -1:] * 1.000001).mean()
    assert report.recall == pytest.approx(share, abs=1e-6)
    assert report.backend == backend
    assert 0 < report.seconds < 60
    recalls[backend, effort] = report.recall
    partly = graph.measure_recall(found, rows, sample=300, seed=1)
    assert abs(partly - share) < 0.1
  assert recalls["ivf", 1] < 0.9 < recalls["hnsw", 6] < recalls["hnsw", 64]
  assert recalls["ivf", 10**6] == 1
  assert np.isnan(graph.measure_recall(found, rows, sample=0))
  cells = lambda seed: np.asarray(
    graph.build(rows, 5, backend="ivf", effort=1, recall_sample=0, seed=seed).indices
  )
  np.testing.assert_array_equal(cells(0), cells(0))
  assert (cells(0) != cells(1)).any()


@pytest.mark.parametrize("backend", ["hnsw", "ivf"])
def test_an_approximate_search_of_everything_is_exact(backend, monkeypatch):
  """By cosine, with rows that are dropped, in blocks."""
  monkeypatch.setattr(_faiss, "_QUERIES", 150)
  rows = graphs.points()
  found, report = graph.build(
    rows, 5, backend=backend, metric="cosine", effort=10**4, with_report=True
  )
  assert report.recall == 1
  assert report.num_dropped == 2
  graphs.same(found, graph.build(rows, 5, metric="cosine", backend="faiss"))


def normal(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).standard_normal(shape)


EDGES = {
  "duplicates": np.repeat(
    np.concatenate([np.eye(4), 2 * np.eye(4), -np.eye(4)]), [1] * 6 + [4] * 6, axis=0
  ),
  "constant": np.full([30, 4], 3.3),
  "nan_rows": np.where(np.arange(30)[:, None] % 8 == 0, np.nan, normal(30, 4)),
  "all_nan": np.full([30, 4], np.nan),
  "n_is_k_plus_1": normal(6, 4),
  "float16": normal(30, 4).astype(np.float16),
  "uint8": (50 * np.abs(normal(30, 4))).astype(np.uint8),
  "int64": (9 * normal(30, 4)).astype(np.int64),
  "bool": normal(30, 4) > 0,
  "single_cluster": 1e3 + 1e-2 * normal(30, 4),
  "zero_rows": normal(30, 4) * (np.arange(30)[:, None] > 3),
  "one_zero_row": normal(30, 4) * (np.arange(30)[:, None] > 0),
}


@pytest.mark.guarantees("graph.build", "Edge cases")
@pytest.mark.few(4)
@pytest.mark.parametrize("metric", ["euclidean", COSINE_TOO])
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ("bool", "int64")))
    for name in EDGES
  ],
)
def test_edge_cases(name, metric):
  """A full sort by (distance, index) says what each builder must give."""
  rows = EDGES[name]
  if rows.dtype == np.float64:
    rows = rows.astype(np.float32)
  distances, indices = graphs.full_sort(rows, 5, metric)
  found = graph.build(rows, 5, metric=metric, backend="faiss")
  np.testing.assert_allclose(found.distances, distances, rtol=1e-4, atol=2e-7)
  if metric == "euclidean" or name not in ("single_cluster", "int64", "bool", "uint8"):
    np.testing.assert_array_equal(found.indices, indices)
  weights = np.where(indices >= 0, np.float32(0.2), np.float32(0))
  np.testing.assert_array_equal(found.weights, weights)
  graphs.same(ranger.neighbors.nearest(rows, 5, metric=metric), found)
  graphs.same(graph.build(rows, 5, metric=metric, backend="jax"), found)
  if name in ("duplicates", "nan_rows", "zero_rows"):
    mesh = jax.make_mesh((2, 2), ("model", "data"), devices=jax.devices()[:4])
    split, report = graph.build(
      rows, 5, metric=metric, mesh=mesh, axis_name="data", with_report=True
    )
    graphs.same(split, found)
    assert split.indices.sharding.is_equivalent_to(
      jax.NamedSharding(mesh, jax.P("data")), 2
    )
    assert report[:2] == ("sharded", 1.0)
    assert report.num_duplicates == 0
    assert report.num_dropped == (np.asarray(found.indices)[:, 0] < 0).sum()


def test_zero_rows_have_no_direction():
  """At cosine distance one from all, copies of them too."""
  rows = EDGES["zero_rows"].astype(np.float32)
  distances, indices = graphs.full_sort(rows, 5, "cosine")
  for backend in ("jax", "faiss"):
    found = graph.build(rows, 5, metric="cosine", backend=backend)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-4)


REFUSED = {
  "features must have shape": lambda x: graph.build(x[0], 1),
  "d at least 1": lambda x: graph.build(x[:, :0], 1),
  "features must be real": lambda x: graph.build(x + 1j, 1),
  "n = 9, got 9": lambda x: graph.build(x, 9),
  "backend must be one of": lambda x: graph.build(x, 1, backend="annoy"),
  "metric must be one of": lambda x: graph.build(x, 1, metric="l1"),
  "sparse features need metric": lambda x: graph.build(sparse.csr_array(x), 1),
  "a mesh needs backend": lambda x: graph.build(
    x, 1, backend="faiss", mesh=jax.make_mesh((8,), ("data",))
  ),
  "axis_name must be one of 'data'": lambda x: graph.build(
    x, 1, mesh=jax.make_mesh((8,), ("data",)), axis_name="model"
  ),
  "k sets the shape": lambda x: graph.build(x, 1.5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
  with pytest.raises((ValueError, TypeError), match=message.replace("[", r"\[")):
    REFUSED[message](np.eye(9, 4, dtype=np.float32))


def test_faiss_is_an_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "faiss", None)
  rows = graphs.points()
  with pytest.raises(ImportError, match=r"optax-ranger\[graph\]"):
    graph.build(rows, 5, backend="faiss")
  _, report = graph.build(rows, 5, with_report=True)
  assert report.backend == "jax"


def texts(n: int = 400) -> sparse.csr_array:
  rng = np.random.default_rng(0)
  dense = rng.random([n, 500]) * (rng.random([n, 500]) < 0.02)
  dense[7] = 0
  dense[20:26] = dense[10] * np.array([0.1, 0.3, 0.7, 1.1, 1.3, 1.7])[:, None]
  dense[1, 3] = np.nan
  return sparse.csr_array(dense)


def test_sparse_rows_equal_dense_ones(monkeypatch):
  rows = texts()
  found, report = graph.build(rows, 5, metric="cosine", with_report=True)
  found = jax.device_get(found)
  distances, indices = graphs.full_sort(rows.toarray(), 5, "cosine")
  np.testing.assert_allclose(found.distances, distances, atol=1e-7)
  np.testing.assert_array_equal(found.indices[10], [20, 21, 22, 23, 24])
  np.testing.assert_array_equal(found.indices[25], [10, 20, 21, 22, 23])
  # All are as far from a row of zeros; those that are not finite are nobody's.
  np.testing.assert_array_equal(found.indices[7], [0, 2, 3, 4, 5])
  np.testing.assert_array_equal(found.indices[1], [-1] * 5)
  assert not found.distances[np.r_[10, 20:26]].any()
  alone = ~np.isin(indices, np.r_[10, 20:26]).any(axis=1) & (distances[:, -1] < 1)
  np.testing.assert_array_equal(found.indices[alone], indices[alone])
  assert alone.sum() > 200
  assert report.backend == "sparse"
  assert report.num_dropped == 1
  matrix = sparse.csr_matrix(rows)
  graphs.same(graph.build(matrix, 5, metric="cosine"), found)
  monkeypatch.setattr(_sparse, "_CELLS", 400 * 30)
  graphs.same(graph.build(rows, 5, metric="cosine"), found)


def test_fingerprints_of_sparse_rows():
  dense = np.array([[0.0, 2, 0], [0, 0, 3]])
  of = lambda dense: graph.fingerprint(sparse.csr_array(dense))
  assert of(dense) == graph.fingerprint(sparse.csc_array(dense))
  others = (dense[:, [1, 0, 2]], dense * 2, np.array([[0, 2.0, 3], [0, 0, 0]]))
  wider = np.pad(dense, ((0, 0), (0, 1)))
  assert len({of(dense), of(wider), *map(of, others)}) == 5


def test_sparse_rows_are_never_densified():
  """A million columns: densified they would take 3.2 GB."""
  rng = np.random.default_rng(0)
  wide = sparse.random_array((400, 10**6), density=1e-5, rng=rng, format="csr")
  tracemalloc.start()
  graph.build(wide, 5, metric="cosine")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 40e6


@pytest.mark.guarantees(
  "graph.measure_recall", "It equals the recall of a full search, also if the given"
)
def test_recall_of_another_index_is_measured():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4000, 32)).astype(np.float32)
  wrong = rng.integers(0, 4000, (4000, 10))
  invented = ranger.Neighbors(wrong, np.zeros([4000, 10]), np.full([4000, 10], 0.1))
  assert np.ravel(graph.measure_recall(invented, x))[0] < 0.01


@pytest.mark.parametrize("what", ["indices", "distances"])
def test_integers_keep_their_digits(what):
  found = graph.build(np.array([[0], [2**32], [10], [2**32 + 11]]), 1)
  right = {"indices": [2, 3, 0, 1], "distances": [10, 11, 10, 11]}[what]
  np.testing.assert_array_equal(np.asarray(getattr(found, what))[:, 0], right)


def test_features_beyond_float32_are_searched_in_their_own_type():
  times = 1_700_000_000 + np.arange(400.0)[:, None] * 0.25
  found, report = graph.build(times, 5, with_report=True)
  np.testing.assert_array_equal(
    found.indices, graphs.full_sort(times, 5, "euclidean")[1]
  )
  assert report.recall == 1


@pytest.mark.parametrize("collide", [False, True])
def test_equal_rows_are_grouped(collide, monkeypatch):
  """In blocks of rows, and where rows that differ have the same hash."""
  rows = np.random.default_rng(0).integers(0, 40, [5000, 2]).astype(np.float32)
  if collide:  # A sum of entries: that of [1, 2] is that of [2, 1].
    rows = rows[:500]
    zeros = types.SimpleNamespace(integers=lambda *args: np.zeros(2, np.uint64))
    monkeypatch.setattr(np.random, "default_rng", lambda seed: zeros)
  groups = _duplicates.find(rows)
  assert (np.diff(groups.first) > 0).all()
  np.testing.assert_array_equal(rows[groups.first[groups.group]], rows)
  for group, (start, end) in enumerate(
    zip(groups.start[:-1], groups.start[1:], strict=True)
  ):
    members = np.flatnonzero(groups.group == group)
    np.testing.assert_array_equal(groups.members[start:end], members)
    assert members[0] == groups.first[group]
  if not collide:
    assert len(groups.first) == len(np.unique(rows, axis=0))


def test_dropped_rows_are_no_duplicates():
  rows = normal(30, 4).astype(np.float32)
  rows[::8, 1] = np.nan
  rows[8, 2] = np.inf
  _, report = graph.build(rows, 5, with_report=True)
  assert report.num_dropped == 4
  assert report.num_duplicates == 0

"""Features that float32 does not hold, against a full sort in exact numbers."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ranger as ranger
from optax_ranger import graph
from optax_ranger.neighbors import _double
from tests.graph import graphs


def exact_sort(rows, k):
  """Indices by squared distance in rational numbers, then by index."""
  exact = [[fractions.Fraction(number) for number in row] for row in rows.tolist()]
  indices = []
  for i, row in enumerate(exact):
    squares = [
      (sum((a - b) ** 2 for a, b in zip(row, other, strict=True)), j)
      for j, other in enumerate(exact)
      if j != i
    ]
    indices.append([j for _, j in sorted(squares)[:k]])
  return np.array(indices)


def draw(*shape):
  return np.random.default_rng(0).standard_normal(shape)


SQUARES = np.arange(50) ** 2
WIDE = {
  "unix nanoseconds": 1_700_000_000_000_000_000 + np.arange(50)[:, None] ** 2,
  "unix seconds": 1_700_000_000 + np.cumsum(np.abs(draw(50, 1)), axis=0),
  # They differ by more than float32 tells, whatever is subtracted from all.
  "wide int32": np.r_[0, 2**30 + np.arange(49) ** 2].astype(np.int32)[:, None],
  "negative": -(2**40) - np.arange(50)[:, None] ** 3,
  "near the end": 2**64 - 1 - (np.arange(50, dtype=np.uint64) ** 2)[:, None],
  "both ends": np.r_[-(2**63) + SQUARES[:25], 2**63 - 1 - SQUARES[:25]][:, None],
  # Steps of 0.3 in float64, of 2 in float32: near ones are rounded away.
  "rounded apart": np.r_[0, 2**24 + 0.3 * (np.arange(49) * 11 % 49)][:, None],
  "map coordinates": np.array([5e5, 4_649_776.0]) + draw(50, 2),
  "far from each other": np.r_[draw(25, 3), 1e9 + draw(25, 3)],
  "random bits": np.random.default_rng(0).integers(0, 2**64, [50, 2], np.uint64),
  "near copies": np.repeat(draw(5, 3), 10, axis=0) * (1 + 1e-13 * draw(50, 1)),
  "ordinary": draw(50, 4),
}
# Those whose neighbors float32 can't tell.
REPAIRED = ("wide int32", "both ends", "rounded apart", "far from each other")


@pytest.mark.guarantees(
  "graph.build", "Where float32 does not hold the features, it is the graph"
)
@pytest.mark.guarantees(
  "neighbors.nearest", "64-bit numbers of NumPy keep their digits"
)
@pytest.mark.few(7)
@pytest.mark.parametrize("name", WIDE)
def test_wide_features_have_the_graph_of_a_full_sort(name):
  rows = WIDE[name]
  indices = exact_sort(rows, 3)
  for backend in ("jax", "faiss"):
    found, report = graph.build(rows, 3, backend=backend, with_report=True)
    np.testing.assert_array_equal(found.indices, indices)
    assert report.recall == 1
    assert report.num_duplicates == 0
    assert (report.num_repaired > 0) == (name in REPAIRED)
    assert found.distances.dtype == jnp.float32
  assert graph.measure_recall(found, rows) == 1
  graphs.same(ranger.neighbors.nearest(rows, 3), found)


def test_wide_features_in_blocks(monkeypatch):
  rows = WIDE["rounded apart"]
  whole = graph.build(rows, 3, backend="jax")
  monkeypatch.setattr(_double, "_CELLS", 350)
  monkeypatch.setattr(_double, "_MEASURED", 100)
  monkeypatch.setattr(_double._parts, "__defaults__", (16,))
  graphs.same(graph.build(rows, 3, backend="jax"), whole)


@pytest.mark.few(1)
@pytest.mark.parametrize(
  "name", ["map coordinates", "far from each other", "both ends"]
)
def test_wide_features_over_devices(name):
  """Eight devices, which can't share the rows evenly, and five, which do."""
  rows = WIDE[name]
  alone = graph.build(rows, 3, backend="jax")
  for size in (8, 5):
    mesh = jax.make_mesh((size,), ("data",), devices=jax.devices()[:size])
    found = graph.build(rows, 3, mesh=mesh)
    graphs.same(found, alone)
  split = jax.NamedSharding(mesh, jax.P("data"))
  assert found.indices.sharding.is_equivalent_to(split, 2)


@pytest.mark.parametrize("backend", ["jax", "faiss"])
@pytest.mark.parametrize("name", ["unix seconds", "map coordinates", "near copies"])
def test_wide_features_by_cosine(backend, name):
  """Directions that differ by less than float32 tells."""
  rows = WIDE[name]
  if rows.shape[1] == 1:
    rows = np.concatenate([rows, np.full_like(rows, 1e9)], axis=1)
  unit = rows.astype(np.longdouble)
  unit /= np.sqrt((unit**2).sum(axis=1, keepdims=True))
  squares = ((unit[:, None] - unit[None]) ** 2).sum(axis=2)
  np.fill_diagonal(squares, np.inf)
  truth = np.sort(squares, axis=1)[:, :3]
  found = graph.build(rows, 3, backend=backend, metric="cosine")
  given = np.take_along_axis(squares, np.asarray(found.indices), axis=1)
  # In float64, unit rows are as fine as 1e-16.
  np.testing.assert_allclose(np.sqrt(given), np.sqrt(truth), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_directions_of_rows_whose_squares_are_out_of_range(size):
  rows = WIDE["ordinary"]
  build = lambda rows: graph.build(rows, 3, backend="jax", metric="cosine")
  found, expected = build(rows * size), build(rows)
  np.testing.assert_array_equal(found.indices, expected.indices)
  np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
def test_wide_integers_of_jax(dtype):
  rows = (2**30 + np.arange(50, dtype=dtype) ** 2)[:, None]
  indices = exact_sort(rows, 3)
  nearest = lambda rows: ranger.neighbors.nearest(rows, 3).indices
  np.testing.assert_array_equal(nearest(jnp.asarray(rows)), indices)
  np.testing.assert_array_equal(jax.jit(nearest)(rows), indices)
  np.testing.assert_array_equal(graph.build(jnp.asarray(rows), 3).indices, indices)


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_wide_features_under_x64(dtype):
  rows = (2.0**40 + np.cumsum(np.arange(40.0))[:, None]).astype(dtype)
  indices = exact_sort(rows, 3)
  with jax.enable_x64(True):
    np.testing.assert_array_equal(ranger.neighbors.nearest(rows, 3).indices, indices)
    found = graph.build(rows, 3, backend="jax")
    np.testing.assert_array_equal(found.indices, indices)


def test_wide_features_within_the_callers_jit():
  """There is no host to measure on: shifted, then rounded."""
  rows = WIDE["unix nanoseconds"]
  found = jax.jit(lambda: ranger.neighbors.nearest(rows, 3).indices)()
  np.testing.assert_array_equal(found, exact_sort(rows, 3))


def test_rows_that_are_not_finite_stay_dropped():
  rows = WIDE["far from each other"].copy()
  rows[3, 0], rows[7] = np.nan, [np.inf, 0, 1e300]
  found, report = graph.build(rows, 3, backend="jax", with_report=True)
  assert report.num_dropped == 2
  assert (np.asarray(found.indices)[[3, 7]] == -1).all()
  alive = np.setdiff1d(np.arange(50), [3, 7])
  wanted = alive[exact_sort(rows[alive], 3)]
  np.testing.assert_array_equal(np.asarray(found.indices)[alive], wanted)


@pytest.mark.parametrize(
  ("rows", "dropped", "duplicates"),
  [
    ([[np.nan, 1], [np.nan, 2], [3, np.nan], [4, 4], [5, 6]], 3, 0),
    ([[np.nan, 1], [4, 4], [4, 4], [np.inf, 1], [4, 4]], 2, 2),
    ([[np.nan, 1], [4, 4], [5, 5], [6, 6], [7, 7]], 1, 0),
    ([[np.nan, 1]] * 5, 5, 0),
    ([[0, 1], [-0.0, 1], [0, 2], [0, 2], [0, 1]], 0, 3),
  ],
)
@pytest.mark.parametrize("scale", [1.0, 1 + 2.0**-40])
@pytest.mark.parametrize("backend", ["jax", "faiss"])
def test_what_is_dropped_is_no_duplicate(rows, dropped, duplicates, scale, backend):
  """In float32 and, scaled, in float64."""
  rows = np.array(rows) * scale
  _, report = graph.build(rows, 1, backend=backend, with_report=True)
  assert report.num_dropped == dropped
  assert report.num_duplicates == duplicates


BAD = {
  "invented distances": lambda indices, rng: rng.integers(0, 500, indices.shape),
  "itself": lambda indices, rng: np.repeat(np.arange(500)[:, None], 5, axis=1),
  "negative": lambda indices, rng: np.full_like(indices, -1),
  "past the end": lambda indices, rng: indices + 500,
  "64 bits": lambda indices, rng: indices.astype(np.int64) + 2**32,
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_recall_believes_nothing(kind, metric):
  rows = draw(500, 16).astype(np.float32)
  right = graph.build(rows, 5, metric=metric)
  indices = BAD[kind](np.asarray(right.indices), np.random.default_rng(0))
  zeros = np.zeros_like(right.distances)
  found = ranger.Neighbors(indices, zeros, right.weights)
  assert graph.measure_recall(found, rows, metric=metric) < 0.05
  swapped = ranger.Neighbors(right.indices, zeros + np.inf, right.weights)
  assert graph.measure_recall(swapped, rows, metric=metric) == 1


def test_repeated_neighbors_count_once():
  rows = draw(500, 16).astype(np.float32)
  right = graph.build(rows, 5)
  repeated = np.asarray(right.indices)[:, [0, 0, 1, 1, 2]]
  found = right._replace(indices=repeated)
  assert graph.measure_recall(found, rows) == pytest.approx(0.6)


def test_recall_of_wide_features():
  """A graph of what float32 makes of them is not taken for exact."""
  rows = WIDE["unix seconds"]
  found = graph.build(rows.astype(np.float32), 3, backend="jax")
  assert graph.measure_recall(found, rows) < 0.5
  with pytest.raises(ValueError, match=r"neighbors.indices must have shape \[50, k\]"):
    graph.measure_recall(found._replace(indices=found.indices[:4]), rows)

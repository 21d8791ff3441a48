"""Neighbors against a full sort in NumPy, their weights, and what backs a label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import spatial

import optax_ranger as ranger

POINTS = np.array([[0.0], [1.0], [3.0], [7.0]])


def full_sort(features, k, metric):
  features = np.asarray(features, np.float64)
  kind = {"euclidean": "euclidean", "cosine": "cosine"}[metric]
  distances = spatial.distance.cdist(features, features, kind)
  np.fill_diagonal(distances, np.inf)
  indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
  return indices, np.take_along_axis(distances, indices, axis=1)


@pytest.mark.guarantees(
  "neighbors.nearest", "The same neighbors as a full sort, for clusters far apart"
)
@pytest.mark.few(2)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
  "block_size", [7, pytest.param(64, marks=pytest.mark.slow), 1000]
)
def test_neighbors_equal_a_full_sort(metric, block_size):
  rng = np.random.default_rng(0)
  features = (5 + rng.standard_normal([150, 6])).astype(np.float32)
  found = ranger.neighbors.nearest(features, 5, metric=metric, block_size=block_size)
  indices, distances = full_sort(features, 5, metric)
  np.testing.assert_array_equal(found.indices, indices)
  np.testing.assert_allclose(found.distances, distances, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found.weights, np.full([150, 5], 0.2), rtol=1e-6)


@pytest.mark.guarantees("neighbors.nearest", "Ties go to the lower index")
@pytest.mark.parametrize("block_size", [4, 64])
def test_ties_go_to_the_lower_index(block_size):
  points = np.arange(24, dtype=np.float32) % 3
  found = ranger.neighbors.nearest(points[:, None], 4, block_size=block_size)
  indices, _ = full_sort(points[:, None], 4, "euclidean")
  np.testing.assert_array_equal(found.indices, indices)
  np.testing.assert_array_equal(found.distances, np.zeros([24, 4]))


@pytest.mark.guarantees("neighbors.nearest", "Memory does not grow with n squared")
def test_neighbor_memory_grows_linearly():
  from optax_ranger.neighbors import _search

  def temporaries(n):
    features = jax.ShapeDtypeStruct((n, 8), jnp.float32)
    search = _search.search.lower(
      features, k=5, metric="euclidean", block_size=128
    ).compile()
    return search.memory_analysis().temp_size_in_bytes

  small, large = temporaries(2048), temporaries(16384)
  assert large < 8.5 * small
  assert large < 16384**2


@pytest.mark.parametrize(
  "dtype",
  [
    np.float16,
    np.uint8,
    pytest.param(np.int32, marks=pytest.mark.slow),
    pytest.param(np.float64, marks=pytest.mark.slow),
  ],
)
def test_features_of_any_real_type(dtype):
  features = np.random.default_rng(0).integers(0, 9, [40, 5]).astype(dtype)
  found = ranger.neighbors.nearest(features, 3)
  indices, distances = full_sort(features, 3, "euclidean")
  np.testing.assert_array_equal(found.indices, indices)
  np.testing.assert_allclose(found.distances, distances, rtol=1e-5)


def test_rows_that_are_not_finite_have_no_neighbors():
  features = np.random.default_rng(0).standard_normal([10, 3]).astype(np.float32)
  features[4, 1] = np.nan
  found = jax.device_get(ranger.neighbors.nearest(features, 9))
  assert (found.indices[4] == -1).all()
  assert 4 not in found.indices
  assert not found.weights[4].any()
  assert np.isinf(found.distances[0, -1])


def test_duplicates_and_constant_features():
  found = ranger.neighbors.nearest(np.full([6, 2], 3.0, np.float32), 5)
  assert not np.asarray(found.distances).any()
  np.testing.assert_array_equal(np.asarray(found.indices)[0], [1, 2, 3, 4, 5])
  zeros = ranger.neighbors.nearest(np.zeros([3, 2], np.float32), 2, metric="cosine")
  np.testing.assert_array_equal(zeros.distances, np.ones([3, 2]))
  weighed = ranger.neighbors.weigh(found, kernel="gaussian")
  np.testing.assert_allclose(weighed.weights, np.full([6, 5], 0.2), rtol=1e-6)


def line():
  return ranger.neighbors.nearest(POINTS, 3)


@pytest.mark.parametrize(
  ("kernel", "formula"),
  [
    ("uniform", np.ones_like),
    ("inverse_distance", lambda d: 1 / (1 + d)),
    ("gaussian", lambda d: np.exp(-(d**2) / 2)),
  ],
)
@pytest.mark.parametrize("bandwidth", [None, 2.0])
def test_kernels_equal_numpy(kernel, formula, bandwidth):
  weighed = ranger.neighbors.weigh(line(), kernel=kernel, bandwidth=bandwidth)
  distances = np.asarray(line().distances)
  scaled = distances / (bandwidth or distances.mean())
  np.testing.assert_allclose(weighed.weights, formula(scaled) / 3, rtol=1e-5)


def test_empty_places_do_not_enter_the_mean_distance():
  """Those of a row that is not finite, and those that it would fill in other rows."""
  points = np.array([[0.0], [1.0], [3.0], [np.nan]])
  weigh, found = ranger.neighbors.weigh, ranger.neighbors.nearest(points, 3)
  weights = np.asarray(weigh(found, kernel="gaussian").weights)
  distances = np.array([[1.0, 3.0], [1.0, 2.0], [2.0, 3.0]])
  expected = np.exp(-((distances / distances.mean()) ** 2) / 2) / 3
  past = found._replace(indices=np.where(found.indices < 0, 4, found.indices))
  np.testing.assert_array_equal(weigh(past, kernel="gaussian").weights, weights)
  np.testing.assert_allclose(weights[:3, :2], expected, rtol=1e-5)
  assert not weights[:, 2].any()
  assert not weights[3].any()


def test_agreement_equals_numpy():
  labels = np.array([0, 1, 0, 1])
  beliefs = np.random.default_rng(0).dirichlet(np.ones(2), 4).astype(np.float32)
  neighbors = line()
  indices = np.asarray(neighbors.indices)
  of = lambda **given: np.asarray(ranger.neighbors.weigh(neighbors, **given).weights)
  np.testing.assert_allclose(
    of(labels=labels), (labels[:, None] == labels[indices]) / 3
  )
  np.testing.assert_allclose(
    of(beliefs=beliefs),
    np.einsum("ic,ijc->ij", beliefs, beliefs[indices]) / 3,
    rtol=1e-5,
  )
  # A label that beliefs have no column for is none.
  for given in (labels, np.array([0, -1, 2, 1])):
    both, known = np.zeros([4, 3]), np.isin(given, [0, 1])
    for i in range(4):
      for j, other in enumerate(indices[i]):
        if known[i] and known[other]:
          both[i, j] = beliefs[i, given[other]] * beliefs[other, given[i]] / 3
    np.testing.assert_allclose(of(labels=given, beliefs=beliefs), both, rtol=1e-5)


@pytest.mark.guarantees("neighbors.weigh", "Weights are in [0, 1 / k]")
def test_weights_are_bounded():
  beliefs = np.random.default_rng(0).dirichlet(np.ones(3), 4).astype(np.float32)
  for kernel in ("uniform", "inverse_distance", "gaussian"):
    weights = ranger.neighbors.weigh(line(), kernel=kernel, beliefs=beliefs).weights
    assert (np.asarray(weights) >= 0).all()
    assert (np.asarray(weights) <= 1 / 3).all()


def head_weights(neighbors):
  """Those of the recipe's head, of as many examples as have neighbors."""
  n = len(neighbors.indices)
  of = lambda found: ranger.example_weights(ranger.ranger_head(), n, neighbors=found)
  return np.asarray(jax.jit(of)(neighbors))


@pytest.mark.guarantees(
  "neighbors.weigh", "An example whose neighbors all disagree with it has no"
)
def test_disagreement_takes_weight():
  neighbors = ranger.neighbors.weigh(line(), labels=np.array([0, 0, 0, 1]))
  weights = head_weights(neighbors)
  assert float(weights[3]) == 0
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


def test_beliefs_that_are_not_finite_weigh_nothing():
  beliefs = np.full([4, 2], 0.5, np.float32)
  beliefs[1] = np.nan
  weights = np.asarray(ranger.neighbors.weigh(line(), beliefs=beliefs).weights)
  assert np.isfinite(weights).all()
  assert not weights[1].any()


@pytest.mark.guarantees("neighbors.sample", "The expectation of the weights is kept")
def test_sampling_keeps_the_sum():
  """Over 4,000 draws the mean weighted sum is the whole one; half of it is not."""
  neighbors = ranger.neighbors.weigh(line(), kernel="gaussian")
  values = np.array([1.0, -2.0, 5.0, 3.0], np.float32)
  indices, weights = np.asarray(neighbors.indices), np.asarray(neighbors.weights)
  whole = (weights * values[indices]).sum(axis=1)

  @jax.jit
  @jax.vmap
  def one(key):
    drawn = ranger.neighbors.sample(key, neighbors, 2)
    return (drawn.weights * jnp.asarray(values)[drawn.indices]).sum(axis=1), drawn

  sums, drawn = jax.device_get(one(jax.random.split(jax.random.key(0), 4000)))
  error = sums.std(axis=0) / np.sqrt(4000)
  score = np.abs(sums.mean(axis=0) - whole) / error
  assert (score < 4).all()
  assert (np.abs(sums.mean(axis=0) - whole / 2) / error > 8).all()
  assert (drawn.indices[:, :, 0] != drawn.indices[:, :, 1]).all()
  # Distances are those of the neighbors that were drawn.
  distances = np.abs(POINTS[:, 0][drawn.indices] - POINTS[None])
  np.testing.assert_allclose(drawn.distances, distances, rtol=1e-6)
  # In the order that they had.
  places = (indices[None, :, :, None] == drawn.indices[:, :, None]).argmax(axis=2)
  assert (np.diff(places, axis=2) > 0).all()


def test_label_support_finds_flipped_labels():
  rng = np.random.default_rng(0)
  true = np.repeat(np.arange(3), 30)
  features = 4 * np.eye(3, 4)[true] + 0.5 * rng.standard_normal([90, 4])
  given = true.copy()
  wrong = rng.choice(90, 9, replace=False)
  given[wrong] = (given[wrong] + 1) % 3
  neighbors = ranger.neighbors.nearest(features.astype(np.float32), 10)
  support = np.asarray(ranger.labels.label_support(neighbors, given))
  assert set(np.argsort(support)[:9]) == set(wrong)
  assert (support >= 0).all()
  assert (support <= 1).all()


@pytest.mark.guarantees(
  "neighbors.weigh", "An example without a label has no weight, and supports no"
)
def test_examples_without_a_label_back_nobody():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(90, 4)).astype(np.float32)
  labels = np.where(rng.random(90) < 0.7, -1, (x[:, 0] > 0).astype(int))
  nearest = ranger.neighbors.nearest(x, 10)
  neighbors = ranger.neighbors.weigh(nearest, labels=labels)
  weights = head_weights(neighbors)
  np.testing.assert_array_equal(weights[labels < 0], 0)


EAGER = {
  "nearest": lambda x, y, b, found: ranger.neighbors.nearest(x, 3),
  "weigh": lambda x, y, b, found: ranger.neighbors.weigh(found, kernel="gaussian"),
  "weigh by labels": lambda x, y, b, found: ranger.neighbors.weigh(found, labels=y),
  "weigh by both": lambda x, y, b, found: ranger.neighbors.weigh(
    found, labels=y, beliefs=b, bandwidth=float(x[0, 0])
  ),
  "label_support": lambda x, y, b, found: ranger.labels.label_support(found, y),
  "neighbor_beliefs": lambda x, y, b, found: ranger.labels.neighbor_beliefs(found, b),
}


@pytest.mark.guarantees("neighbors.weigh", "It compiles itself, once for each shape")
@pytest.mark.few(3)
@pytest.mark.parametrize("name", EAGER)
def test_eager_calls_compile_once(name, caplog):
  """Outside of jit too: of new values nothing is compiled again."""

  def given(seed):
    rng = np.random.default_rng(seed)
    x, y = np.abs(rng.normal(size=(30, 4))).astype(np.float32), rng.integers(0, 3, 30)
    return x, y, rng.dirichlet(np.ones(3), 30).astype(np.float32)

  found = ranger.neighbors.nearest(given(0)[0], 3)
  first = EAGER[name](*given(1), found)
  caplog.clear()
  with jax.log_compiles():
    second = EAGER[name](*given(2), found)
  assert not [each for each in caplog.messages if "ompil" in each]
  inside = jax.jit(lambda *given: EAGER[name](*given))
  if name != "weigh by both":
    for eager, compiled in zip(
      jax.tree.leaves(second), jax.tree.leaves(inside(*given(2), found)), strict=True
    ):
      np.testing.assert_allclose(eager, compiled, rtol=1e-6, atol=1e-7)
  assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Explicit, "vmap", "shard_map"])
def test_weights_under_transformations(kind):
  """On an explicit mesh, mapped over graphs, and on each device for itself."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 8, 3)).astype(np.float32)
  y = rng.integers(-1, 2, (4, 8)).astype(np.int32)

  def weights_of(found, y):
    found = ranger.neighbors.weigh(found, labels=y, kernel="gaussian", bandwidth=1.0)
    return found.weights, ranger.labels.label_support(found, y)

  def weights(x, y):
    return weights_of(ranger.neighbors.nearest(x, 3), y)

  if isinstance(kind, str):
    alone = jax.jit(weights)
    expected = [alone(*each) for each in zip(x, y, strict=True)]
  if kind == "vmap":
    found = jax.vmap(weights)(x, y)
  elif kind == "shard_map":
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), auto, devices=jax.devices()[:4])
    split = jax.P("data")
    one = lambda x, y: jax.tree.map(lambda leaf: leaf[None], weights(x[0], y[0]))
    with jax.set_mesh(mesh):
      found = jax.jit(jax.shard_map(one, in_specs=split, out_specs=split))(x, y)
  else:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    found = ranger.neighbors.nearest(x[0], 3)
    expected = [jax.jit(weights_of)(found, y[0])]
    found, labels = jax.device_put((found, y[0]), rows)
    with jax.set_mesh(mesh):
      found = weights_of(found, labels)
    assert found[0].sharding.is_equivalent_to(rows, 2)
    found = jax.tree.map(lambda leaf: np.asarray(leaf)[None], found)
  for place, wanted in enumerate(zip(*expected, strict=True)):
    np.testing.assert_allclose(found[place], np.stack(wanted), rtol=1e-5)

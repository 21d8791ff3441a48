"""Beliefs from witnesses that have not seen the label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy import special

import optax_ranger as ranger
from optax_ranger._core import blocks
from optax_ranger.labels import _held_out

N = 120


def _clusters(n=N, classes=3, share=0.2, seed=0):
  rng = np.random.default_rng(seed)
  true = rng.integers(0, classes, n)
  points = 3 * np.eye(classes)[true] + 0.7 * rng.standard_normal([n, classes])
  labels = np.where(rng.random(n) < share, rng.integers(0, classes, n), true)
  return points.astype(np.float32), labels.astype(np.int32), true


def _held_out_of(points, labels, **more):
  more = {"num_classes": 3, "num_random": 64, **more}
  return np.asarray(ranger.labels.held_out_beliefs(points, labels, **more))


@jax.jit
def _kernel(points, labels, taught):
  """The kernel's part, with its random features, as in the library."""
  normals = jax.random.normal(jax.random.key(0), [points.shape[1], 16])
  view = _held_out._View(normals, jnp.linspace(0, 6, 16), jnp.arange(3))
  ids = jnp.arange(len(points), dtype=jnp.int32)
  block = _held_out._Block(points, labels, taught, ids)
  seen, origin = view(block), jnp.full([16], 0.1)
  start = tuple(jnp.zeros(shape) for shape in ([16], [3], [16, 16], [16, 3]))
  learned = _held_out._learn((view, origin), start, block)
  return seen, _held_out._Kernel.of(origin, learned, taught.sum())


@jax.jit
def _predict(kernel, seen, ridge):
  return kernel.fit(ridge).predict(seen)


@jax.jit
def _ask(seen):
  return _held_out._Near.of(seen).ask(seen)


@pytest.mark.guarantees(
  "labels.held_out_beliefs", "The kernel's part equals refitting without the example"
)
def test_the_kernel_equals_refitting():
  points, labels, _ = _clusters()
  taught = np.arange(N) % 7 != 3
  seen, kernel = _kernel(points, labels, taught)
  ridge = 0.1
  found = np.asarray(_predict(kernel, seen, ridge))
  table, label = np.asarray(seen.table, float), np.asarray(seen.label, float)
  penalty = ridge * np.trace(np.asarray(kernel.gram, float)) / 16
  for i in range(N):
    others = taught & (np.arange(N) != i)
    # An intercept that is not penalized, as one more column.
    own = np.c_[table, np.ones(N)]
    gram = own[others].T @ own[others] + penalty * np.diag([1.0] * 16 + [0.0])
    weights = np.linalg.solve(gram, own[others].T @ label[others])
    np.testing.assert_allclose(found[i], own[i] @ weights, atol=2e-3)


@pytest.mark.guarantees(
  "labels.held_out_beliefs",
  "An example's row does not depend on its own label, but for",
)
def test_own_label_is_not_seen():
  points, labels, _ = _clusters()
  taught = np.ones(N, bool)
  seen, kernel = _kernel(points, labels, taught)
  before = np.asarray(_predict(kernel, seen, 0.1))
  changed = labels.copy()
  changed[5] = (labels[5] + 1) % 3
  seen, kernel = _kernel(points, changed, taught)
  after = np.asarray(_predict(kernel, seen, 0.1))
  np.testing.assert_allclose(after[5], before[5], atol=1e-4)
  assert np.abs(after - before).max() > 1e-3
  blank = np.array(seen.label)
  blank[5] = 0
  near = [np.asarray(_ask(s)[0]) for s in (seen, seen._replace(label=blank))]
  # But for the share of each class, which all examples get as one vote.
  np.testing.assert_allclose(near[0][5], near[1][5], atol=0.01)


def test_wrong_labels_are_contradicted():
  points, labels, true = _clusters(share=0.4)
  beliefs = _held_out_of(points, labels)
  np.testing.assert_allclose(beliefs.sum(axis=1), 1, atol=1e-5)
  assert (beliefs.argmax(axis=1) == true).mean() > 0.95


@pytest.mark.guarantees(
  "labels.held_out_beliefs", "Neither the features nor the labels of non-finite rows"
)
def test_bad_rows_change_nothing():
  points, labels, _ = _clusters()
  more, given = points.copy(), labels.copy()
  more[50:53], more[51], given[50:53] = np.nan, np.inf, [0, 1, 2]
  more[53], given[53] = points[0], -1
  settings = {"num_keys": 1000, "num_random": 64}
  found = _held_out_of(more, given, **settings)
  assert not found[50:53].any()
  np.testing.assert_allclose(found[53].sum(), 1, atol=1e-5)
  assert np.isfinite(found).all()
  # Neither what stands in bad rows nor their labels reach the others.
  other, labels_of_bad = more.copy(), given.copy()
  other[50:53] = [[np.inf, 0, 0], [1, np.nan, 2], [-np.inf, 1, 1]]
  labels_of_bad[50:53] = [2, -1, 0]
  again = _held_out_of(other, labels_of_bad, **settings)
  np.testing.assert_array_equal(again, found)
  more[50:53] = 1e30
  assert np.isfinite(_held_out_of(more, given)).all()


@pytest.mark.few(2)
@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_few_examples(n):
  points, labels, _ = _clusters(n=5)
  found = _held_out_of(points[:n], labels[:n])
  assert found.shape == (n, 3)
  assert np.isfinite(found).all()


def test_all_alike_and_without_labels():
  same = np.ones([N, 3], np.float32)
  found = _held_out_of(same, np.arange(N) % 3)
  np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
  found = _held_out_of(same, np.full(N, -1))
  assert np.isfinite(found).all()


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.float64, bool])
def test_types_of_features(dtype):
  points, labels, true = _clusters()
  points = (2 * points).round().astype(dtype) if dtype is not bool else points > 1.5
  found = _held_out_of(points, labels)
  assert found.dtype == np.float32
  assert (found.argmax(axis=1) == true).mean() > 0.8


def test_soft_labels_of_one_hot_rows_are_labels():
  points, labels, _ = _clusters()
  hard, soft = _held_out_of(points, labels), _held_out_of(points, np.eye(3)[labels])
  np.testing.assert_allclose(hard, soft, atol=1e-4)


def test_wrong_use_is_refused():
  points, labels, _ = _clusters(n=10)
  held_out = ranger.labels.held_out_beliefs
  with pytest.raises(ValueError, match=r"features must have shape \[n, d\]"):
    held_out(points[:, 0], labels, num_classes=3)
  with pytest.raises(ValueError, match="labels"):
    held_out(points, labels[:5], num_classes=3)
  with pytest.raises(ValueError, match="labels"):
    held_out(points, labels, num_classes=2)
  with pytest.raises(TypeError, match="complex"):
    held_out(points + 1j, labels, num_classes=3)
  with pytest.raises(TypeError, match="num_random"):
    held_out(points, labels, num_classes=3, num_random=2.5)


@pytest.mark.guarantees(
  "labels.mix_beliefs", "The weights are those of the greatest likelihood"
)
def test_the_mixture_is_the_likeliest():
  rng = np.random.default_rng(0)
  true = rng.integers(0, 3, 200)
  tables = [
    rng.dirichlet([1, 1, 1], 200) + strength * np.eye(3)[true]
    for strength in (0.2, 0.5, 0.0)
  ]
  tables = [table / table.sum(axis=1, keepdims=True) for table in tables]
  labels = np.where(rng.random(200) < 0.2, rng.integers(0, 3, 200), true)

  def unlikely(weights):
    weights = np.exp(weights) / np.exp(weights).sum()
    mixed = sum(w * table for w, table in zip(weights, tables, strict=True))
    return -np.log(mixed[np.arange(200), labels]).sum()

  best = optimize.minimize(unlikely, np.zeros(3), method="Nelder-Mead").x
  weights = np.exp(best) / np.exp(best).sum()
  expected = sum(w * table for w, table in zip(weights, tables, strict=True))
  found = jax.jit(ranger.labels.mix_beliefs)(tables, labels)
  np.testing.assert_allclose(found, expected, atol=0.02)
  # Beliefs may be of any scale, row by row.
  scaled = [rng.uniform(0.1, 9, [200, 1]) * table for table in tables]
  again = jax.jit(ranger.labels.mix_beliefs)(scaled, labels)
  np.testing.assert_allclose(again, found, rtol=1e-4)


def test_a_mixture_needs_no_further_table():
  table = jax.ShapeDtypeStruct([50_000, 20], jnp.float32)
  labels = jax.ShapeDtypeStruct([50_000], jnp.int32)
  mix = lambda a, b, labels: ranger.labels.mix_beliefs([a, b], labels)
  compiled = jax.jit(mix).lower(table, table, labels).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 50_000 * 20 * 4


def test_a_mixture_of_what_is_there():
  mix = jax.jit(lambda *tables: ranger.labels.mix_beliefs(tables, np.array([1, 1, 1])))
  there = np.array([[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]])
  found = mix(there, np.array([[0.25, 0.75], [0.25, 0.75], [np.nan, 1.0]]))
  found = np.asarray(found)
  np.testing.assert_allclose(found[1], [0.25, 0.75], atol=1e-6)
  np.testing.assert_array_equal(found[2], [0, 0])
  np.testing.assert_array_equal(mix(there), there)
  # The other gives the first label no chance: it has no weight, but the second row.
  other = np.array([[1.0, 0.0], [0.25, 0.75], [0.0, 0.0]])
  found = mix(there, other)
  np.testing.assert_allclose(found, [[0.5, 0.5], [0.25, 0.75], [0, 0]], atol=1e-6)
  with pytest.raises(ValueError, match="at least one"):
    mix()
  with pytest.raises(ValueError, match="beliefs"):
    mix(there, other[:2])


@pytest.mark.guarantees(
  "labels.clean_beliefs", "With the identity they are the beliefs"
)
def test_no_confusion_no_change():
  beliefs = np.random.default_rng(0).dirichlet([1, 1, 1], 20)
  found = jax.jit(ranger.labels.clean_beliefs)(beliefs, np.eye(3))
  np.testing.assert_allclose(found, beliefs, atol=1e-5)


@pytest.mark.guarantees(
  "labels.clean_beliefs", "Passed through the confusion, they give the beliefs, where"
)
def test_clean_beliefs_explain_the_beliefs():
  rng = np.random.default_rng(1)
  confusion = 0.7 * np.eye(4) + 0.3 * rng.dirichlet([1] * 4, 4)
  true = rng.dirichlet([0.5] * 4, 50)
  beliefs = true @ confusion
  clean = jax.jit(ranger.labels.clean_beliefs, static_argnames="steps")
  found = np.asarray(clean(beliefs, confusion, steps=2000))
  np.testing.assert_allclose(found @ confusion, beliefs, atol=1e-3)
  expected = beliefs
  for _ in range(30):
    expected = expected * ((beliefs / (expected @ confusion)) @ confusion.T)
  scaled = confusion * np.arange(1, 5)[:, None]  # Rows are normalized.
  np.testing.assert_allclose(clean(beliefs, scaled), expected, rtol=1e-3, atol=1e-5)
  blank = clean(np.zeros([50, 4]), confusion)
  np.testing.assert_array_equal(blank, 0)


@pytest.mark.slow
def test_a_bar_changes_nothing(monkeypatch):
  points, labels, _ = _clusters(n=90)
  monkeypatch.setattr(_held_out, "_BLOCK", 8)
  monkeypatch.setattr(_held_out, "_KEPT", 0)
  monkeypatch.setattr(blocks, "_AT_ONCE", 2)
  told = []

  def bar(items, what, progress):
    told.append((what, len(items)))
    return items

  monkeypatch.setattr(blocks.progress, "bar", bar)
  plain = _held_out_of(points, labels, num_random=32)
  assert not told
  found = _held_out_of(points, labels, num_random=32, progress=True)
  assert told == [("learning labels", 6), ("predicting labels", 6)]
  np.testing.assert_allclose(found, plain, atol=1e-5)
  recipe = ranger.robust_labels(3)
  known = recipe.init(points, labels, progress=True)
  assert ("judging labels", 1) in told
  other = jax.jit(recipe.init)(points, labels)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), known, other)
  # Under jit there is none.
  told.clear()
  jax.jit(lambda x: recipe.ask(known, x, labels, progress=True))(points)
  assert not told


@pytest.mark.slow
def test_a_ridge_without_a_factor_is_not_taken(monkeypatch):
  points, labels, _ = _clusters()
  monkeypatch.setattr(_held_out, "_RIDGES", (0.1,))
  expected = _held_out_of(points, labels, num_random=48)
  # Minus twice the mean eigenvalue: there is no Cholesky factor.
  monkeypatch.setattr(_held_out, "_RIDGES", (-2.0, 0.1))
  jax.clear_caches()
  np.testing.assert_array_equal(_held_out_of(points, labels, num_random=48), expected)
  jax.clear_caches()


@pytest.mark.parametrize("every", [6, 3], ids=["many", "fewer than are asked"])
def test_votes_equal_counting(every):
  points, labels, _ = _clusters()
  taught = (np.arange(N) % every != 2) == (every == 6)
  seen, _ = _kernel(points, labels, taught)
  shares = np.array([(labels[taught] == c).sum() + 1 / 3 for c in range(3)])
  away = np.linalg.norm(points[:, None] - points[None], axis=2)
  away[:, ~taught] = np.inf
  np.fill_diagonal(away, np.inf)
  order = np.argsort(away, axis=1)
  there = np.isfinite(np.sort(away, axis=1))[..., None]
  for k, found in zip((5, 10, 20, 50), _ask(seen), strict=True):
    votes = (np.eye(3)[labels[order]] * there)[:, :k].sum(axis=1)
    votes = votes + shares / shares.sum()
    np.testing.assert_allclose(found, votes / votes.sum(axis=1, keepdims=True), 1e-5)


def test_examples_without_a_label_are_keys_last():
  points, labels, _ = _clusters()
  labels[20:] = -1
  sizes = _held_out._Sizes(3, 16, 20)
  prepare = jax.jit(_held_out._prepare, static_argnums=3)
  _, near, _, _ = prepare(points, labels, jax.random.key(0), sizes)
  np.testing.assert_array_equal(np.sort(near.keys.ids), np.arange(20))
  np.testing.assert_array_equal(near.keys.taught, True)


def test_settings_are_those_given(monkeypatch):
  points, labels, _ = _clusters()
  told = []

  def beliefs(rows, given, key, sizes, bars):
    told.append((jax.random.key_data(key), sizes, bars))
    return rows

  monkeypatch.setattr(_held_out, "_beliefs", beliefs)
  for seed in (4, 5):
    _held_out_of(points, labels, num_random=16, num_keys=9, seed=seed, progress=True)
  _held_out_of(points, labels, num_keys=999)
  assert [(*sizes, bars) for _, sizes, bars in told] == [
    (3, 16, 9, True),
    (3, 16, 9, True),
    (3, 64, N, False),
  ]
  assert (told[0][0] != told[1][0]).any()


def test_keys_are_not_the_users():
  n = 6000  # More than there are keys, and than there are in a block.
  true = np.arange(n) % 3

  @jax.jit
  def draw():
    key = jax.random.split(jax.random.key(0))[0]
    normal = jax.random.normal(jax.random.key(7), [n, 3])
    return jax.random.bernoulli(key, 0.4, [n]), normal

  wrong, normal = jax.device_get(draw())
  points = 4 * np.eye(3, dtype=np.float32)[true] + normal
  given = np.where(wrong, (true + 1) % 3, true)
  beliefs = _held_out_of(points, given)
  assert (beliefs.argmax(axis=1) == true).mean() > 0.9


def test_the_width_is_of_rows_that_are_there():
  rng = np.random.default_rng(0)
  rows = rng.standard_normal([40, 8]).astype(np.float32)
  there = np.arange(40) % 3 != 0
  width = jax.jit(_held_out._width)
  # Elsewhere rows are zeros, which lie in the midst of the others.
  found = width(np.where(there[:, None], rows, np.float32(0)), there)
  own = rows[there]
  np.testing.assert_allclose(found, width(own, np.ones(len(own), bool)), rtol=1e-5)


@jax.jit
def _choose(points, labels, less):
  """What is chosen, with so much less on the diagonal."""
  seen, _ = _kernel(points, labels, jnp.ones(len(points), bool))
  start = tuple(jnp.zeros(shape) for shape in ([16], [3], [16, 16], [16, 3]))
  origin = jnp.full([16], 0.1)
  *others, gram, moments = _held_out._learn((None, origin), start, seen)
  learned = *others, gram - less * jnp.eye(16), moments
  near, taught = _held_out._Near.of(seen), jnp.int32(len(points))
  return _held_out._choose(near, origin, learned, taught)


@pytest.mark.parametrize(("size", "share", "place"), [(8, 0.0, 0), (148, 0.8, 3)])
def test_the_number_of_neighbors_is_that_of_the_likeliest_labels(size, share, place):
  """Few in small clusters, many where most labels are wrong."""
  rng = np.random.default_rng(0)
  cluster = np.repeat(np.arange(300 // size), size)
  n, true = len(cluster), cluster % 3
  points = 20 * rng.standard_normal([n // size, 8])[cluster]
  points = (points + rng.standard_normal([n, 8])).astype(np.float32)
  labels = np.where(rng.random(n) < share, rng.integers(0, 3, n), true)

  labels = labels.astype(np.int32)
  chosen = _choose(points, labels, np.float32(0))
  assert int(chosen.place) == place
  # The ridge and the sharpness, too.
  seen, kernel = _kernel(points, labels, np.ones(n, bool))
  likelihoods = np.array([
    [special.log_softmax(s * said, axis=1)[np.arange(n), labels].sum()
     for s in _held_out._SHARPNESSES]
    for said in (np.asarray(_predict(kernel, seen, r)) for r in _held_out._RIDGES)
  ])  # fmt: skip
  ridge, sharpness = np.unravel_index(likelihoods.argmax(), likelihoods.shape)
  assert chosen.sharpness == np.float32(_held_out._SHARPNESSES[sharpness])
  gram = np.asarray(kernel.gram, float)
  gram = gram + _held_out._RIDGES[ridge] * np.trace(gram) / 16 * np.eye(16)
  expected = np.linalg.solve(gram, np.asarray(kernel.moments, float))
  np.testing.assert_allclose(chosen.fit.weights, expected, rtol=1e-2, atol=1e-2)
  # Ridges without a Cholesky factor are not taken.
  values = np.linalg.eigvalsh(np.asarray(kernel.gram, float))
  less = np.float32(values[0] + 0.005 * values.mean())
  assert np.isfinite(_choose(points, labels, less).fit.weights).all()


def test_features_may_lie_anywhere():
  points, labels, _ = _clusters()
  moved = points + np.array([300, -2000, 5], np.float32)
  found, expected = _held_out_of(moved, labels), _held_out_of(points, labels)
  np.testing.assert_allclose(found, expected, atol=0.02)
  for size in (2.0**-100, 2.0**100):
    np.testing.assert_array_equal(_held_out_of(size * points, labels), expected)

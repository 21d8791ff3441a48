"""Neighbors' beliefs, the confusion they tell, and the loss it corrects."""

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import optax_ranger as ranger

# Numbers that are none, none at all, and those at the ends of the range.
ODD = (0.0, -0.0, 1.0, 0.25, 1e-30, 1e-38, 1e-45, 3e38, -1.0, np.nan, np.inf, -np.inf)


def odd(rng, *shape):
  """Mostly usable numbers, so that some rows are."""
  usual = rng.uniform(0, 1, shape)
  rows = np.where(rng.random(shape) < 0.3, rng.choice(ODD, shape), usual)
  return rows.astype(np.float32)


def problem(n=40, k=4, classes=3, seed=0):
  """Random neighbors, with an empty place, a far one and the example itself."""
  rng = np.random.default_rng(seed)
  indices = rng.integers(0, n, [n, k])
  indices[0, 0], indices[1, 1], indices[2, :2] = -1, n, 2
  weights = rng.uniform(0, 1, [n, k])
  weights[3], weights[4, :2], weights[5, 1] = 0, [np.nan, -1], np.inf
  beliefs = 7 * rng.dirichlet(np.ones(classes), n)
  beliefs[6], beliefs[7], beliefs[8, 0] = 0, np.nan, -1
  neighbors = ranger.Neighbors(
    indices.astype(np.int32), np.ones([n, k], np.float32), weights.astype(np.float32)
  )
  labels = rng.integers(-1, classes + 1, n).astype(np.int32)
  return neighbors, labels, beliefs.astype(np.float32)


# Jitted once: operation by operation, each shape would be compiled in pieces.
# Exponent, smoothing, sharpness and anchors are data: one program for all of them.
beliefs_of = jax.jit(ranger.labels.neighbor_beliefs)
confusion_program = jax.jit(
  lambda labels, beliefs, s, anchors: ranger.labels.label_confusion(
    labels, beliefs, sharpness=s, anchors=anchors
  )
)
corrected = lambda x, y, t, exponent=0.0, smoothing=0.0: (
  ranger.labels.forward_corrected_loss(x, y, t, exponent=exponent, smoothing=smoothing)
)
programs = jax.jit(corrected), jax.jit(jax.grad(lambda *a: corrected(*a).sum(), (0, 2)))


def confusion_of(labels, beliefs, sharpness, anchors=0.0):
  return confusion_program(labels, beliefs, *map(np.float32, (sharpness, anchors)))


def forward(*given, program=programs[0]):
  given = *given, *(0.0, 0.0)[len(given) - 3 :]
  return program(*given[:3], *map(np.float32, given[3:]))


def forward_slopes(*given):
  return forward(*given, program=programs[1])


def loop(neighbors, beliefs):
  beliefs = np.asarray(beliefs, np.float64)
  results = np.zeros_like(beliefs)
  for i, (indices, weights) in enumerate(
    zip(*map(np.asarray, (neighbors.indices, neighbors.weights)), strict=True)
  ):
    total, rows = 0.0, np.zeros(beliefs.shape[1])
    for j, weight in zip(indices, weights, strict=True):
      if j == i or not 0 <= j < len(beliefs) or not 0 < weight < np.inf:
        continue
      if not np.isfinite(beliefs[j]).all() or (beliefs[j] < 0).any():
        continue
      if beliefs[j].any():
        total, rows = total + weight, rows + weight * beliefs[j] / beliefs[j].sum()
    results[i] = rows / total if total else 0
  return results


@pytest.mark.guarantees(
  "labels.neighbor_beliefs", "The weighted mean of the others' normalized beliefs"
)
@pytest.mark.parametrize("seed", range(3))
def test_neighbor_beliefs_equal_a_loop(seed):
  neighbors, _, beliefs = problem(seed=seed)
  found = np.asarray(beliefs_of(neighbors, beliefs))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, loop(neighbors, beliefs), rtol=2e-6, atol=1e-7)
  assert not found[3].any()
  assert found[4].any()
  heavy = neighbors._replace(weights=3e38 * neighbors.weights)
  np.testing.assert_allclose(beliefs_of(heavy, beliefs), found, rtol=2e-6, atol=1e-7)


@pytest.mark.guarantees(
  "labels.neighbor_beliefs", "An example's row does not depend on its own belief"
)
def test_no_example_confirms_itself():
  """Even where the example is among its own neighbors."""
  neighbors, _, beliefs = problem()
  indices, ones = np.array(neighbors.indices), np.ones([40, 4], np.float32)
  indices[:, 0] = np.arange(40)
  neighbors = neighbors._replace(indices=indices, weights=ones)
  before = np.asarray(beliefs_of(neighbors, beliefs))
  assert before.any(axis=1).sum() > 30
  for i in range(0, 40, 7):
    changed = np.array(beliefs)
    changed[i] = [1, 0, 0]
    after = np.asarray(beliefs_of(neighbors, changed))
    np.testing.assert_array_equal(after[i], before[i])
    assert (after != before).any()
  alone = neighbors._replace(indices=indices[:, :1].repeat(4, axis=1))
  assert not np.asarray(beliefs_of(alone, beliefs)).any()


@pytest.mark.guarantees(
  "labels.neighbor_beliefs", "Rows are non-negative, and sum to one or are zeros, for"
)
def test_neighbor_beliefs_are_probabilities_or_none():
  rng = np.random.default_rng(0)
  neighbors = ranger.Neighbors(
    rng.integers(-2, 7, [999, 5, 3]).astype(np.int32),
    np.ones([999, 5, 3], np.float32),
    odd(rng, 999, 5, 3),
  )
  found = jax.jit(jax.vmap(ranger.labels.neighbor_beliefs))
  rows = np.asarray(found(neighbors, odd(rng, 999, 5, 2)))
  assert (rows >= 0).all()
  sums = rows.sum(axis=2)
  np.testing.assert_allclose(sums, rows.any(axis=2), rtol=1e-6)
  assert 0.1 < sums.mean() < 0.9


def test_neighbor_beliefs_need_no_copy_for_each_neighbor():
  def temporaries(k):
    shape = lambda dtype: jax.ShapeDtypeStruct((2000, k), dtype)
    neighbors = ranger.Neighbors(*map(shape, (jnp.int32, jnp.float32, jnp.float32)))
    beliefs = jax.ShapeDtypeStruct((2000, 50), jnp.float32)
    compiled = (
      jax.jit(ranger.labels.neighbor_beliefs).lower(neighbors, beliefs).compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(32) - temporaries(2) < 2000 * 30 * 50 * 4 / 8


@pytest.mark.guarantees(
  "labels.label_confusion", "Rows are non-negative and sum to one, for any input"
)
def test_confusion_rows_are_probabilities():
  """Traced, a sharpness that makes no sense is not refused."""
  rng = np.random.default_rng(0)
  labels = rng.integers(-2, 5, [999, 4]).astype(np.int32)
  sharpness = rng.choice([1e-3, 1, 2, 50, np.inf, np.nan, -1, 0], 999)
  confusion = lambda y, b, s: ranger.labels.label_confusion(y, b, sharpness=s)
  given = labels, odd(rng, 999, 4, 3), sharpness.astype(np.float32)
  found = np.asarray(jax.jit(jax.vmap(confusion))(*given))
  assert (found >= 0).all()
  np.testing.assert_allclose(found.sum(axis=2), 1, rtol=1e-6)
  assert 0.1 < (found == np.eye(3)).all(axis=(1, 2)).mean() < 0.9


@pytest.mark.guarantees(
  "labels.label_confusion", "With the true classes as beliefs it is their confusion"
)
@pytest.mark.parametrize("sharpness", [0.5, 1, 2.0, np.inf])
def test_confusion_of_true_classes_is_counted(sharpness):
  rng = np.random.default_rng(0)
  classes, labels = rng.integers(0, 3, [2, 200])
  counts = np.zeros([3, 3], np.float32)
  np.add.at(counts, (classes, labels), 1)
  beliefs = 3 * np.eye(3, dtype=np.float32)[classes]
  found = confusion_of(labels.astype(np.int32), beliefs, sharpness)
  np.testing.assert_allclose(found, counts / counts.sum(1, keepdims=True), rtol=3e-7)


def powers_for(relative, sharpness, anchors):
  """Those of each class, by a search through many."""
  powers = 1 / np.linspace(1 / sharpness, max(1 / sharpness, 1), 20_000)
  weights = np.where(relative > 0, relative, 0)[..., None] ** powers
  effective = weights.sum(axis=0) ** 2 / (weights**2).sum(axis=0)
  enough = effective >= anchors
  return powers[np.where(enough.any(axis=1), enough.argmax(axis=1), -1)]


@pytest.mark.parametrize(
  ("sharpness", "anchors"),
  [(0.5, 0), (1, 0), (8, 0), (np.inf, 0), (8, 60), (8, 9), (8, 999), (0.5, 999)],
)
def test_confusion_equals_numpy(sharpness, anchors):
  """An example without a label is no anchor, however confident."""
  _, labels, beliefs = problem(n=200)
  labels, beliefs = np.array(labels), np.array(beliefs)
  labels[9], beliefs[9] = -1, [5, 0, 0]
  used = (labels >= 0) & (labels < 3) & (beliefs >= 0).all(1) & beliefs.any(1)
  found = np.asarray(confusion_of(labels, beliefs, sharpness, anchors))
  labels, used = labels[used], beliefs[used].astype(np.float64)
  relative = used / used.sum(axis=1, keepdims=True)
  relative /= relative.max(axis=0)
  with np.errstate(divide="ignore"):
    powers = powers_for(relative, sharpness, anchors) if anchors else sharpness
  own = relative / relative.max(axis=1, keepdims=True)
  counts = (relative**powers * own**sharpness).T @ np.eye(3)[labels]
  expected = counts / counts.sum(1, keepdims=True)
  np.testing.assert_allclose(found, expected, rtol=4e-3 if anchors else 1e-5)
  if sharpness == np.inf:
    np.testing.assert_array_equal(found.max(axis=1), np.ones(3))
  if anchors == 60:
    assert ((powers > 1) & (powers < 8)).all()
    assert len(np.unique(powers)) == 3
  if anchors == 999:
    assert (powers == min(sharpness, 1)).all()


@pytest.mark.guarantees(
  "labels.label_confusion", "With few examples and uncertain beliefs, more anchors"
)
def test_few_examples_need_more_anchors():
  """40 of each class; classes are as clear as held-out predictions make them.

  The default has enough of them.
  """
  rng = np.random.default_rng(0)
  truth = 0.6 * np.eye(5) + 0.08
  default = jax.jit(ranger.labels.label_confusion)
  few = lambda labels, beliefs: confusion_of(labels, beliefs, 8.0)
  errors = []
  for _ in range(20):
    classes = np.repeat(np.arange(5), 40)
    labels = (rng.random([200, 1]) > truth.cumsum(axis=1)[classes]).sum(axis=1)
    logits = 2 * np.eye(5)[classes] + rng.normal(size=[200, 5])
    beliefs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = (estimate(labels, beliefs.astype("f")) for estimate in (default, few))
    errors.append([np.abs(each - truth).sum(axis=1).mean() for each in found])
  by_default, by_few = np.mean(errors, axis=0)
  assert by_default < 0.8 * by_few


@pytest.mark.guarantees(
  "labels.label_confusion", "As sharpness grows, the surest examples of a class"
)
def test_anchors_tell_the_rows():
  """A fifth are anchors; of the rest, whom half-belief leaves open, labels mislead."""
  rows = [[1, 0]] * 10 + [[0, 1]] * 10 + [[0.5, 0.5]] * 80
  beliefs = np.array(rows, np.float32)
  labels = np.array([0] * 8 + [1] * 2 + [1] * 10 + [0, 1] * 40)
  truth = np.array([[0.8, 0.2], [0.0, 1.0]])
  error = lambda s: np.abs(confusion_of(labels, beliefs, s) - truth).max()
  assert error(np.inf) == error(300.0) < 1e-7
  assert error(16.0) < error(8.0) < 0.02 < 0.1 < error(4.0) < error(2.0) < error(1.0)


@pytest.mark.guarantees(
  "labels.label_confusion", "The order of examples does not matter"
)
def test_order_does_not_matter():
  _, labels, beliefs = problem(n=200)
  expected = confusion_of(labels, beliefs, 2.0)
  for seed in range(3):
    order = np.random.default_rng(seed).permutation(200)
    found = confusion_of(labels[order], beliefs[order], 2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.guarantees(
  "labels.label_confusion", "Without a usable example it is the identity"
)
def test_nothing_known_is_the_identity():
  labels, rows = np.zeros([3], np.int32), np.ones([3, 2], np.float32)
  for given in (
    (labels, 0 * rows),
    (labels, np.float32(np.nan) * rows),
    (labels, -rows),
    (labels - 1, rows),
    (labels + 2, rows),
    (labels[:0], rows[:0]),
  ):
    np.testing.assert_array_equal(confusion_of(*given, 2.0), np.eye(2))
  beliefs = np.eye(3, dtype="f")[:1]
  found = confusion_of(np.array([2]), beliefs, 2.0)
  np.testing.assert_array_equal(found, [[0, 0, 1], [0, 1, 0], [0, 0, 1]])


def test_memorized_labels_hide_their_confusion():
  """What leave-one-out is for: own beliefs tell the identity, neighbors' the truth."""
  rng = np.random.default_rng(0)
  classes = np.repeat(np.arange(3), 200)
  truth = np.array([[0.75, 0.25, 0], [0, 1, 0], [0.1, 0, 0.9]])
  labels = (rng.random([600, 1]) > truth.cumsum(axis=1)[classes]).sum(axis=1)
  others = rng.integers(0, 200, [600, 20]) + 200 * classes[:, None]
  ones = jnp.ones([600, 20])
  neighbors = ranger.Neighbors(jnp.asarray(others, jnp.int32), ones, ones)
  memorized = np.eye(3, dtype="f")[labels]
  own = confusion_of(labels, memorized, 2.0)
  np.testing.assert_array_equal(own, np.eye(3))
  beliefs = beliefs_of(neighbors, memorized)
  error = lambda s: np.abs(confusion_of(labels, beliefs, s) - truth).max()
  assert error(8.0) < 0.08
  assert error(8.0) < error(2.0) < error(1.0)


@pytest.mark.guarantees(
  "labels.forward_corrected_loss",
  "The minimizer over noisy labels is the clean posterior",
)
def test_forward_loss_finds_the_clean_posterior():
  """Over all labels, weighted by their chance; by the closed form, and by descent."""
  rng = np.random.default_rng(0)
  clean = rng.dirichlet(np.ones(3), 4).astype(np.float32)
  truth = np.array([[0.6, 0.4, 0.0], [0.1, 0.8, 0.1], [0.3, 0.0, 0.7]], np.float32)
  noisy = clean @ truth

  @jax.jit
  @jax.value_and_grad
  def expected_loss(logits, confusion):
    of = lambda y: ranger.labels.forward_corrected_loss(
      logits, jnp.full([4], y, jnp.int32), confusion
    )
    return (noisy * jax.vmap(of, out_axes=1)(jnp.arange(3))).sum()

  @jax.jit
  def minimizer(confusion):
    step = lambda logits, _: (logits - 4 * expected_loss(logits, confusion)[1], None)
    return jax.nn.softmax(jax.lax.scan(step, jnp.zeros([4, 3]), length=3000)[0])

  entropy = -(noisy * np.log(noisy)).sum()
  value, slope = expected_loss(np.log(clean), truth)
  np.testing.assert_allclose(value, entropy, rtol=1e-6)
  np.testing.assert_allclose(slope, np.zeros([4, 3]), atol=1e-6)
  for _ in range(5):
    said = rng.dirichlet(np.ones(3), 4).astype(np.float32)
    divergence = (noisy * np.log(noisy / (said @ truth))).sum()
    value, slope = expected_loss(np.log(said), truth)
    np.testing.assert_allclose(value, entropy + divergence, rtol=1e-5)
    assert divergence > 0.01
  np.testing.assert_allclose(minimizer(truth), clean, atol=5e-3)
  # Without the correction it is the noisy one, which lies far off.
  np.testing.assert_allclose(minimizer(np.eye(3, dtype=np.float32)), noisy, atol=5e-3)
  assert np.abs(noisy - clean).max() > 0.1


@pytest.mark.guarantees(
  "labels.forward_corrected_loss",
  "With the identity it is the softmax cross-entropy, and",
)
def test_identity_is_cross_entropy():
  """Where the label is given up, too: the loss is 1e4 there, and has its gradient."""
  rng = np.random.default_rng(0)
  labels = jnp.asarray(rng.integers(0, 5, 20))
  ours = lambda x: ranger.labels.forward_corrected_loss(x, labels, jnp.eye(5))
  plain = lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels)
  both = lambda loss: jax.jit(lambda x: (loss(x), jax.grad(lambda x: loss(x).sum())(x)))
  ours, plain = both(ours), both(plain)
  for scale in (1.0, 30.0, 1e4):
    logits = jnp.asarray(scale * rng.standard_normal([20, 5]), jnp.float32)
    for actual, expected in zip(ours(logits), plain(logits), strict=True):
      np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.guarantees(
  "labels.forward_corrected_loss",
  "Finite logits have a finite loss and gradient, zeros in T",
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e38])
@pytest.mark.parametrize(
  "confusion",
  [
    [[1, 0], [1, 0]],
    [[0, 0], [0, 0]],
    [[np.nan, 1], [-1, 2]],
    [[1, 1e-38], [1e-45, 1]],
    [[1, np.inf], [3e38, 3e38]],
  ],
)
def test_forward_loss_stays_finite(scale, confusion):
  logits = np.array([[1, -1], [-1, 1], [0, 1], [1, -np.inf]], np.float32)
  logits = np.float32(scale) * logits if scale else np.zeros_like(logits)
  confusion = np.array(confusion, np.float32)
  for y, exponent, smoothing in itertools.product(
    (0, 1), (0, 1e-38, 1e-18, 0.5, 1), (0, 0.1, 1)
  ):
    given = logits, np.full([4], y, np.int32), confusion, exponent, smoothing
    value = np.asarray(forward(*given))
    assert np.isfinite(value).all()
    assert (value >= 0).all()
    slopes = forward_slopes(*given)
    assert np.isfinite(slopes[0]).all()
    assert not slopes[1].any()


def test_an_impossible_label_has_the_largest_loss_and_no_gradient():
  logits, confusion = ([[0.3, 0.7]] * 4, [[1, 0], [1, 0]])
  logits, confusion = np.array(logits, np.float32), np.array(confusion, np.float32)
  given = logits, np.ones([4], np.int32), confusion
  np.testing.assert_allclose(forward(*given), [87.3365] * 4, rtol=1e-5)
  assert not forward_slopes(*given)[0].any()
  np.testing.assert_allclose(forward(*given, 1), [1] * 4)
  assert not forward_slopes(*given, 0.5)[0].any()
  slope = forward_slopes(*given, 0.5, 0.1)[0]  # Of the smoothing: 0.1 (p - 1 / 2).
  np.testing.assert_allclose(slope, [[-0.0098688, 0.0098688]] * 4, rtol=1e-4)


@pytest.mark.guarantees(
  "labels.forward_corrected_loss",
  "An example without a label has zero loss and gradient",
)
def test_no_label_no_loss():
  logits = np.array([[1, 2], [np.nan, 1], [np.inf, 1], [np.nan, 1]], np.float32)
  for more in ((), (0.5, 0.1), (1.0, 1.0)):
    given = logits, np.array([-1, 2, -7, 1], np.int32), np.eye(2, dtype="f"), *more
    np.testing.assert_array_equal(forward(*given), [0, 0, 0, np.nan])
    np.testing.assert_array_equal(forward_slopes(*given)[0][:3], np.zeros([3, 2]))


def mixtures(n=50):
  """Logits, labels, a confusion matrix, and u in float64: some of it tiny."""
  rng = np.random.default_rng(0)
  logits = 9 * rng.standard_normal([n, 3]).astype(np.float32)
  labels = rng.integers(0, 3, n)
  confusion = np.array([[0.8, 0.2, 0.0], [0.0, 1.0, 0.0], [0.1, 0.0, 0.9]], np.float32)
  odds = np.exp(logits.astype(np.float64))
  chances = odds / odds.sum(axis=1, keepdims=True)
  u = (chances @ confusion.astype(np.float64))[np.arange(n), labels]
  return (logits, labels.astype(np.int32), confusion), u, chances


@pytest.mark.guarantees(
  "labels.forward_corrected_loss",
  "exponent=0 is the logarithm, exactly, and small",
)
def test_exponents_join_the_logarithm_at_zero():
  """And zero is the logarithm to the last bit, as if there were no exponent."""
  given, u, _ = mixtures()
  bare = jax.jit(
    lambda x, y, t: -jax.nn.logsumexp(jax.nn.log_softmax(x) + jnp.log(t.T[y]), axis=1)
  )
  np.testing.assert_array_equal(forward(*given), bare(*given))
  np.testing.assert_allclose(forward(*given), -np.log(u), rtol=1e-5, atol=1e-7)
  plain, slopes = forward(*given), forward_slopes(*given)[0]
  for exponent in (1e-38, 2e-38, 1e-20, 1e-18, 1e-12, 1e-7):
    close = {"rtol": 3e-6, "atol": 1e-7}
    np.testing.assert_allclose(forward(*given, exponent), plain, **close)
    np.testing.assert_allclose(forward_slopes(*given, exponent)[0], slopes, **close)
  for exponent in (1e-3, 0.1, 0.5, 0.9):
    expected = -np.expm1(exponent * np.log(u)) / exponent
    np.testing.assert_allclose(
      forward(*given, exponent), expected, rtol=1e-5, atol=1e-7
    )
    # Examples lose weight as they contradict.
    weighted = u[:, None] ** exponent * slopes
    found = forward_slopes(*given, exponent)[0]
    np.testing.assert_allclose(found, weighted, rtol=1e-5, atol=1e-6)


@pytest.mark.guarantees(
  "labels.forward_corrected_loss",
  "exponent=0 is the logarithm, exactly, and small",
)
def test_exponent_of_one_is_the_absolute_error():
  given, u, _ = mixtures()
  np.testing.assert_allclose(forward(*given, 1.0), 1 - u, rtol=1e-5, atol=1e-6)


@pytest.mark.guarantees(
  "labels.forward_corrected_loss",
  "With the identity it is the softmax cross-entropy, and",
)
def test_identity_with_an_exponent_is_gce():
  (logits, labels, _), _, chances = mixtures()
  own = chances[np.arange(50), labels]
  for q in (0.3, 0.7):
    found = forward(logits, labels, np.eye(3, dtype="f"), q)
    np.testing.assert_allclose(found, (1 - own**q) / q, rtol=1e-5, atol=1e-6)


@pytest.mark.guarantees(
  "labels.forward_corrected_loss", "The smoothing is what label smoothing adds"
)
def test_smoothing_is_added():
  """With the identity it is label smoothing, but for a factor."""
  given, _, chances = mixtures()
  for exponent in (0.0, 0.5):
    pull = forward(*given, exponent, 0.3) - forward(*given, exponent)
    expected = -0.3 * np.log(chances).mean(axis=1)
    np.testing.assert_allclose(pull, expected, rtol=1e-4, atol=1e-5)
  smooth = 0.7 * np.eye(3, dtype="f")[given[1]] + 0.1
  expected = -(smooth * np.log(chances)).sum(axis=1)
  found = 0.7 * forward(*given[:2], np.eye(3, dtype="f"), 0.0, 0.3 / 0.7)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  far = np.array([[1e38, -1e38, -1e38]] * 50, np.float32)
  assert np.isfinite(forward(far, *given[1:], 0.5, 1.0)).all()


def symmetric(rate, classes=10):
  """Each label goes to any of the others."""
  even = np.full([classes] * 2, rate / (classes - 1), np.float32)
  return np.where(np.eye(classes) > 0, 1 - rate, even).astype(np.float32)


spread_of = jax.jit(ranger.labels.confusion_spread)


@pytest.mark.guarantees(
  "labels.confusion_spread", "1 for symmetric noise of any rate, 0 for pairs"
)
def test_spread_tells_symmetric_noise_from_pairs():
  for rate in (1e-6, 0.2, 0.9):
    np.testing.assert_allclose(spread_of(symmetric(rate)), 1, rtol=1e-4)
    pairs = (1 - rate) * np.eye(10) + rate * np.roll(np.eye(10), 1, axis=1)
    assert spread_of(jnp.asarray(pairs, jnp.float32)) < 1e-4
  # The mean over wrong labels, not over classes that have some.
  mixed = np.eye(10)
  mixed[0] = symmetric(0.4)[0]
  mixed[1, 1:3] = 0.8, 0.2
  spread = spread_of(jnp.asarray(mixed, jnp.float32))
  np.testing.assert_allclose(spread, 2 / 3, rtol=1e-4)


def test_spread_of_few_classes():
  assert spread_of(np.eye(3)) == 0
  assert spread_of(symmetric(0.3, 2)) == 1
  for classes in (1, 2):
    assert spread_of(np.eye(classes)) == 0
  counts = spread_of(np.array([[9, 1, 1], [0, 5, 0], [2, 2, 8]]))
  assert (counts, counts.dtype) == (1, jnp.float32)


@pytest.mark.guarantees("labels.confusion_spread", "Renaming classes changes nothing")
def test_spread_of_renamed_classes():
  rng = np.random.default_rng(0)
  matrix = rng.dirichlet(np.ones(10), 10).astype(np.float32)
  names = rng.permutation(10)
  spread = spread_of(matrix)
  assert 0.5 < spread < 0.99
  np.testing.assert_allclose(spread_of(matrix[names][:, names]), spread, rtol=1e-5)
  np.testing.assert_allclose(spread_of(matrix * 7.0), spread, rtol=1e-5)


@pytest.mark.guarantees("labels.confusion_spread", "It is in [0, 1] for any input")
def test_spread_lies_between_zero_and_one():
  rng = np.random.default_rng(0)
  for _ in range(200):
    spread = spread_of(odd(rng, 4, 4))
    assert 0 <= spread <= 1
  for shape in ([2, 2], [1, 1]):
    assert 0 <= spread_of(odd(rng, *shape)) <= 1
  blank = spread_of(np.full([4, 4], np.nan))
  assert blank == 0
  assert spread_of(symmetric(0.5).astype(np.float16)).dtype == jnp.float32
  assert not np.any(jax.jit(jax.grad(ranger.labels.confusion_spread))(symmetric(0.5)))


@pytest.mark.guarantees(
  "labels.forward_corrected_loss", "Split over devices by rows, the same"
)
@pytest.mark.guarantees(
  "labels.label_confusion", "Split over devices by rows, the same"
)
@pytest.mark.guarantees(
  "labels.neighbor_beliefs", "Split over devices by rows, the same"
)
@pytest.mark.parametrize(
  ("kind", "whole"),
  [
    (AxisType.Explicit, "nothing"),
    pytest.param(AxisType.Auto, "nothing", marks=pytest.mark.slow),
    pytest.param(AxisType.Explicit, "beliefs", marks=pytest.mark.slow),
    pytest.param(AxisType.Explicit, "neighbors and labels", marks=pytest.mark.slow),
    pytest.param(AxisType.Auto, "neighbors and labels", marks=pytest.mark.slow),
    pytest.param(AxisType.Auto, "beliefs", marks=pytest.mark.slow),
  ],
)
def test_split_over_devices_the_same(kind, whole):
  neighbors, labels, beliefs = problem()
  logits = np.nan_to_num(3 * beliefs)
  confusion = confusion_of(labels, beliefs, 2.0)

  def everything(neighbors, labels, beliefs, logits, confusion):
    loss = lambda x: corrected(x, labels, confusion, 0.3, 0.1)
    support = ranger.labels.label_support(neighbors, labels)
    return (
      ranger.labels.neighbor_beliefs(neighbors, beliefs),
      ranger.labels.label_confusion(labels, beliefs),
      jax.value_and_grad(lambda x: loss(x).sum())(logits),
      ranger.labels.refine_targets(
        labels, beliefs, confusion=confusion, support=support
      ),
      support,
    )

  expected = jax.jit(everything)(neighbors, labels, beliefs, logits, confusion)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  if whole != "neighbors and labels":
    neighbors, labels = jax.device_put((neighbors, labels), rows)
  if whole != "beliefs":
    beliefs, logits = jax.device_put((beliefs, logits), rows)
  with jax.set_mesh(mesh):
    found = jax.jit(everything)(neighbors, labels, beliefs, logits, confusion)
  for actual, wanted in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(actual, wanted, rtol=2e-6, atol=1e-6)


def test_what_devices_send():
  """The beliefs once; the peaks, and one sum of the size of the confusion matrix."""
  neighbors, labels, beliefs = problem()
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  neighbors, labels, beliefs = jax.device_put((neighbors, labels, beliefs), rows)
  sent = lambda function, *args: [
    (each.kind, each.num_bytes, each.count)
    for each in ranger.training.collectives(jax.jit(function).lower(*args).compile())
  ]
  gathered = sent(ranger.labels.neighbor_beliefs, neighbors, beliefs)
  assert gathered == [("all-gather", 40 * 3 * 4, 1)]
  counted = sent(ranger.labels.label_confusion, labels, beliefs)
  # Sums of weights and of their squares, for each power that is tried.
  tried = ("all-reduce", 24, 1), ("all-reduce", 24, 12)
  assert sorted(counted) == [("all-reduce", 12, 1), *tried, ("all-reduce", 36, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_beliefs_and_logits_of_any_type(dtype):
  with jax.enable_x64(dtype == "float64"):
    neighbors, labels, _ = problem()
    given = jax.nn.one_hot(labels, 3).astype(dtype)
    expected = np.float64 if dtype == "float64" else np.float32
    beliefs = beliefs_of(neighbors, given)
    plain = beliefs_of(neighbors, given.astype(jnp.float32))
    np.testing.assert_allclose(beliefs, plain, rtol=1e-6)
    confusion = confusion_of(labels, given, 2.0)
    assert beliefs.dtype == confusion.dtype == expected
    if jnp.issubdtype(given.dtype, jnp.floating):
      loss = forward(given, labels, jnp.eye(3, dtype=bool))
      assert loss.dtype == expected
      wanted = optax.softmax_cross_entropy_with_integer_labels(
        given.astype(expected), jnp.clip(labels, 0, 2)
      )
      used = jnp.logical_and(labels >= 0, labels < 3)
      np.testing.assert_allclose(loss, jnp.where(used, wanted, 0), rtol=1e-6)


@pytest.mark.slow
def test_narrow_labels_are_no_trap():
  """Of 300 classes: 261 is not 5, though it is in eight bits."""
  labels, beliefs = jnp.array([5, 100], jnp.int8), jnp.eye(300)[jnp.array([5, 261])]
  found = np.asarray(confusion_of(labels, beliefs, 2.0))
  np.testing.assert_array_equal(found[[5, 261]].argmax(axis=1), [5, 100])
  np.testing.assert_array_equal((found > 0).sum(axis=1), np.ones(300))
  loss = forward(jnp.zeros([2, 300]), labels, jnp.eye(300))
  np.testing.assert_allclose(loss, np.log(300), rtol=1e-6)
  refine = jax.jit(
    lambda *args: ranger.labels.refine_targets(*args, support=jnp.ones([2]))
  )
  targets = refine(labels, beliefs)
  np.testing.assert_array_equal(targets, jnp.eye(300)[jnp.array([5, 100])])


@pytest.mark.slow
def test_one_class_and_no_examples():
  neighbors = ranger.Neighbors(
    jnp.array([[1], [0]]), jnp.ones([2, 1]), jnp.ones([2, 1])
  )
  ones, labels = jnp.ones([2, 1]), jnp.zeros([2], jnp.int32)
  np.testing.assert_array_equal(beliefs_of(neighbors, 9 * ones), ones)
  np.testing.assert_array_equal(confusion_of(labels, ones, 2.0), [[1]])
  loss = forward(ones, labels, jnp.ones([1, 1]))
  np.testing.assert_array_equal(loss, [0, 0])
  for n, k in ((0, 2), (3, 0)):
    empty = ranger.Neighbors(
      jnp.zeros([n, k], jnp.int32), jnp.zeros([n, k]), jnp.zeros([n, k])
    )
    found = beliefs_of(empty, jnp.ones([n, 4]))
    np.testing.assert_array_equal(found, np.zeros([n, 4]))
  none = jnp.zeros([0], jnp.int32)
  assert forward(jnp.ones([0, 2]), none, jnp.eye(2)).shape == (0,)


def test_no_gradient_flows_into_what_is_estimated():
  neighbors, labels, beliefs = problem()
  beliefs = np.where(np.isfinite(beliefs), beliefs, np.float32(0))
  of = lambda function: jax.jit(jax.grad(lambda b: (function(b) ** 2).sum()))(beliefs)
  assert not of(lambda b: ranger.labels.neighbor_beliefs(neighbors, b)).any()
  assert not of(lambda b: ranger.labels.label_confusion(labels, b)).any()
  assert not of(lambda b: ranger.labels.mix_beliefs([b, 2 * b + 1], labels % 3)).any()
  confusion = 0.5 * np.eye(beliefs.shape[1], dtype=np.float32) + np.float32(0.1)
  assert not of(lambda b: ranger.labels.clean_beliefs(b, confusion)).any()
  assert not of(lambda b: ranger.labels.target_support(neighbors, b, scale=1.0)).any()


def test_no_gradient_flows_into_smoothed_predictions():
  logits = np.random.default_rng(0).standard_normal([4, 3]).astype(np.float32)
  loss = lambda smoothed: ranger.labels.early_learning_regularizer(logits, smoothed)
  slope = jax.jit(jax.grad(lambda smoothed: loss(smoothed).sum()))
  slope = slope(np.full([4, 3], 1 / 3, np.float32))
  assert not slope.any()

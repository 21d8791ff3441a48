"""Targets that are numbers: support, robust scale, and the loss that takes it."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

import optax_ranger as ranger

NORMAL = 1.482602218505602
ODD = (0.0, -0.0, 1.0, -1e-45, 1e-38, 3e38, -3e38, np.nan, np.inf, -np.inf)

# Jitted once: operation by operation, each shape would be compiled in pieces.
scale_of = jax.jit(ranger.labels.robust_scale)
weighted_scale_of = jax.jit(
  lambda r, weights, center=None: ranger.labels.robust_scale(
    r, weights=weights, center=center
  )
)
support_of = jax.jit(ranger.labels.target_support)


N = 32  # Eight devices share them.


def problem(n=N, k=5, width=2, seed=0):
  """Neighbors with empty places and themselves, and targets of which some are none."""
  rng = np.random.default_rng(seed)
  indices, weights = rng.integers(-1, n + 1, [n, k]), rng.uniform(0, 1, [n, k])
  indices[2, :2] = 2
  weights[3], weights[4, :2], weights[5, 1] = 0, [np.nan, -1], np.inf
  targets = rng.standard_normal([n, width]).astype(np.float32)
  targets[7, 0], targets[8], targets[9, -1] = 1e4, np.nan, np.inf
  neighbors = ranger.Neighbors(
    indices.astype(np.int32), np.ones([n, k], np.float32), weights.astype(np.float32)
  )
  return neighbors, targets


def median(values, weights):
  """Weighted, by going through the sorted values; None without any."""
  pairs = sorted(
    (value, weight)
    for value, weight in zip(values, weights, strict=True)
    if np.isfinite(value) and 0 < weight < np.inf
  )
  if not pairs:
    return None
  half, total, low = sum(weight for _, weight in pairs) / 2, 0.0, None
  for value, weight in pairs:
    total += weight
    if total >= half and low is None:
      low = value
    if total > half:
      return (low + value) / 2
  raise AssertionError


def spread(values, weights, center=None):
  middle = median(values, weights) if center is None else center
  if middle is None:
    return 0.0
  away = np.abs(values - middle)
  half = median(away, weights)
  if half == 0:
    half = median(away[away > 0], weights[away > 0]) or 0.0
  return NORMAL * half


@pytest.mark.guarantees(
  "labels.robust_scale", "It equals a loop over sorted residuals, weights as"
)
@pytest.mark.few(1)
@pytest.mark.parametrize("seed", range(3))
def test_robust_scale_equals_a_loop(seed):
  rng = np.random.default_rng(seed)
  residuals = rng.standard_t(1.5, [21 + seed, 2])
  residuals[0, 0], residuals[1] = np.nan, np.inf
  weights = rng.integers(0, 4, 21 + seed).astype(np.float64)
  weights[:4] = [1, 2, np.nan, -1]
  given = residuals.astype(np.float32), weights.astype(np.float32)
  for center in (None, 0.5):
    wanted = [spread(residuals[:, j], weights, center) for j in range(2)]
    found = weighted_scale_of(*given, center)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
  usable = np.where(np.isfinite(weights) & (weights > 0), weights, 0).astype(int)
  repeated = np.repeat(given[0], usable, axis=0)
  wanted = weighted_scale_of(*given)
  np.testing.assert_allclose(scale_of(repeated), wanted, rtol=1e-6)
  np.testing.assert_allclose(
    scale_of(given[0][:, 0]), spread(residuals[:, 0], np.ones(21 + seed)), rtol=1e-5
  )


@pytest.mark.guarantees(
  "labels.robust_scale", "Of normal residuals it is their standard deviation; with"
)
def test_robust_scale_of_normal_residuals():
  rng = np.random.default_rng(0)
  residuals = 7 * rng.standard_normal(20_000).astype(np.float32) + 3
  np.testing.assert_allclose(scale_of(residuals), 7, rtol=0.02)
  for wrong in (1e6, 3.0, -20.0, 1e30):
    spoiled = residuals.copy()
    spoiled[:8000] = wrong
    assert 2 < scale_of(spoiled) < 21


@pytest.mark.guarantees(
  "labels.robust_scale", "robust_scale(c * r) is c * robust_scale(r)"
)
@settings(max_examples=40, deadline=None)
@given(
  st.lists(st.integers(-50, 50), min_size=9, max_size=9),
  st.sampled_from([0.25, 1.0, 64.0]),
  st.integers(-8, 8),
)
def test_robust_scale_is_equivariant(residuals, factor, shift):
  residuals = np.array(residuals, np.float32)
  expected = factor * scale_of(residuals)
  np.testing.assert_allclose(scale_of(factor * residuals + shift), expected, rtol=1e-6)
  assert (expected > 0) == (np.ptp(residuals) > 0)


@pytest.mark.guarantees(
  "labels.robust_scale", "It is finite and not negative for whatever finite"
)
def test_odd_residuals_have_a_scale():
  rng = np.random.default_rng(0)
  for _ in range(50):
    residuals = rng.choice([*ODD[:5], 1e38, -1e38, *ODD[7:]], 9).astype(np.float32)
    scale = scale_of(residuals)
    assert np.isfinite(scale)
    assert scale >= 0
  assert scale_of(np.full([9], np.nan, np.float32)) == 0
  assert scale_of(np.zeros([0], np.float32)) == 0
  assert scale_of(np.zeros([0, 3], np.float32)).shape == (3,)
  # Six of nine are equal: of the others 1, 2 and 30.
  found = scale_of(np.array([5, 5, 5, 6, 5, 5, 7, 5, 35], np.float32))
  np.testing.assert_allclose(found, NORMAL * 2, rtol=1e-6)
  half = scale_of(np.array([1, 2, 4], np.float16))
  assert (half.dtype, half) == (jnp.float32, np.float32(NORMAL))
  whole = scale_of(np.array([1, 2, 4]))
  np.testing.assert_allclose(whole, NORMAL, rtol=1e-6)
  slopes = jax.jit(jax.grad(ranger.labels.robust_scale))(np.arange(5, dtype=np.float32))
  assert not slopes.any()


def test_wide_residuals_keep_their_type():
  with jax.enable_x64(True):
    scale = ranger.labels.robust_scale(jnp.array([1.0, 2.0, 4.0 + 1e-12]))
    assert scale.dtype == jnp.float64
    np.testing.assert_allclose(scale, NORMAL, rtol=1e-15)


def support_by_loop(neighbors, targets, scale=None):
  targets = np.asarray(targets, np.float64)
  (n, width), far = targets.shape, []
  middles, spreads = np.full([n, width], np.nan), np.zeros([n, width])
  for i, (indices, weights) in enumerate(
    zip(*map(np.asarray, (neighbors.indices, neighbors.weights)), strict=True)
  ):
    there = (indices >= 0) & (indices < n) & (indices != i)
    for j in range(width):
      values = targets[indices[there], j]
      middle = median(values, weights[there])
      if middle is not None:
        middles[i, j] = middle
        spreads[i, j] = NORMAL * median(np.abs(values - middle), weights[there])
  away = np.abs(targets - middles)
  for j in range(width):
    usual = spread(away[:, j], np.ones(n), 0.0) if scale is None else scale
    far.append(away[:, j] / np.hypot(usual, np.minimum(spreads[:, j], 3 * usual)) / 3)
  square = np.array(far).T ** 2
  known = np.isfinite(square)
  total = np.where(known, square, 0).sum(axis=1)
  return known.any(axis=1) / (1 + (total / np.maximum(known.sum(axis=1), 1)) ** 2)


@pytest.mark.guarantees("labels.target_support", "It equals a loop")
@pytest.mark.parametrize("scale", [None, np.float32(0.7)])
def test_target_support_equals_a_loop(scale):
  neighbors, targets = problem()
  for rows in (targets, targets[:, :1]):
    wanted = support_by_loop(neighbors, rows, scale)
    given = rows if rows.shape[1] == 2 else rows[:, 0]
    found = np.asarray(support_of(neighbors, given, scale=scale))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert (found[3], found[8]) == (0, 0)
    assert 0.3 < np.median(found) < 1


@pytest.mark.guarantees(
  "labels.target_support", "An example's own target does not move its median"
)
def test_no_target_confirms_itself():
  """Even where the example is among its own neighbors, and whatever its weight."""
  neighbors, targets = problem(width=1)
  targets = np.nan_to_num(targets[:, 0])
  indices = np.array(neighbors.indices)
  indices[:, 0] = np.arange(N)
  heavy = np.array(neighbors.weights)
  heavy[:, 0] = 1e6
  neighbors = neighbors._replace(indices=indices, weights=heavy)
  before = np.asarray(support_of(neighbors, targets, scale=np.float32(1)))
  for i in (0, 10, 20):
    changed = targets.copy()
    changed[i] = 1e6
    found = np.asarray(support_of(neighbors, changed, scale=np.float32(1)))
    assert found[i] < 1e-6 < before[i]


def test_target_support_finds_gross_errors():
  rng = np.random.default_rng(0)
  x = rng.uniform(-2, 2, [400, 2]).astype(np.float32)
  targets = np.sin(x[:, 0]) + x[:, 1] ** 2 + 0.1 * rng.standard_normal(400)
  wrong = rng.random(400) < 0.3
  targets = np.where(wrong, 10 * rng.standard_normal(400), targets)
  away = np.linalg.norm(x[:, None] - x[None], axis=2)
  nearest = away.argsort(axis=1)[:, 1:11].astype(np.int32)
  ones = np.ones([400, 10], np.float32)
  neighbors = ranger.Neighbors(nearest, ones, ones)
  support = np.asarray(support_of(neighbors, targets.astype(np.float32)))
  far = wrong & (np.abs(targets) > 6)
  assert support[far].mean() < 0.15
  assert np.median(support[~wrong]) > 0.95


@pytest.mark.guarantees("labels.target_support", "It is in [0, 1] for any input")
def test_target_support_of_odd_targets():
  rng = np.random.default_rng(0)
  neighbors, _ = problem()
  for width in (1, 2):
    for _ in range(20):
      targets = rng.choice(ODD, [N, width]).astype(np.float32)
      found = np.asarray(support_of(neighbors, targets, scale=None))
      assert np.isfinite(found).all()
      assert ((found >= 0) & (found <= 1)).all()
  alone = lambda targets: np.asarray(support_of(neighbors, targets, scale=None))
  equal = alone(np.full([N], 3.0, np.float32))
  there = np.arange(N) != 3
  np.testing.assert_array_equal(equal, there)
  one = np.zeros(N, np.float32)
  one[11] = 1
  assert alone(one)[11] < 1
  none = alone(np.full([N], np.nan, np.float32))
  np.testing.assert_array_equal(none, np.zeros(N))
  for n, k in ((0, 2), (3, 0)):
    zeros = np.zeros([n, k], np.float32)
    empty = ranger.Neighbors(zeros.astype(np.int32), zeros, zeros)
    found = support_of(empty, np.ones([n], np.float32))
    np.testing.assert_array_equal(found, np.zeros(n))
  whole = support_of(neighbors, np.arange(N))
  assert whole.dtype == jnp.float32


@pytest.mark.guarantees(
  "labels.target_support", "Shifted and scaled targets have the same"
)
def test_target_support_is_invariant():
  neighbors, targets = problem(width=1)
  whole = np.round(8 * np.nan_to_num(targets[:, 0], posinf=0)).astype(np.float32)
  support = lambda targets: support_of(neighbors, targets, scale=None)
  np.testing.assert_allclose(support(4 * whole + 16), support(whole), rtol=1e-5)


def loss_of(predictions, targets, scale, threshold=2.385, slope=1.0, mask=None):
  return ranger.labels.robust_regression_loss(
    predictions, targets, scale, threshold=threshold, slope=slope, mask=mask
  )


losses_of = jax.jit(loss_of)
total = lambda *given: loss_of(*given).sum()
value_and_slope = jax.jit(lambda *given: (loss_of(*given), jax.grad(total)(*given)))


@pytest.mark.guarantees(
  "labels.robust_regression_loss", "Loss and gradient equal their formulas"
)
@pytest.mark.parametrize("shape", [(20,), (20, 3), (20, 4, 3)])
def test_robust_loss_equals_its_formula(shape):
  rng = np.random.default_rng(0)
  predictions, targets = 3 * rng.standard_normal([2, *shape])
  scale = np.array([0.1, 1.0, 5.0]) if len(shape) > 1 else 0.7
  tau, r = 1.5 * scale, predictions - targets
  each = 0.3 * tau * np.log(1 + (r / tau) ** 2)
  size = np.prod(shape[1:])
  slopes = 0.3 * 2 * (r / tau) / (1 + (r / tau) ** 2) / size
  given = (jnp.asarray(array, jnp.float32) for array in (predictions, targets, scale))
  found = value_and_slope(*given, 1.5, 0.3)
  np.testing.assert_allclose(found[0], each.reshape(20, -1).mean(axis=1), rtol=1e-5)
  np.testing.assert_allclose(found[1], slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.guarantees(
  "labels.robust_regression_loss",
  "The slope is at most a, and falls beyond the threshold",
)
def test_gross_errors_pull_less():
  residuals = np.geomspace(1e-3, 1e9, 60).astype(np.float32)
  for scale in (0.01, 1.0, 100.0):
    _, slopes = value_and_slope(residuals, np.zeros(60, np.float32), scale, 2.0, 0.5)
    slopes = np.asarray(slopes)
    assert (slopes > 0).all()
    assert 0.45 < slopes.max() <= 0.5
    far = residuals > 2 * scale
    assert (np.diff(slopes[far]) < 0).all()
    assert (np.diff(slopes[~far]) > 0).all()


@pytest.mark.guarantees(
  "labels.robust_regression_loss",
  "For a large threshold it is the squared error over \\tau /",
)
def test_a_large_threshold_is_the_squared_error():
  residuals = np.linspace(-3, 3, 20).astype(np.float32)
  found = value_and_slope(residuals, np.zeros(20, np.float32), 2.0, 1e4, 5.0)
  np.testing.assert_allclose(found[0], 5 * residuals**2 / 2e4, rtol=1e-4)
  np.testing.assert_allclose(found[1], 10 * residuals / 2e4, rtol=1e-4)


@pytest.mark.guarantees(
  "labels.robust_regression_loss",
  "If predictions, targets and scale are multiplied by c",
)
@settings(max_examples=30, deadline=None)
@given(st.floats(-1e6, 1e6, width=32), st.sampled_from([2.0**-20, 0.5, 2.0**40]))
def test_robust_loss_is_equivariant(residual, factor):
  given = np.float32([residual, 1.0]), np.float32([0.0, 3.0])
  plain = value_and_slope(*given, 0.5)
  scaled = value_and_slope(*(np.float32(factor) * each for each in given), factor / 2)
  # Numbers below the least normal one are zero on a CPU.
  least = factor * np.finfo(np.float32).tiny
  np.testing.assert_allclose(scaled[0], factor * plain[0], rtol=1e-5, atol=least)
  np.testing.assert_allclose(scaled[1], plain[1], rtol=1e-5, atol=1e-30)


@pytest.mark.guarantees(
  "labels.robust_regression_loss", "Finite predictions have a finite loss and gradient"
)
@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-45, 1e-38, 1.0, 3e38, np.inf, np.nan])
def test_robust_loss_stays_finite(scale):
  predictions = np.array([0, 1e-45, 1e-38, 1, 3e38, -3e38] * 10, np.float32)
  targets = np.repeat(np.array(ODD, np.float32), 6)
  for threshold, slope in ((2.385, 1.0), (1e-30, 1.0), (1e30, 0.1)):
    for found in value_and_slope(predictions, targets, scale, threshold, slope):
      assert np.isfinite(found).all()
  bad = value_and_slope(np.float32([np.nan, np.inf, 1]), np.zeros(3, np.float32), 1.0)
  assert np.isnan(bad[0][0])
  assert np.isfinite(bad[0][2])
  assert np.isfinite(bad[1][2])


@pytest.mark.guarantees(
  "labels.robust_regression_loss", "Missing and masked targets are left out"
)
def test_targets_that_do_not_count():
  rng = np.random.default_rng(0)
  predictions, targets = rng.standard_normal([2, 5, 4]).astype(np.float32)
  mask = np.arange(20).reshape(5, 4) % 3 > 0
  targets[0, 1], targets[1], predictions[2, 0] = np.nan, np.inf, np.nan
  mask[3], mask[2, 0] = False, False
  given = predictions, targets, 0.5, 2.0, 1.0, mask
  found, slopes = map(np.asarray, value_and_slope(*given))
  counted = mask & np.isfinite(targets)
  for i in range(5):
    here = counted[i]
    each = np.asarray(losses_of(predictions[i][here], targets[i][here], 0.5, 2.0))
    wanted = each.mean() if here.any() else 0
    np.testing.assert_allclose(found[i], wanted, rtol=1e-6)
  assert found[1] == found[3] == 0
  np.testing.assert_array_equal(slopes != 0, counted)


def test_types_of_predictions_and_targets():
  given = np.array([1, 2], np.float16), np.array([1, 4]), np.float32(1.0), 2.0
  loss = losses_of(*given)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, [0, 2 * np.log(2)], rtol=1e-6)
  for shape in ([0, 2], [2, 0]):
    none = np.zeros(shape, np.float32)
    assert losses_of(none, none, 1.0).shape == (shape[0],)
  with jax.enable_x64(True):
    wide = losses_of(np.array([1.0]), np.array([2.0]), 1.0, 1.0)
    np.testing.assert_allclose(wide, np.log(2), rtol=1e-15)


ONES = np.ones([2, 1], np.float32)
NEIGHBORS = ranger.Neighbors(np.array([[1], [0]], np.int32), ONES, ONES)
TWO = jnp.asarray(np.zeros([2], np.float32))


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (
      lambda: loss_of(jnp.zeros([2, 1]), TWO, 1.0),
      ValueError,
      r"targets must have shape \[2, 1\], got \[2\]",
    ),
    (lambda: loss_of(TWO[0], TWO[0], 1.0), ValueError, r"shape \[n\] or .* got \[\]"),
    (lambda: loss_of(TWO, TWO, 0.0), ValueError, r"scale must lie in \(0, inf\]"),
    (lambda: loss_of(TWO, TWO, jnp.ones([2])), ValueError, "scale must be one number"),
    (lambda: loss_of(TWO, TWO, 1.0, np.inf), ValueError, r"threshold .* \(0, inf\)"),
    (lambda: loss_of(TWO, TWO, 1.0, 1.0, 0.0), ValueError, r"slope .* \(0, inf\)"),
    (
      lambda: loss_of(TWO, TWO, 1.0, mask=TWO),
      TypeError,
      "mask must hold booleans or integers, got float32",
    ),
    (lambda: loss_of(TWO.astype(complex), TWO, 1.0), TypeError, "must be real"),
    (
      lambda: ranger.labels.robust_scale(jnp.zeros([2, 2, 2])),
      ValueError,
      r"residuals must have shape \[n\] or \[n, d\], got \[2, 2, 2\]",
    ),
    (
      lambda: ranger.labels.robust_scale(TWO, weights=jnp.ones([3])),
      ValueError,
      r"weights must have shape \[2\], got \[3\]",
    ),
    (
      lambda: ranger.labels.target_support(NEIGHBORS, jnp.zeros([3])),
      ValueError,
      r"neighbors.indices must have shape \[3, k\]",
    ),
    (
      lambda: ranger.labels.target_support(NEIGHBORS, TWO, scale=-1),
      ValueError,
      r"scale must lie in \(0, inf\], got -1",
    ),
    (
      lambda: ranger.labels.target_support(NEIGHBORS, TWO[0]),
      ValueError,
      r"targets must have shape \[n\] or \[n, d\], got \[\]",
    ),
  ],
)
def test_refusals_of_regression(call, error, message):
  with pytest.raises(error, match=message):
    call()


@pytest.mark.guarantees(
  "labels.robust_regression_loss", "Split over devices by rows, the same"
)
@pytest.mark.guarantees("labels.robust_scale", "Split over devices by rows, the same")
@pytest.mark.guarantees("labels.target_support", "Split over devices by rows, the same")
@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("whole", ["nothing", "targets"])
def test_regression_split_over_devices(kind, whole):
  neighbors, targets = problem()
  rng = np.random.default_rng(1)
  predictions = rng.standard_normal([N, 2], np.float32)
  weights = rng.uniform(0, 1, N).astype(np.float32)

  def everything(neighbors, predictions, weights, targets):
    scale = ranger.labels.robust_scale(predictions - targets, weights=weights)
    one = ranger.labels.robust_scale(predictions[:, 0], center=0.0)
    loss = lambda x: loss_of(x, targets, scale)
    return (
      scale,
      one,
      jax.value_and_grad(lambda x: loss(x).sum())(predictions),
      loss(predictions),
      loss_of(predictions[:, 0], targets[:, 0], one),
      ranger.labels.target_support(neighbors, targets),
      ranger.labels.target_support(neighbors, targets[:, 0], scale=one),
    )

  # One by one, as other tests have compiled them.
  scale = weighted_scale_of(predictions - targets, weights)
  one = weighted_scale_of(predictions[:, 0], None, 0.0)
  losses, slopes = value_and_slope(predictions, targets, scale)
  expected = (
    scale,
    one,
    (losses.sum(), slopes),
    losses,
    losses_of(predictions[:, 0], targets[:, 0], one),
    support_of(neighbors, targets, scale=None),
    support_of(neighbors, targets[:, 0], scale=one),
  )
  given = neighbors, predictions, weights, jnp.asarray(targets)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  split = 4 if whole == "nothing" else 3
  given = *jax.device_put(given[:split], rows), *given[split:]
  with jax.set_mesh(mesh):
    found = jax.jit(everything)(*given)
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
    found,
    expected,
  )

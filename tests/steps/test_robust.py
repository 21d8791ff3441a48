"""Robust aggregation: oracles, identities, and where it breaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ranger as ranger
from tests.helpers import close

N = 9
# One of each kind, so that all tests share what is compiled.
MEDIAN = ranger.aggregate_by_median()
GEOMETRIC = ranger.aggregate_by_geometric_median()
MANY_ROUNDS = ranger.aggregate_by_geometric_median(rounds=100)
KRUM = ranger.aggregate_by_krum(2)
# Each with the most members of nine that may lie, and a number that breaks it.
ROBUST = {
  "median": (MEDIAN, 4, 5),
  "trimmed": (ranger.aggregate_by_trimmed_mean(0.34), 3, 4),
  "geometric": (GEOMETRIC, 4, 5),
  "krum": (ranger.aggregate_by_krum(3), 3, 5),
  "multi-krum": (ranger.aggregate_by_krum(3, 4), 3, 5),
}
SIZES = (1e1, 1e3, 1e6, 1e12, 1e30)
each_robust = pytest.mark.parametrize("name", sorted(ROBUST))


def draw(n=N, seed=0, shift=3.0):
  """Members around a common gradient, in two leaves of unlike rank."""
  rng = np.random.default_rng(seed)
  return {
    "w": (rng.standard_normal([n, 4, 3]) + shift).astype(np.float32),
    "b": (rng.standard_normal([n, 5]) - shift).astype(np.float32),
  }


def aggregate(step, rows, **extra):
  return jax.device_get(jax.jit(step.update)(rows, step.init({}), **extra))


def flat(rows):
  return np.concatenate(
    [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in rows.values()], 1
  )


def flat_one(tree, order):
  return np.concatenate([np.asarray(tree[k], np.float64).ravel() for k in order])


def corrupt(rows, count, size, way):
  """Replaces the first members: all at one far point, or each at its own."""
  rng = np.random.default_rng(5)
  bad = {}
  for key, leaf in rows.items():
    leaf = leaf.copy()
    if way == "opposite":
      leaf[:count] *= -size
    elif way == "together":
      leaf[:count] = size
    else:
      leaf[:count] = size * rng.standard_normal(leaf[:count].shape)
    bad[key] = leaf
  return bad


def median_oracle(column, weights):
  order = np.argsort(column)
  column, upper = column[order], np.cumsum(weights[order])
  half = upper[-1] / 2
  low = column[np.argmax(upper >= half)]
  high = column[np.argmax(upper > half)]
  return (low + high) / 2


def trimmed_oracle(column, weights, fraction):
  """Every member repeated as often as its weight says, times a hundred."""
  repeated = np.sort(np.repeat(column, np.round(100 * weights).astype(int)))
  cut = round(fraction * len(repeated))
  return repeated[cut : len(repeated) - cut].mean()


@pytest.mark.parametrize(
  "n",
  [
    1,
    pytest.param(2, marks=pytest.mark.slow),
    8,
    pytest.param(9, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fraction", [None, 0.1, 0.25, 0.4])
def test_order_statistics_equal_numpy(n, weighted, fraction):
  rows = draw(n)
  weights = np.random.default_rng(1).integers(0, 4, n).astype(np.float32)
  weights[0] = 1
  if not weighted:
    weights = np.ones(n, np.float32)
  step, oracle = MEDIAN, median_oracle
  if fraction is not None:
    step = ranger.aggregate_by_trimmed_mean(fraction)
    oracle = lambda column, weights: trimmed_oracle(column, weights, fraction)
  extra = {"member_weights": weights} if weighted else {}
  result, _ = aggregate(step, rows, **extra)
  keep = weights > 0
  for key, leaf in rows.items():
    columns = leaf[keep].reshape(keep.sum(), -1).astype(np.float64).T
    expected = [oracle(column, weights[keep]) for column in columns]
    close(np.ravel(result[key]), np.asarray(expected))


def weiszfeld(points, weights, steps=2000):
  """Many rounds in float64, from the coordinate-wise median."""
  z = np.median(points, axis=0)
  for _ in range(steps):
    pull = weights / np.maximum(np.linalg.norm(points - z, axis=1), 1e-12)
    z = pull @ points / pull.sum()
  return z


@pytest.mark.parametrize("size", [0.0, 10.0, 1e4, 1e7])
def test_geometric_median_equals_numpy(size):
  rows = draw()
  if size:
    rows = corrupt(rows, 3, size, "apart")
  weights = np.array([1, 1, 1, 2, 1, 1, 0, 2, 1], np.float32)
  result, _ = aggregate(MANY_ROUNDS, rows, member_weights=weights)
  points = flat(rows)
  expected = weiszfeld(points[weights > 0], weights[weights > 0])
  close(flat_one(result, rows), expected, 1e-3)


@pytest.mark.parametrize("shift", [1e3, 1e4])
def test_what_is_common_costs_no_precision(shift):
  """Members that differ by a thousandth of their length and less."""
  rows = corrupt(draw(shift=shift), 2, 100.0, "opposite")
  points = flat(rows)
  median, _ = aggregate(MANY_ROUNDS, rows)
  expected = weiszfeld(points, np.ones(N))
  assert np.abs(flat_one(median, rows) - expected).max() < 1e-2 + 1e-6 * shift
  krum, _ = aggregate(KRUM, rows)
  squared = ((points[:, None] - points[None]) ** 2).sum(axis=-1)
  scores = np.sort(squared, axis=1)[:, 1:6].sum(axis=1)
  close(flat_one(krum, rows), points[scores.argmin()])


@pytest.mark.parametrize("num_selected", [1, 3])
@pytest.mark.parametrize(
  "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))]
)
def test_krum_equals_numpy(num_selected, seed):
  rows = draw(seed=seed) if seed else corrupt(draw(), 2, 20.0, "apart")
  weights = np.array([1, 1, 1, 2, 1, 1, 1, 3, 1], np.float32)
  points = flat(rows)
  squared = ((points[:, None] - points[None]) ** 2).sum(axis=-1)
  nearest = N - 2 - 2
  scores = np.sort(squared, axis=1)[:, 1 : 1 + nearest].sum(axis=1)
  best = np.argsort(scores)[:num_selected]
  expected = np.average(points[best], axis=0, weights=weights[best])
  step = ranger.aggregate_by_krum(2, num_selected)
  result, _ = aggregate(step, rows, member_weights=weights)
  close(flat_one(result, rows), expected)


@pytest.mark.guarantees(
  "aggregate_by_median", "Breakdown point 1/2: while less than half of the weight is"
)
@pytest.mark.guarantees(
  "aggregate_by_trimmed_mean",
  "Breakdown point fraction: while at most that share of the",
)
@pytest.mark.parametrize("name", ["median", "trimmed"])
@pytest.mark.parametrize(
  "way",
  [
    "opposite",
    pytest.param("together", marks=pytest.mark.slow),
    pytest.param("apart", marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("size", SIZES)
def test_median_and_trimmed_mean_stay_in_the_honest_range(name, way, size):
  step, most, _ = ROBUST[name]
  rows = draw()
  result, _ = aggregate(step, corrupt(rows, most, size, way))
  for key, leaf in rows.items():
    honest = leaf[most:]
    room = 1e-5 * np.abs(honest).max()
    assert (result[key] >= honest.min(axis=0) - room).all()
    assert (result[key] <= honest.max(axis=0) + room).all()


@pytest.mark.guarantees(
  "aggregate_by_geometric_median",
  "Breakdown point 1/2: while less than half of the weight is",
)
@pytest.mark.guarantees(
  "aggregate_by_krum", "With at most num_corrupt corrupted members, each selected"
)
@pytest.mark.parametrize("name", ["geometric", "krum", "multi-krum"])
@pytest.mark.parametrize(
  "way",
  [
    "opposite",
    pytest.param("together", marks=pytest.mark.slow),
    pytest.param("apart", marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("size", SIZES)
def test_krum_and_geometric_median_stay_near_the_honest(name, way, size):
  step, most, _ = ROBUST[name]
  rows = draw()
  result, _ = aggregate(step, corrupt(rows, most, size, way))
  honest = flat(rows)[most:]
  diameter = np.linalg.norm(honest[:, None] - honest[None], axis=-1).max()
  away = np.linalg.norm(honest - flat_one(result, rows), axis=1).min()
  # Krum: sqrt(n - f - 2) = 2; the median: 4 of 9 may pull all the same way.
  assert away <= 2 * diameter


@pytest.mark.guarantees(
  "aggregate_by_geometric_median",
  "Breakdown point 1/2: while less than half of the weight is",
)
@pytest.mark.guarantees(
  "aggregate_by_krum", "With at most num_corrupt corrupted members, each selected"
)
@pytest.mark.guarantees(
  "aggregate_by_median", "Breakdown point 1/2: while less than half of the weight is"
)
@pytest.mark.guarantees(
  "aggregate_by_trimmed_mean",
  "Breakdown point fraction: while at most that share of the",
)
@each_robust
@pytest.mark.parametrize("size", [1e3, pytest.param(1e6, marks=pytest.mark.slow)])
def test_above_the_breakdown_point_it_breaks(name, size):
  step, _, too_many = ROBUST[name]
  rows = draw()
  result, _ = aggregate(step, corrupt(rows, too_many, size, "together"))
  honest = flat(rows)[too_many:]
  away = np.linalg.norm(honest - flat_one(result, rows), axis=1).min()
  assert away > size / 2


PLACES = [(10, 1), (10, 3)]
OTHERS = [
  (n, k)
  for n in range(3, 100)
  for k in range(1, n // 2)
  if np.float32(k / n) * np.float32(n) != k
]
BELOW = next(
  place
  for place in OTHERS
  if np.float32(place[1] / place[0]) * np.float32(place[0]) < place[1]
)


@pytest.mark.parametrize(
  ("n", "k"),
  [
    *PLACES,
    BELOW,
    *(
      pytest.param(*place, marks=pytest.mark.slow)
      for place in OTHERS[:: len(OTHERS) // 5]
    ),
  ],
)
def test_a_boundary_of_the_trimmed_share_lets_nobody_in(n, k):
  """Ten members, a tenth trimmed: the liar's share is zero, not a rounding error."""
  assert len(OTHERS) > 5
  rows, step = np.ones([n, 1], np.float32), ranger.aggregate_by_trimmed_mean(k / n)
  for size in (1e30, -1e30):
    rows[:k] = size
    result, _ = aggregate(step, rows)
    close(result, np.ones(1))


def test_half_of_the_weight_is_half_but_for_rounding():
  """Sums of a tenth in float32: of ten, five are a bit more or less than half."""
  rows = np.arange(10, dtype=np.float32)[:, None]
  for weight in (0.1, 0.3, 0.7):
    weights = np.full([10], weight, np.float32)
    result, _ = aggregate(MEDIAN, rows, member_weights=weights)
    close(result, np.full(1, 4.5))


def test_the_rounds_are_thirty_two():
  rows = {"a": np.array([[0, 0], [1, 0], [0, 1], [900, 900]], np.float32)}
  default, given, fewer = (
    aggregate(ranger.aggregate_by_geometric_median(*rounds), rows)[0]
    for rounds in ((), (32,), (16,))
  )
  np.testing.assert_array_equal(default["a"], given["a"])
  assert (default["a"] != fewer["a"]).any()


@each_robust
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_units_do_not_matter(name, scale):
  rows = draw()
  expected, _ = aggregate(ROBUST[name][0], rows)
  scaled = jax.tree.map(lambda leaf: leaf * np.float32(scale), rows)
  result, state = aggregate(ROBUST[name][0], scaled)
  for key in rows:
    close(result[key] / np.float32(scale), expected[key])
  assert int(state.num_dropped) == 0


@pytest.mark.guarantees(
  "aggregate_by_geometric_median",
  "A member whose largest entry is 2^40 times the median",
)
@pytest.mark.guarantees(
  "aggregate_by_krum", "A member whose largest entry is 2^40 times the median of"
)
@pytest.mark.parametrize("name", ["geometric", "krum", "multi-krum"])
def test_members_beyond_all_measure_are_absent(name):
  rows = draw()
  weights = (np.arange(N) != 2).astype(np.float32)
  expected, _ = aggregate(ROBUST[name][0], rows, member_weights=weights)
  rows["w"][2, 0, 0] = 3e38
  result, state = aggregate(ROBUST[name][0], rows)
  for key in rows:
    close(result[key], expected[key])
  assert int(state.num_dropped) == 1


MEAN = ranger.aggregate_by_mean()
WEIGHTS = np.array([1.0, 2.0, 0.0, 1.0, 1.0, 3.0, 1.0, 0.5, 1.0], np.float32)


def _is_the_mean(step):
  rows = draw()
  result, _ = aggregate(step, rows, member_weights=WEIGHTS)
  expected, _ = aggregate(MEAN, rows, member_weights=WEIGHTS)
  for key in rows:
    close(result[key], expected[key])


@pytest.mark.guarantees("aggregate_by_trimmed_mean", "fraction=0 is aggregate_by_mean")
def test_nothing_trimmed_is_the_mean():
  _is_the_mean(ranger.aggregate_by_trimmed_mean(0.0))


@pytest.mark.guarantees(
  "aggregate_by_geometric_median", "A large smoothing is aggregate_by_mean"
)
def test_smoothing_everything_is_the_mean():
  _is_the_mean(ranger.aggregate_by_geometric_median(smoothing=1e9))


@pytest.mark.guarantees(
  "aggregate_by_krum", "num_corrupt=0, num_selected=n is aggregate_by_mean"
)
def test_all_selected_is_the_mean():
  _is_the_mean(ranger.aggregate_by_krum(0, N))


def test_nearly_all_trimmed_is_the_median():
  step = ranger.aggregate_by_trimmed_mean(0.4999)
  for n in (8, 9):
    rows = draw(n)
    result, _ = aggregate(step, rows)
    expected, _ = aggregate(MEDIAN, rows)
    for key in rows:
      close(result[key], expected[key], 1e-3)


@each_robust
def test_identical_members_are_the_result(name):
  rows = jax.tree.map(lambda leaf: np.broadcast_to(leaf[:1], leaf.shape), draw())
  result, _ = aggregate(ROBUST[name][0], rows)
  for key, leaf in rows.items():
    close(result[key], leaf[0], 1e-6)
  result, _ = aggregate(ROBUST[name][0], jax.tree.map(np.zeros_like, rows))
  for leaf in result.values():
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_half_of_the_weight_at_one_point_holds_the_geometric_median():
  rows = draw()
  for leaf in rows.values():
    leaf[:5] = leaf[0]
  result, _ = aggregate(GEOMETRIC, rows)
  for key, leaf in rows.items():
    close(result[key], leaf[0], 2e-2)


@each_robust
def test_more_absent_than_present(name):
  """One member left: it is the result, whatever Krum would like to have."""
  rows = draw()
  for leaf in rows.values():
    leaf[np.arange(N) != 3] = np.nan
  result, state = aggregate(ROBUST[name][0], rows)
  for key, leaf in rows.items():
    close(result[key], leaf[3], 1e-6)
  assert int(state.num_dropped) == N - 1


@pytest.mark.slow
def test_temporaries_are_one_leaf_at_a_time():
  """Twenty leaves of 16 members: the robust steps hold a few, not all."""
  for name, (step, _, _) in ROBUST.items():
    temporaries = []
    for count in (1, 20):
      rows = {str(i): jnp.ones([16, 128, 128]) for i in range(count)}
      update = jax.jit(lambda rows, step=step: step.update(rows, step.init({})))
      compiled = update.lower(rows).compile()
      temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    one_leaf = 4 * 16 * 128 * 128
    assert temporaries[0] < 3.5 * one_leaf, name
    assert temporaries[1] < 5 * one_leaf, name

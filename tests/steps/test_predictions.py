"""Smoothed predictions and what is built on them, against oracles in NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

import optax_ranger as ranger

# Each kind, batch and type once; the rest is slow.
SHARDED = (
  ("split", AxisType.Explicit, "bfloat16"),
  ("whole", AxisType.Auto, "float32"),
)


# Steps with the same options share what is compiled.
smooth_predictions = functools.cache(ranger.smooth_predictions)
refine_targets = jax.jit(ranger.labels.refine_targets)
regularizer = jax.jit(ranger.labels.early_learning_regularizer)
slopes = jax.jit(jax.grad(lambda *args: regularizer(*args).sum(), argnums=(0, 1)))


def visit(step, state, ids, predictions):
  return jax.jit(step.update)(
    {}, state, predictions=predictions, example_ids=np.asarray(ids)
  )[1]


def test_predictions_equal_numpy():
  rng = np.random.default_rng(0)
  step = smooth_predictions(5, 3, decay=0.6)
  state, table = step.init({}), np.zeros([5, 3])
  for _ in range(20):
    ids = rng.permutation(5)[:2]
    predictions = rng.dirichlet(np.ones(3), 2).astype(np.float32)
    state = visit(step, state, ids, predictions)
    table[ids] = 0.6 * table[ids] + 0.4 * predictions
  np.testing.assert_allclose(ranger.smoothed_predictions(state), table, rtol=1e-5)


@pytest.mark.guarantees("smooth_predictions", "Only the rows of the given ids change")
def test_only_visited_rows_move():
  step = smooth_predictions(4, 2, decay=0.5)
  state = visit(step, step.init({}), [3, 1], np.full([2, 2], 0.5, np.float32))
  moved = np.asarray(ranger.smoothed_predictions(state)).any(axis=1)
  assert moved.tolist() == [False, True, False, True]


@pytest.mark.guarantees("smooth_predictions", "Repeated ids count as one visit")
def test_repeated_ids_are_one_visit():
  step = smooth_predictions(3, 2, decay=0.5)
  start = visit(step, step.init({}), [2], np.array([[1.0, 0.0]], np.float32))
  repeated = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], np.float32)
  several = visit(step, start, [2, 0, 2], repeated)
  once = visit(step, start, [2, 0], np.array([[0.5, 0.5], [0.5, 0.5]], np.float32))
  np.testing.assert_allclose(several.smoothed, once.smoothed)


@pytest.mark.guarantees(
  "smooth_predictions", "Non-finite predictions and ids out of range are dropped"
)
def test_bad_predictions_are_dropped():
  step = smooth_predictions(3, 2, decay=0.5)
  rows = np.array([[np.nan, 1], [1, 0], [1, 0], [1, 0], [1, 0]], np.float32)
  state = visit(step, step.init({}), [0, -2, 3, 2, -1], rows)
  np.testing.assert_array_equal(state.smoothed, [[0, 0], [0, 0], [0.5, 0]])
  assert int(state.num_dropped) == 3  # -1 is no example


def test_a_dropped_row_is_no_visit_of_its_id():
  step = smooth_predictions(3, 2, decay=0.5)
  rows = np.array([[np.nan, 1], [0.25, 0.75], [-1, 2]], np.float32)
  state = visit(step, step.init({}), [1, 1, 1], rows)
  np.testing.assert_array_equal(state.smoothed, [[0, 0], [0.125, 0.375], [0, 0]])
  assert int(state.num_dropped) == 2


def test_nothing_changes_for_what_is_not_present():
  step = smooth_predictions(3, 2, decay=0.5)
  rows = np.array([[np.nan, 1], [0.25, 0.75]], np.float32)
  before = visit(step, step.init({}), [1, 2], rows)
  _, after = jax.jit(step.update)(
    {}, before, predictions=rows, example_ids=np.array([1, 2]), present=False
  )
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_no_visit_changes_nothing():
  step = smooth_predictions(3, 2)
  state = visit(
    step, step.init({}), np.zeros([0], np.int32), np.zeros([0, 2], np.float32)
  )
  assert not state.smoothed.any()


def test_narrow_ids_are_no_trap():
  step = smooth_predictions(300, 1, decay=0.5)
  state = visit(
    step, step.init({}), np.array([5, 200], np.uint8), np.ones([2, 1], np.float32)
  )
  assert np.flatnonzero(state.smoothed).tolist() == [5, 200]


@pytest.mark.guarantees(
  "smooth_predictions", "On average, a bfloat16 table equals a float32 one"
)
@pytest.mark.parametrize("decay", [0.7, 0.99])
def test_half_precision_does_not_get_stuck(decay):
  """From 1 to the constant 0.75: rounded to the nearest, 0.99 would stay at 1."""
  rows = {}
  for dtype in ("float32", "bfloat16"):
    step = smooth_predictions(64, 2, decay, dtype=dtype)
    ids = jnp.arange(64)

    def body(state, value, step=step, ids=ids):
      predictions = jnp.stack([value, 1 - value])[None].repeat(64, axis=0)
      update = step.update({}, state, predictions=predictions, example_ids=ids)
      return update[1], None

    values = jnp.where(jnp.arange(1200) < 600, 1.0, 0.75).astype(jnp.float32)
    state, _ = jax.lax.scan(body, step.init({}), values)
    assert state.smoothed.dtype == dtype
    rows[dtype] = np.asarray(state.smoothed, np.float32)
  np.testing.assert_allclose(rows["bfloat16"].mean(axis=0), rows["float32"][0], 2e-3)
  # Each row by itself, too, wanders by a few places only.
  np.testing.assert_allclose(rows["bfloat16"], rows["float32"], rtol=0.05)


def test_rounding_at_random_is_fair():
  """The mean over rows is the number itself, not one of its two neighbors."""
  n, value = 20000, np.float32(1 / 3)
  step = smooth_predictions(n, 1, 0.0, dtype="bfloat16")
  rows = visit(step, step.init({}), np.arange(n), np.full([n, 1], value)).smoothed
  found = np.unique(np.asarray(rows, np.float32))
  assert len(found) == 2
  place = found[1] - found[0]
  error = np.asarray(rows, np.float64).mean() - value
  assert abs(error) < 4 * place / 2 / np.sqrt(n)
  # A fair coin would fail this: the number is not half-way between the two.
  assert abs(found.mean() - value) > 4 * place / 2 / np.sqrt(n)


@pytest.mark.guarantees(
  "smooth_predictions", "A table that is split over devices equals one on a single"
)
@pytest.mark.few(1)
@pytest.mark.parametrize(
  ("batch", "kind", "dtype"),
  [
    pytest.param(*form, marks=[pytest.mark.slow] * (form not in SHARDED))
    for form in itertools.product(
      ("split", "whole"), (AxisType.Auto, AxisType.Explicit), ("float32", "bfloat16")
    )
  ],
)
def test_sharded_tables_equal_one(dtype, kind, batch):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  plain = smooth_predictions(24, 3, dtype=dtype)
  step = smooth_predictions(24, 3, dtype=dtype, sharding=rows)
  expected, asked = plain.init({}), np.array([0, 3, 23, -1, 24, 5, 5, 7])
  with jax.set_mesh(mesh):
    state = jax.jit(step.init)({})
    assert state.smoothed.addressable_shards[0].data.shape == (3, 3)
    for seed in range(4):
      ids, predictions = _batch(seed)
      if batch == "split":
        ids, predictions = jax.device_put((ids, predictions), rows)
      _, state = jax.jit(step.update)(
        {}, state, predictions=predictions, example_ids=ids
      )
    assert state.smoothed.addressable_shards[0].data.shape == (3, 3)
    read = jax.jit(ranger.smoothed_predictions)(
      state, jax.device_put(asked, rows) if batch == "split" else asked
    )
  for seed in range(4):
    ids, predictions = _batch(seed)
    expected = visit(plain, expected, ids, predictions)
  close_to(state.smoothed, expected.smoothed)
  assert int(state.num_dropped) == int(expected.num_dropped) > 0
  whole = jax.jit(ranger.smoothed_predictions)(expected, asked)
  close_to(read, whole, expected.smoothed.dtype)


def close_to(actual, expected, dtype=None):
  """Equal but for the last place, and for one draw of it in half precision."""
  rtol = 1e-6 if (dtype or expected.dtype) == jnp.float32 else 2.0**-7
  actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
  np.testing.assert_allclose(actual, expected, rtol=rtol)


def _batch(seed):
  rng = np.random.default_rng(seed)
  return (
    rng.integers(-2, 27, 16).astype(np.int32),
    rng.dirichlet(np.ones(3), 16).astype(np.float32),
  )


@pytest.mark.parametrize(
  ("map_", "dtype"),
  [
    ("shard_map", "bfloat16"),
    pytest.param("shard_map", "float32", marks=pytest.mark.slow),
    pytest.param("pmap", "bfloat16", marks=pytest.mark.slow),
    pytest.param("pmap", "float32", marks=pytest.mark.slow),
  ],
)
def test_tables_split_by_hand_equal_one(dtype, map_):
  """Inside shard_map and pmap, with the ids of the whole data set."""
  plain = smooth_predictions(24, 3, dtype=dtype)
  step = smooth_predictions(24, 3, dtype=dtype, axis_name="data")
  expected = plain.init({})

  def update(state, ids, predictions):
    _, state = step.update({}, state, predictions=predictions, example_ids=ids)
    return state, ranger.smoothed_predictions(state, ids, axis_name="data")

  split = lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:])
  state = step.init({})
  if map_ == "pmap":
    spread = lambda leaf: jnp.stack([leaf] * 4) if leaf.ndim == 0 else split(leaf)
    state = jax.tree.map(spread, state)
    call = jax.pmap(update, axis_name="data", devices=jax.devices()[:4])
    run = lambda state, *args: call(state, *map(split, args))
  else:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    whole, rows = PartitionSpec(), PartitionSpec("data")
    spec = ranger.steps.PredictionState(whole, whole, rows)
    run = jax.jit(
      jax.shard_map(
        update, mesh=mesh, in_specs=(spec, rows, rows), out_specs=(spec, rows)
      )
    )
  for seed in range(3):
    ids, predictions = _batch(seed)
    state, read = run(state, ids, predictions)
    expected = visit(plain, expected, ids, predictions)
    rows = jax.jit(ranger.smoothed_predictions)(expected, ids)
    close_to(np.asarray(read).reshape(-1, 3), rows, jnp.dtype(dtype))
  assert np.unique(state.num_dropped).tolist() == [int(expected.num_dropped)]


def test_regularizer_equals_numpy_and_has_its_gradient():
  rng = np.random.default_rng(0)
  logits = rng.standard_normal([5, 4])
  smoothed = rng.dirichlet(np.ones(4), 5)

  def oracle(logits):
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.log(1 - (p * smoothed).sum(axis=1))

  given = logits.astype(np.float32), smoothed.astype(np.float32)
  np.testing.assert_allclose(regularizer(*given), oracle(logits), rtol=1e-5)
  gradient = jax.device_get(slopes(*given))
  step = np.zeros_like(logits)
  step[2, 1] = 1e-6
  slope = (oracle(logits + step) - oracle(logits - step)).sum() / 2e-6
  np.testing.assert_allclose(gradient[0][2, 1], slope, rtol=1e-3)
  assert not gradient[1].any()


def test_regularizer_stays_finite_at_full_agreement():
  logits, smoothed = np.eye(5, 4, dtype=np.float32) * 1e4, np.eye(5, 4, dtype="float32")
  value, gradient = regularizer(logits, smoothed), slopes(logits, smoothed)[0]
  np.testing.assert_allclose(value[:4], np.log(1e-4), rtol=1e-5)
  assert np.isfinite(gradient).all()
  half = regularizer(logits.astype(jnp.bfloat16), smoothed.astype(jnp.bfloat16))
  assert half.dtype == jnp.float32


ROWS = np.array(
  [[0.2, 0.8], [0, 0], [np.nan, 1], [np.inf, 1], [-1, 2], [1e-38, 1e-38], [3e38, 1]],
  np.float32,
)


@pytest.mark.guarantees(
  "labels.refine_targets", "Rows are non-negative and sum to one, for any input"
)
@pytest.mark.few(3)
@pytest.mark.parametrize("support", [None, 0.0, 1.0, 0.3, np.nan, 7.0])
@pytest.mark.parametrize(
  "confusion", [None, [[1, 0], [0, 1]], [[0, 0], [0, 0]], [[np.nan, 1], [1, 1]]]
)
def test_refined_targets_are_probabilities(support, confusion):
  for labels in ([0] * 7, [1] * 7, [-1] * 7, [2] * 7):
    targets = refine_targets(
      np.array(labels),
      ROWS,
      support=None if support is None else np.full([7], support, np.float32),
      confusion=None if confusion is None else np.array(confusion, np.float32),
    )
    targets = np.asarray(targets)
    assert (targets >= 0).all()
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)
    if 0 <= labels[0] < 2:  # No belief: the label stays.
      np.testing.assert_array_equal(targets[1:5, labels[0]], 1)
    else:  # No label: the belief is left.
      np.testing.assert_allclose(targets[0], ROWS[0], rtol=1e-5)


@pytest.mark.guarantees("labels.refine_targets", "support=1 is the label")
def test_full_support_keeps_the_label():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, 6)
  beliefs = rng.dirichlet(np.ones(4), 6).astype(np.float32)
  targets = refine_targets(labels, beliefs, support=np.ones([6], np.float32))
  np.testing.assert_array_equal(targets, np.eye(4)[labels])


@pytest.mark.guarantees(
  "labels.refine_targets", "With the true confusion and belief it is Bayes' posterior"
)
def test_refined_target_is_the_posterior():
  """Counted over a million draws of class, then of label."""
  rng = np.random.default_rng(0)
  prior = np.array([0.2, 0.3, 0.5])
  confusion = np.array([[0.8, 0.1, 0.1], [0.3, 0.7, 0.0], [0.0, 0.4, 0.6]])
  classes = rng.choice(3, 10**6, p=prior)
  labels = (rng.random([10**6, 1]) > confusion.cumsum(axis=1)[classes]).sum(axis=1)
  counts = np.zeros([3, 3])
  np.add.at(counts, (labels, classes), 1)
  expected = counts / counts.sum(axis=1, keepdims=True)
  targets = refine_targets(
    np.arange(3),
    np.stack([prior] * 3).astype(np.float32) * 7,
    confusion=confusion.astype(np.float32),
  )
  np.testing.assert_allclose(targets, expected, atol=5e-3)


def test_no_gradient_flows_through_targets():
  grad = jax.jit(jax.grad(lambda b: refine_targets(np.array([0]), b)[0, 0]))
  assert not np.asarray(grad(np.array([[0.3, 0.7]], np.float32))).any()


def test_wide_ids_move_no_row():
  step = smooth_predictions(4, 2)
  ids = np.array([2**32 + 1, 2**33 + 2, 7])
  predictions = np.array([[1.0, 0.0]] * 3)
  _, state = step.update({}, step.init({}), predictions=predictions, example_ids=ids)
  np.testing.assert_array_equal(state.smoothed, 0)


@pytest.mark.guarantees(
  "smooth_predictions", "Non-finite predictions and ids out of range are dropped"
)
@pytest.mark.parametrize(
  "ids",
  [
    np.array([2**32 + 1, 2**33 + 2, 7]),
    np.array([2**32 + 1, 2**63 + 2, 2**31], np.uint64),
    np.array([2**31 + 1, 2**32 - 1, 7], np.uint32),
    [2**32 + 1, -(2**32) + 1, 2**64 - 1],
    np.array([-(2**63), -(2**32) + 2, -3]),
  ],
  ids=["int64", "uint64", "uint32", "list", "negative"],
)
def test_wide_ids_are_dropped_and_counted(ids):
  step = smooth_predictions(4, 2)
  predictions = np.array([[1.0, 0.0]] * 3)
  _, state = step.update({}, step.init({}), predictions=predictions, example_ids=ids)
  np.testing.assert_array_equal(state.smoothed, 0)
  assert int(state.num_dropped) == 3
  full = state._replace(smoothed=jnp.ones_like(state.smoothed))
  np.testing.assert_array_equal(ranger.smoothed_predictions(full, ids), 0)


@pytest.mark.parametrize("dtype", ["int64", "uint64", "uint32"])
def test_wide_ids_are_dropped_when_traced(dtype):
  with jax.enable_x64(True):
    top = 2**31 if dtype == "uint32" else 2**32
    ids = jnp.array([top + 1, 2, top + 3], dtype)
    step = smooth_predictions(4, 2, decay=0.5)
    state = jax.jit(
      lambda ids: step.update(
        {}, step.init({}), predictions=jnp.full([3, 2], 0.5), example_ids=ids
      )[1]
    )(ids)
    assert np.flatnonzero(np.asarray(state.smoothed).any(axis=1)).tolist() == [2]
    assert int(state.num_dropped) == 2


@pytest.mark.parametrize("ids", [[1, None, 3], np.array([1, np.nan, 3]), (1, -1, 3)])
def test_missing_ids_are_no_examples(ids):
  step = smooth_predictions(4, 2)
  predictions = np.array([[1.0, 0.0]] * 3)
  _, state = step.update({}, step.init({}), predictions=predictions, example_ids=ids)
  moved = np.asarray(state.smoothed).any(axis=1)
  assert moved.tolist() == [False, True, False, True]
  assert int(state.num_dropped) == 0


@pytest.mark.parametrize("ids", [["a", "b", "c"], [0.5, 1, 2], jnp.zeros(3)])
def test_ids_must_be_integers(ids):
  step = smooth_predictions(4, 2)
  predictions = np.array([[1.0, 0.0]] * 3)
  with pytest.raises(TypeError, match="example_ids must hold integers"):
    step.update({}, step.init({}), predictions=predictions, example_ids=ids)


LOGITS = {
  "logits": [[2.0, -1.0, 0.5], [5.0, 3.0, 1.0], [-3.0, 2.0, 2.0]],
  "logits that sum to one": [[2.0, -1.0, 0.0], [3.0, -1.5, -0.5], [0.6, 0.6, -0.2]],
  "log-probabilities": np.log([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]),
  "scores": [[20.0, 30.0, 50.0], [0.2, 0.3, 0.3], [0.0, 0.0, 0.0]],
  "independent chances": [[0.9, 0.8, 0.1], [0.5, 0.5, 0.5], [0.1, 0.1, 0.1]],
}


@pytest.mark.guarantees(
  "smooth_predictions", "Logits are no probabilities: they are dropped and"
)
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_dropped_and_counted(kind, dtype):
  step = smooth_predictions(4, 3)
  rows = np.concatenate([LOGITS[kind], np.full([1, 3], 1 / 3)]).astype(jnp.dtype(dtype))
  state = visit(step, step.init({}), np.arange(4), rows)
  moved = np.asarray(state.smoothed).any(axis=1)
  assert moved.tolist() == [False, False, False, True]
  assert int(state.num_dropped) == 3


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_rounded_probabilities_are_kept(dtype, classes):
  """Softmax computed in half precision."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(200, classes), scale=4).astype(jnp.dtype(dtype))
  step = smooth_predictions(200, classes)
  softmax = jax.jit(jax.nn.softmax)(logits)
  state = visit(step, step.init({}), np.arange(200), softmax)
  assert int(state.num_dropped) == 0


def test_sums_are_near_one():
  """Up to a sixty-fourth; the decay is 0.7."""
  step = smooth_predictions(4, 2)
  rows = np.full([4, 2], 0.5, np.float32)
  rows[:, 1] += np.array([1 / 32, 1 / 80, -1 / 80, -1 / 32])
  state = visit(step, step.init({}), np.arange(4), rows)
  rows[[0, 3]] = 0
  np.testing.assert_allclose(state.smoothed, 0.3 * rows, rtol=1e-6)
  assert int(state.num_dropped) == 2


def test_one_column_is_a_chance():
  step = smooth_predictions(4, 1, decay=0.5)
  rows = np.array([[0.25], [-0.5], [1.03], [1.0]], np.float32)
  state = visit(step, step.init({}), np.arange(4), rows)
  np.testing.assert_array_equal(state.smoothed[:, 0], [0.125, 0, 0, 0.5])
  assert int(state.num_dropped) == 2

"""Step 5 against oracles in NumPy, and its guarantees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger


def test_ema_equals_numpy():
  step = ranger.smooth_by_ema(0.8)
  params, ema = jnp.array([1.0, -2.0]), np.array([1.0, -2.0])
  state = step.init(params)
  for i in range(10):
    updates, state = step.update(jnp.array([0.5, float(i)]), state, params)
    params = optax.apply_updates(params, updates)
    ema = 0.8 * ema + 0.2 * np.asarray(params)
  np.testing.assert_allclose(ranger.eval_params(state, params), ema, rtol=1e-6)


def test_ema_passes_updates_through():
  step, params = ranger.smooth_by_ema(0.5), {"w": jnp.ones([3])}
  given = {"w": jnp.array([1.0, np.nan, 2.0])}
  updates, _ = step.update(given, step.init(params), params)
  assert updates is given


def test_ema_without_decay():
  step, params = ranger.smooth_by_ema(0.0), jnp.ones([3])
  _, state = step.update(jnp.ones([3]), step.init(params), params)
  np.testing.assert_array_equal(ranger.eval_params(state, params), np.full(3, 2.0))


def test_ema_of_half_precision_moves():
  """2,000 steps from 1 to 2 with decay 0.999: 1.865, not 1."""
  step = ranger.smooth_by_ema(0.999)
  params = jnp.ones([1], jnp.bfloat16)
  state = step.init(params)
  _, state = step.update(jnp.ones([1], jnp.bfloat16), state, params)
  params = params + jnp.ones([1], jnp.bfloat16)

  def body(state, _):
    return step.update(jnp.zeros([1], jnp.bfloat16), state, params)[1], None

  state, _ = jax.lax.scan(body, state, length=1999)
  np.testing.assert_allclose(optax.tree.get(state, "ema"), [1.865], atol=1e-3)
  assert ranger.eval_params(state, params).dtype == jnp.bfloat16


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_ema_leaves_bad_entries_alone(value):
  step, params = ranger.smooth_by_ema(0.5), jnp.ones([3])
  _, state = step.update(jnp.array([1.0, value, 1.0]), step.init(params), params)
  np.testing.assert_array_equal(state.ema, [1.5, 1.0, 1.5])


def test_eval_params_through_any_nesting():
  params = {"w": jnp.ones([3]), "b": jnp.zeros([2])}
  ema = lambda: ranger.smooth_by_ema(0.5)
  labels = {"w": "smooth", "b": "plain"}
  nestings = {
    "chain": optax.chain(optax.sgd(1.0), ema()),
    "accumulate": ranger.accumulate(optax.chain(optax.sgd(1.0), ema()), 1),
    "inject": optax.inject_hyperparams(ranger.smooth_by_ema)(decay=0.5),
    "named": optax.named_chain(("sgd", optax.sgd(1.0)), ("ema", ema())),
  }
  for name, tx in nestings.items():
    updates, state = tx.update({"w": -jnp.ones([3]), "b": -jnp.ones([2])},
                               tx.init(params), params)  # fmt: skip
    new = optax.apply_updates(params, updates)
    smoothed = ranger.eval_params(state, new)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, params, new)
    for leaf in ("w", "b"):
      np.testing.assert_allclose(smoothed[leaf], expected[leaf], err_msg=name)

  partial = {
    "masked": optax.masked(ema(), {"w": True, "b": False}),
    "partition": optax.partition({"smooth": ema(), "plain": optax.identity()}, labels),
  }
  for name, tx in partial.items():
    updates, state = tx.update({"w": jnp.ones([3]), "b": jnp.ones([2])},
                               tx.init(params), params)  # fmt: skip
    new = optax.apply_updates(params, updates)
    smoothed = ranger.eval_params(state, new)
    np.testing.assert_allclose(smoothed["w"], np.full(3, 1.5), err_msg=name)
    np.testing.assert_allclose(smoothed["b"], new["b"], err_msg=name)

  two = optax.chain(ema(), ema())
  with pytest.raises(ValueError, match="2 smoothed copies"):
    ranger.eval_params(two.init(params), params)


def visit(step, state, ids, predictions):
  return step.update(
    {}, state, predictions=jnp.asarray(predictions), example_ids=jnp.asarray(ids)
  )[1]


def test_predictions_equal_numpy():
  rng = np.random.default_rng(0)
  step = ranger.smooth_predictions(5, 3, decay=0.6)
  state, table = step.init({}), np.zeros([5, 3])
  for _ in range(20):
    ids = rng.permutation(5)[:2]
    predictions = rng.dirichlet(np.ones(3), 2).astype(np.float32)
    state = visit(step, state, ids, predictions)
    table[ids] = 0.6 * table[ids] + 0.4 * predictions
  np.testing.assert_allclose(ranger.smoothed_predictions(state), table, rtol=1e-5)


def test_only_visited_rows_move():
  step = ranger.smooth_predictions(4, 2, decay=0.5)
  state = visit(step, step.init({}), [3, 1], np.full([2, 2], 0.5, np.float32))
  moved = np.asarray(ranger.smoothed_predictions(state)).any(axis=1)
  assert moved.tolist() == [False, True, False, True]


def test_repeated_ids_are_one_visit():
  step = ranger.smooth_predictions(3, 2, decay=0.5)
  start = visit(step, step.init({}), [2], np.array([[1.0, 0.0]], np.float32))
  repeated = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], np.float32)
  several = visit(step, start, [2, 0, 2], repeated)
  once = visit(step, start, [2, 0], np.array([[0.5, 0.5], [0.5, 0.5]], np.float32))
  np.testing.assert_allclose(several.smoothed, once.smoothed)


def test_bad_predictions_are_dropped():
  step = ranger.smooth_predictions(3, 2, decay=0.5)
  rows = np.array([[np.nan, 1], [1, 0], [1, 0], [1, 0]], np.float32)
  state = visit(step, step.init({}), [0, -1, 3, 2], rows)
  np.testing.assert_array_equal(state.smoothed, [[0, 0], [0, 0], [0.5, 0]])
  assert int(state.num_dropped) == 3


def test_no_visit_changes_nothing():
  step = ranger.smooth_predictions(3, 2)
  state = visit(
    step, step.init({}), np.zeros([0], np.int32), np.zeros([0, 2], np.float32)
  )
  assert not state.smoothed.any()


def test_narrow_ids_are_no_trap():
  step = ranger.smooth_predictions(300, 1, decay=0.5)
  state = visit(
    step, step.init({}), np.array([5, 200], np.uint8), np.ones([2, 1], np.float32)
  )
  assert np.flatnonzero(state.smoothed).tolist() == [5, 200]

"""Step 2 against the full batch and `optax.MultiSteps`, and its guarantees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger


def draw(count, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.standard_normal([3]).astype(np.float32) for _ in range(count)]


def run(step, gradients, params=None, **extra):
  """Calls `step` on each gradient; extra args are lists, one entry a call."""
  params = np.ones([3], np.float32) if params is None else params
  state, results = step.init(params), []
  update = jax.jit(step.update)
  for i, gradient in enumerate(gradients):
    args = {name: values[i] for name, values in extra.items()}
    updates, state = update(gradient, state, params, **args)
    results.append(updates)
  return results, state


@pytest.mark.guarantees("accumulate", "every=1 is inner")
def test_every_one_is_the_inner_optimizer():
  inner = optax.sgd(0.1, momentum=0.9)
  gradients = draw(5)
  results, _ = run(ranger.accumulate(inner, 1), gradients)
  expected, _ = run(optax.with_extra_args_support(inner), gradients)
  np.testing.assert_array_equal(np.stack(results), np.stack(expected))


@pytest.mark.parametrize(
  "inner", [optax.sgd(0.1, momentum=0.9), optax.adamw(0.1)], ids=["sgd", "adamw"]
)
def test_equals_multi_steps_on_clean_input(inner):
  gradients = draw(100)
  with jax.numpy_dtype_promotion("standard"):
    results, _ = run(ranger.accumulate(inner, 4), gradients)
  rival = optax.MultiSteps(inner, 4)
  params = jnp.ones([3])
  state = rival.init(params)
  update = jax.jit(rival.update)
  for gradient, result in zip(gradients, results, strict=True):
    with jax.numpy_dtype_promotion("standard"):
      updates, state = update(gradient, state, params)
    np.testing.assert_allclose(result, updates, rtol=1e-5, atol=1e-6)


@pytest.mark.guarantees(
  "accumulate", "With weights, the emission is the gradient of the sum of"
)
@pytest.mark.few(2)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 5), (4, 4), (3, 1, 4), (8,)])
def test_exact_for_any_partition(sizes):
  """Micro-batches of any sizes give the gradient of the whole batch's mean loss."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal([8, 3]).astype(np.float32)
  y = rng.standard_normal([8]).astype(np.float32)
  tokens = rng.integers(1, 9, 8).astype(np.float32)

  def gradient(rows):
    """Of the mean of `(x @ params - y) ** 2` over the tokens of these rows, at ones."""
    slopes = 2 * (x[rows].sum(axis=1) - y[rows])
    return (tokens[rows] * slopes) @ x[rows] / tokens[rows].sum()

  ends = np.cumsum(sizes)
  parts = [np.arange(e - s, e) for s, e in zip(sizes, ends, strict=True)]
  gradients = [gradient(rows) for rows in parts]
  step = ranger.accumulate(optax.identity(), len(sizes))
  results, _ = run(step, gradients, weight=[tokens[rows].sum() for rows in parts])
  np.testing.assert_allclose(results[-1], gradient(np.arange(8)), rtol=1e-5)


def test_sum_is_the_weighted_sum():
  gradients = draw(2)
  step = ranger.accumulate(optax.identity(), 2, reduce="sum")
  results, _ = run(step, gradients, weight=[2.0, 3.0])
  np.testing.assert_allclose(
    results[-1], 2 * gradients[0] + 3 * gradients[1], rtol=1e-6
  )


THREE = ranger.accumulate(optax.sgd(0.1, momentum=0.9), 3)


@pytest.mark.guarantees(
  "accumulate", "A non-finite micro-batch has weight zero and takes its"
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("bad_weight", [False, True])
def test_left_out_is_weight_zero(value, bad_weight):
  gradients, step = draw(6), THREE
  weights = [1.0, 2.0, 3.0, 1.0, 1.0, 1.0]
  zero = [*weights[:1], 0.0, *weights[2:]]
  expected, expected_state = run(step, gradients, weight=zero)
  if bad_weight:
    weights[1] = value
  else:
    gradients[1][0] = value
  results, state = run(step, gradients, weight=weights)
  np.testing.assert_array_equal(np.stack(results), np.stack(expected))
  assert int(state.num_left_out) == 1
  assert int(expected_state.num_left_out) == 0


@pytest.mark.guarantees(
  "accumulate", "A window of weight zero gives zeros and does not change"
)
def test_window_of_zero_weight():
  step = ranger.accumulate(optax.adam(0.1), 2)
  params = np.ones([3], np.float32)
  with jax.numpy_dtype_promotion("standard"):
    results, state = run(step, [np.full([3], np.nan, np.float32)] * 2)
  assert not np.any(results)
  assert int(state.gradient_step) == 0
  assert int(state.mini_step) == 0
  assert int(state.num_left_out) == 2
  for a, b in zip(
    jax.tree.leaves(state.inner_state),
    jax.tree.leaves(step.init(params).inner_state),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_last_flushes_a_partial_window_at_full_magnitude():
  gradients = draw(5)
  last = [False, True, False, False, True]
  step = ranger.accumulate(optax.identity(), 3)
  results, state = run(step, gradients, last=last)
  np.testing.assert_allclose(results[1], (gradients[0] + gradients[1]) / 2, rtol=1e-6)
  mean = (gradients[2] + gradients[3] + gradients[4]) / 3
  np.testing.assert_allclose(results[4], mean, rtol=1e-6)
  assert int(state.mini_step) == 0


def test_every_may_be_a_schedule_of_optimizer_steps():
  step = ranger.accumulate(optax.identity(), lambda count: 1 + count)
  results, state = run(step, draw(6))
  assert [bool(r.any()) for r in results] == [True, False, True, False, False, True]
  assert int(state.gradient_step) == 3


@pytest.mark.guarantees("accumulate", "inner runs on emission only")
def test_inner_runs_on_emission_only():
  """The inner update stands inside one branch of a conditional, and nowhere else."""
  inner = optax.GradientTransformation(
    lambda params: jnp.zeros([]), lambda u, s, p=None: (jnp.sin(u), s + 1)
  )
  step = ranger.accumulate(inner, 4)
  params = jnp.ones([3])
  jaxpr = jax.make_jaxpr(step.update)(params, step.init(params), params).jaxpr
  names = [equation.primitive.name for equation in jaxpr.eqns]
  assert "sin" not in names
  branches = [
    [
      "sin" in [each.primitive.name for each in branch.jaxpr.eqns]
      for branch in equation.params["branches"]
    ]
    for equation in jaxpr.eqns
    if equation.primitive.name == "cond"
  ]
  assert branches == [[False, False], [False, True]]  # Does it fit? Then step.
  _, state = run(step, draw(7))
  assert int(state.inner_state) == 1


def test_extra_args_reach_the_inner_update():
  seen = {}

  def update(updates, state, params=None, **extra_args):
    seen.update(extra_args)
    return updates, state

  inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
  step = optax.chain(ranger.accumulate(inner, 2))
  params = jnp.ones([3])
  loss = lambda p: p.sum()
  step.update(params, step.init(params), params, value=1.0, value_fn=loss)
  assert seen["value_fn"] is loss
  assert "value" in seen


def test_schedules_count_optimizer_steps():
  step = ranger.accumulate(optax.sgd(lambda count: 1.0 + count.astype(jnp.float32)), 2)
  results, _ = run(step, [jnp.ones([3])] * 6)
  emitted = [float(-r[0]) for r in results]
  assert emitted == [0, 1, 0, 2, 0, 3]


def test_bfloat16_accumulates_in_float32():
  """A sum of 1,024 times bf16 0.01 is 10.25 (bf16's 0.01 is 0.01001), not 4.0."""
  step = ranger.accumulate(optax.identity(), 1024, reduce="sum")
  gradient = jnp.full([1], 0.01, jnp.bfloat16)

  def body(state, _):
    updates, state = step.update(gradient, state)
    return state, updates

  _, results = jax.lax.scan(body, step.init(gradient), None, length=1024)
  assert results.dtype == jnp.bfloat16
  assert float(results[-1, 0]) == 10.25


def bfloat16_runs(calls, runs, reduce, dtype=jnp.bfloat16):
  """What runs emit that add the same gradients, and the same in float64."""
  rng = np.random.default_rng(0)
  gradients = jnp.asarray(rng.normal(1, 2, [calls, 64]), jnp.float32)
  step = ranger.accumulate(
    optax.identity(), calls, reduce=reduce, accumulator_dtype=np.dtype(dtype).name
  )

  def run(state, _):
    def call(state, gradient):
      updates, state = step.update(gradient, state)
      return state, updates

    state, updates = jax.lax.scan(call, state, gradients)
    return state, updates[-1]

  state = step.init(gradients[0])
  assert state.accumulated.dtype == dtype
  _, emitted = jax.lax.scan(run, state, length=runs)
  total = np.asarray(gradients, np.float64).sum(axis=0)
  return np.asarray(emitted, np.float64), total / (calls if reduce == "mean" else 1)


@pytest.mark.guarantees("accumulate", "Sums in bfloat16 are unbiased")
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_sums_in_bfloat16_are_unbiased(reduce):
  """100 runs of 64 micro-batches; each rounds in its own way."""
  emitted, exact = bfloat16_runs(64, 100, reduce)
  deviation = emitted.mean(axis=0) - exact
  score = deviation / (emitted.std(axis=0, ddof=1) / 10)
  assert abs(score.mean()) < 3 / np.sqrt(64)
  assert (np.abs(score) < 3).mean() > 0.95
  assert 0.5 < score.std() < 1.5
  # One run is as near as 64 roundings can be.
  assert np.abs(emitted - exact).max() < 0.05 * np.abs(exact).max() + 0.05


def test_additions_in_bfloat16_are_not_rounded_away():
  """To the nearest, 1,024 times 0.01 would be 4."""
  step = ranger.accumulate(
    optax.identity(), 1024, reduce="sum", accumulator_dtype="bfloat16"
  )
  gradient = jnp.full([1000], 0.01)

  def body(state, _):
    updates, state = step.update(gradient, state)
    return state, updates

  _, results = jax.lax.scan(body, step.init(gradient), None, length=1024)
  np.testing.assert_allclose(results[-1].mean(), 10.24, rtol=0.005)
  assert len(np.unique(results[-1])) > 10  # Each entry by its own chance.


@pytest.mark.parametrize("dtype", ["int32", jnp.uint8, bool, "complex64"])
def test_accumulators_of_other_types_are_refused(dtype):
  with pytest.raises(ValueError, match="accumulator_dtype must be a floating-point"):
    ranger.accumulate(optax.sgd(1.0), 2, accumulator_dtype=dtype)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_without_a_window_bfloat16_rounds_nothing(reduce):
  step = ranger.accumulate(
    optax.identity(), 1, reduce=reduce, accumulator_dtype="bfloat16"
  )
  gradient = jnp.array([1 / 3, 1e-3])
  updates, _ = step.update(gradient, step.init(gradient))
  np.testing.assert_array_equal(updates, gradient)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_bfloat16_takes_two_bytes_a_parameter(dtype):
  params = {"f": jnp.ones([64, 64]), "h": jnp.ones([3], jnp.float16)}
  step = ranger.accumulate(optax.sgd(1.0), 4, accumulator_dtype=dtype)
  state = step.init(params)
  assert all(
    leaf.nbytes == 2 * leaf.size for leaf in jax.tree.leaves(state.accumulated)
  )
  with jax.enable_x64(True):
    wide = {"d": jnp.ones([2], jnp.float64), "c": jnp.ones([2], jnp.complex64)}
    kept = step.init(wide).accumulated
    assert (kept["d"].dtype, kept["c"].dtype) == (jnp.float64, jnp.complex64)


def test_devices_round_apart():
  """Else their errors would add up, and not average out."""
  mesh = jax.make_mesh((8,), ("data",))
  update = ranger.train_step(
    lambda w, batch: batch @ w,
    ranger.accumulate(optax.sgd(0.0), 64, accumulator_dtype="bfloat16"),
    mesh=mesh,
    reduce="on_emission",
  )
  params = jnp.zeros([256])
  state = update.init(params)
  batch = np.full([8, 256], 0.3, np.float32)
  for _ in range(3):
    params, state, _ = update(params, state, batch)
  window = np.asarray(state.optimizer.accumulated, np.float32)
  assert window.shape == (8, 256)
  assert all((window[0] != part).any() for part in window[1:])
  np.testing.assert_allclose(window.sum(axis=0).mean(), 3 * 8 * 0.3, rtol=0.002)


def test_wide_and_complex_gradients_keep_their_type():
  step = ranger.accumulate(optax.identity(), 3)
  with jax.enable_x64(True):
    gradients = [jnp.asarray([1 / 3 + 1e-12 * i]) for i in range(3)]
    results, _ = run(step, gradients, jnp.ones([1]))
    np.testing.assert_allclose(results[-1], np.mean(gradients), rtol=1e-15)
  gradients = [jnp.asarray([1 + 2j * i], jnp.complex64) for i in range(3)]
  results, _ = run(step, gradients, jnp.ones([1], jnp.complex64))
  assert complex(results[-1][0]) == 1 + 2j


def test_no_temporaries_of_parameter_size():
  """Guarded and weighted, around adamw, donated: under 1 % of the parameters."""
  step = ranger.accumulate(optax.adamw(1e-3), 8)
  params = [jax.ShapeDtypeStruct((1024, 1024), jnp.float32)] * 4

  def update(params, state, gradients, weight):
    updates, state = step.update(gradients, state, params, weight=weight)
    return optax.apply_updates(params, updates), state

  with jax.numpy_dtype_promotion("standard"):
    state = jax.eval_shape(step.init, params)
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(
      params, state, params, jnp.float32(1)
    )
  memory = lowered.compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.01 * 4 * 4 * 1024**2


def test_counters_can_be_read_from_any_chain():
  tx = optax.chain(ranger.accumulate(optax.sgd(0.1), 3), optax.identity())
  params = jnp.ones([3])
  state = tx.init(params)
  update = jax.jit(tx.update)
  for gradient in (params, params * jnp.nan):
    _, state = update(gradient, state, params, weight=2.0)
  names = ("mini_step", "gradient_step", "weight_sum", "num_left_out")
  read = [float(optax.tree.get(state, name)) for name in names]
  assert read == [2, 0, 2, 1]


def test_negative_weight_skips_the_micro_batch():
  gradients = draw(3)
  step = ranger.accumulate(optax.identity(), 3)
  results, state = run(step, gradients, weight=[1.0, -2.0, 1.0])
  expected, _ = run(step, gradients, weight=[1.0, 0.0, 1.0])
  np.testing.assert_array_equal(np.stack(results), np.stack(expected))
  assert int(state.num_left_out) == 1


def record(seen):
  """An inner transformation that keeps the value it is given in its state."""

  def update(updates, state, params=None, *, value=None, **extra_args):
    seen.update(extra_args, value=value)
    return updates, state if value is None else jnp.asarray(value, jnp.float32)

  start = lambda params: jnp.zeros([], jnp.float32)
  return optax.GradientTransformationExtraArgs(start, update)


@pytest.mark.few(2)
@pytest.mark.parametrize(
  ("where", "bad"),
  [(0, 1e6), (1, 1e6), (2, 1e6), (3, 1e6), (0, np.nan), (2, np.inf), (3, np.nan)],
)
def test_a_spike_anywhere_in_the_window_is_seen(where, bad):
  guard = ranger.skip_anomalies(optax.sgd(1.0), watch="value", warmup=5)
  step = ranger.accumulate(guard, 4)
  params = np.zeros(2, np.float32)
  state, update = step.init(params), jax.jit(step.update)
  for window in range(10):
    for i in range(4):
      spike = window == 9 and i == where
      gradient = np.full(2, 1e3 if spike else 1.0, np.float32)
      value = np.float32(bad if spike else 1 + 0.01 * window)
      updates, state = update(gradient, state, params, value=value)
  np.testing.assert_array_equal(updates, 0)
  assert int(state.inner_state.num_skipped) == 1
  for _ in range(4):  # And the next window is its own.
    updates, state = update(params + 1, state, params, value=np.float32(1.05))
  np.testing.assert_array_equal(updates, -1)


RECORDING = {
  reduce: ranger.accumulate(record({}), 3, reduce=reduce) for reduce in ("mean", "sum")
}


@pytest.mark.guarantees(
  "accumulate", "The mean of value= is over the micro-batches with a"
)
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize(
  ("values", "weights", "grads", "mean"),
  [
    ((1, 2, 6), (1, 1, 1), (1, 1, 1), 3),
    ((1, 2, 6), (1, 2, 5), (1, 1, 1), 35 / 8),
    # One that is left out, with whatever value, does not count.
    ((1, np.nan, 6), (1, 2, 5), (1, np.nan, 1), 31 / 6),
    ((1, np.inf, 6), (1, 0, 5), (1, 1, 1), 31 / 6),
    ((1, 7, 6), (1, -1, 5), (1, 1, 1), 31 / 6),
    # One that counts does.
    ((np.nan, 2, 6), (1, 2, 5), (1, 1, 1), np.nan),
    ((1, 2, -np.inf), (1, 2, 5), (1, 1, 1), -np.inf),
    # Not all of them may have one.
    ((None, 2, 6), (1, 2, 5), (1, 1, 1), 34 / 7),
    ((None, None, 6), (1, 2, 5), (1, 1, 1), 6),
  ],
)
def test_inner_gets_the_mean_value_of_the_window(reduce, values, weights, grads, mean):
  step, params = RECORDING[reduce], np.ones([2], np.float32)
  state, update = step.init(params), jax.jit(step.update)
  before = jax.tree.map(jax.typeof, state)
  for value, weight, grad in zip(values, weights, grads, strict=True):
    extra = {} if value is None else {"value": np.float32(value)}
    gradient = np.full([2], grad, np.float32)
    _, state = update(gradient, state, params, weight=weight, **extra)
    assert jax.tree.map(jax.typeof, state) == before
  np.testing.assert_allclose(state.inner_state, mean, rtol=1e-6)
  assert float(state.value_sum) == float(state.value_weight) == 0


@pytest.mark.parametrize("value", [1.5, jnp.float32(2.5), np.nan])
def test_without_a_window_the_value_passes(value):
  seen = {}
  step = ranger.accumulate(record(seen), 1)
  params = jnp.ones([2])
  step.update(params, step.init(params), params, value=value, other=1)
  assert seen.pop("value") is value
  assert seen == {"micro_batches": 1, "other": 1}
  step.update(params, step.init(params), params)
  assert seen["value"] is None


def test_a_plateau_is_one_of_windows():
  """`reduce_on_plateau` sees means: a NaN loss of a left-out one is none."""
  inner = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=3))
  step, scales = ranger.accumulate(inner, 2), []
  update, params = jax.jit(step.update), np.ones(2, np.float32)
  for bad in (False, True):
    state = step.init(params)
    with jax.numpy_dtype_promotion("standard"):
      for call in range(8):
        spoiled = bad and call == 2
        grad = np.full(2, np.nan if spoiled else 1.0, np.float32)
        value = np.float32(np.nan if spoiled else 8.0 - call)
        _, state = update(grad, state, params, value=value)
    scales.append(float(optax.tree.get(state, "scale")))
  assert scales == [1, 1]


@functools.cache
def accumulating(every):
  step = ranger.accumulate(optax.sgd(1.0), every)
  return step, jax.jit(step.update)


def open_window(every, calls, gradient=10.0, **extra):
  step, update = accumulating(every)
  state = step.init(np.float32(0))
  for _ in range(calls):
    _, state = update(np.float32(gradient), state, **extra)
  return state


@pytest.mark.parametrize(("every", "calls"), [(3, 2), (2, 1), (5, 5)])
def test_an_open_window_of_another_every_is_refused(every, calls):
  state = open_window(every, calls)
  with pytest.raises(ValueError, match="every=1 holds no window, but this state has"):
    ranger.accumulate(optax.sgd(1.0), 1).update(jnp.array(1.0), state)
  state = open_window(1, calls)
  for other in (every, lambda count: 1):
    with pytest.raises(ValueError, match=r"another every.*last=True"):
      ranger.accumulate(optax.sgd(1.0), other).update(jnp.array(1.0), state)


@pytest.mark.guarantees(
  "accumulate", "You may change every in the middle of a window, but not to"
)
@pytest.mark.parametrize(("every", "calls", "then"), [(3, 2, 2), (4, 3, 2), (2, 1, 4)])
def test_another_every_keeps_the_open_window(every, calls, then):
  """It closes once it is full by the new count, and nothing of it is lost."""
  state = open_window(every, calls, weight=2.0)
  (_, update), new = accumulating(then), max(then - calls, 1)
  for i in range(new):
    updates, state = update(np.float32(1), state)
    assert bool(updates) == (i + 1 == new)
  expected = -(calls * 2 * 10 + new) / (calls * 2 + new)
  np.testing.assert_allclose(updates, expected, rtol=1e-6)
  assert int(state.mini_step) == float(state.weight_sum) == 0


@pytest.mark.guarantees(
  "accumulate", "If the sum of finite gradients overflows, the window"
)
@pytest.mark.few(4)
@pytest.mark.parametrize(
  ("dtype", "shape", "large", "reduce", "every", "extra"),
  [
    ("float32", (3,), 3e38, "mean", 2, {}),
    ("float32", (4, 32), -3e38, "sum", 4, {}),
    ("float32", (4, 32), 1e30, "sum", 1, {"weight": 1e20}),
    ("float16", (2, 32), 3e4, "sum", 3, {}),
    ("float32", (2, 3, 5), 1e30, "mean", 3, {"weight": 1e20}),
    ("bfloat16", (4, 32), 2e38, "sum", 2, {}),
    ("complex64", (3,), 3e38j, "mean", 2, {}),
  ],
)
def test_a_sum_that_overflows_is_skipped(dtype, shape, large, reduce, every, extra):
  step = ranger.accumulate(optax.trace(0.9), every, reduce=reduce)
  fine = params = {"w": np.ones(shape, jnp.dtype(dtype)), "b": np.ones([2], np.float32)}
  spike = {**fine, "w": fine["w"].copy()}
  spike["w"][(-1,) * len(shape)] = large
  update = jax.jit(step.update)
  state = step.init(params)
  for _ in range(every):
    updates, state = update(fine, state, params)
  before = state
  for i in range(every):
    updates, state = update(spike, state, params, **extra)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates)), i
  assert int(state.num_overflowed) == 1
  assert int(state.num_left_out) == 0
  after = state._replace(num_overflowed=before.num_overflowed)
  jax.tree.map(np.testing.assert_array_equal, after, before)
  for _ in range(every):
    updates, state = update(fine, state, params)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
  assert np.asarray(updates["w"]).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sums_may_be_of_the_gradients_type(dtype):
  step = ranger.accumulate(optax.identity(), 2, accumulator_dtype=None)
  assert step.init(jnp.zeros([2], dtype)).accumulated.dtype == dtype


def test_leaves_are_rounded_apart():
  step = ranger.accumulate(optax.identity(), 2, accumulator_dtype="bfloat16")
  leaf = jnp.full([64], 1 + 2.0**-9)
  tree = {"a": leaf, "b": leaf}
  _, state = jax.jit(step.update)(tree, step.init(tree))
  first, second = (np.asarray(x, np.float32) for x in state.accumulated.values())
  assert np.ptp(first) > 0
  assert (first != second).any()


@pytest.mark.parametrize("name", ["weigth", "weights", "wieght", "values", "lasts"])
def test_misspelled_extra_args_are_refused(name):
  step = ranger.accumulate(optax.sgd(1.0), 2)
  params = jnp.ones(2)
  with pytest.raises(TypeError, match=rf"{name}=; did you mean (weight|value|last)="):
    step.update(params, step.init(params), params, **{name: 1.0})


def test_other_extra_args_are_not():
  step = ranger.accumulate(optax.sgd(1.0), 2)
  params = jnp.ones(2)
  others = ("value_fn", "losses", "labels", "member_weights", "loss", "grad", "mask")
  step.update(params, step.init(params), params, **dict.fromkeys(others, 1.0))


@pytest.mark.guarantees(
  "accumulate", "With float64 gradients the mean is exact to 1e-14 of"
)
@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("shape", [(), (3,), (4, 32)])
def test_float64_keeps_its_digits(every, shape):
  """Weights that float32 would round: a third, and token counts beyond 2**24."""
  rng = np.random.default_rng(0)
  gradients = rng.standard_normal((every, *shape))
  with jax.enable_x64(True):
    step = ranger.accumulate(record({}), every)
    for weights in (rng.uniform(size=every) / 3, 2.0**25 + 1 + np.arange(every)):
      params = np.ones(shape)
      state, update = step.init(params), jax.jit(step.update)
      for gradient, weight in zip(gradients, weights, strict=True):
        updates, state = update(gradient, state, params, weight=weight)
      expected = np.average(gradients, axis=0, weights=weights)
      size = np.average(np.abs(gradients), axis=0, weights=weights)
      assert (np.abs(updates - expected) <= 1e-14 * size).all()

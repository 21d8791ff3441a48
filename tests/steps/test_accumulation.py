"""Step 2 against the full batch and `optax.MultiSteps`, and its guarantees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger


def draw(count, seed=0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.standard_normal([3]), jnp.float32) for _ in range(count)]


def run(step, gradients, params=None, **extra):
  """Calls `step` on each gradient; extra args are lists, one entry a call."""
  params = jnp.ones([3]) if params is None else params
  state, results = step.init(params), []
  update = jax.jit(step.update)
  for i, gradient in enumerate(gradients):
    args = {name: values[i] for name, values in extra.items()}
    updates, state = update(gradient, state, params, **args)
    results.append(updates)
  return results, state


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


@pytest.mark.parametrize("sizes", [(1, 1, 1, 5), (4, 4), (3, 1, 4), (8,)])
def test_exact_for_any_partition(sizes):
  """Micro-batches of any sizes give the gradient of the whole batch's mean loss."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal([8, 3]), jnp.float32)
  y = jnp.asarray(rng.standard_normal([8]), jnp.float32)
  tokens = jnp.asarray(rng.integers(1, 9, 8), jnp.float32)
  params = jnp.ones([3])

  def mean_loss(params, rows):
    losses = tokens[rows] * (x[rows] @ params - y[rows]) ** 2
    return losses.sum() / tokens[rows].sum()

  ends = np.cumsum(sizes)
  parts = [np.arange(e - s, e) for s, e in zip(sizes, ends, strict=True)]
  gradients = [jax.grad(mean_loss)(params, rows) for rows in parts]
  step = ranger.accumulate(optax.identity(), len(sizes))
  results, _ = run(step, gradients, weight=[tokens[rows].sum() for rows in parts])
  expected = jax.grad(mean_loss)(params, np.arange(8))
  np.testing.assert_allclose(results[-1], expected, rtol=1e-5)


def test_sum_is_the_weighted_sum():
  gradients = draw(2)
  step = ranger.accumulate(optax.identity(), 2, reduce="sum")
  results, _ = run(step, gradients, weight=[2.0, 3.0])
  np.testing.assert_allclose(
    results[-1], 2 * gradients[0] + 3 * gradients[1], rtol=1e-6
  )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("bad_weight", [False, True])
def test_left_out_is_weight_zero(value, bad_weight):
  gradients = draw(6)
  weights = [1.0, 2.0, 3.0, 1.0, 1.0, 1.0]
  zero = [*weights[:1], 0.0, *weights[2:]]
  step = ranger.accumulate(optax.sgd(0.1, momentum=0.9), 3)
  expected, expected_state = run(step, gradients, weight=zero)
  if bad_weight:
    weights[1] = value
  else:
    gradients[1] = gradients[1].at[0].set(value)
  results, state = run(step, gradients, weight=weights)
  np.testing.assert_array_equal(np.stack(results), np.stack(expected))
  assert int(state.num_left_out) == 1
  assert int(expected_state.num_left_out) == 0


def test_window_of_zero_weight():
  step = ranger.accumulate(optax.adam(0.1), 2)
  params = jnp.ones([3])
  state = step.init(params)
  with jax.numpy_dtype_promotion("standard"):
    for _ in range(2):
      updates, state = step.update(jnp.full([3], jnp.nan), state, params)
      assert not updates.any()
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


def test_inner_runs_on_emission_only():
  """The inner update stands inside the one conditional, and nowhere else."""
  inner = optax.GradientTransformation(
    lambda params: jnp.zeros([]), lambda u, s, p=None: (jnp.sin(u), s + 1)
  )
  step = ranger.accumulate(inner, 4)
  params = jnp.ones([3])
  jaxpr = jax.make_jaxpr(step.update)(params, step.init(params), params).jaxpr
  names = [equation.primitive.name for equation in jaxpr.eqns]
  assert "sin" not in names
  assert names.count("cond") == 1
  (cond,) = (e for e in jaxpr.eqns if e.primitive.name == "cond")
  branches = [
    [e.primitive.name for e in branch.jaxpr.eqns] for branch in cond.params["branches"]
  ]
  assert ["sin" in names for names in branches] == [False, True]
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
  for gradient in (params, params * jnp.nan):
    _, state = tx.update(gradient, state, params, weight=2.0)
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


@pytest.mark.parametrize(
  "where",
  [
    *(
      pytest.param(
        i,
        marks=pytest.mark.xfail(
          raises=AssertionError, reason="the last micro-batch's value= counts alone"
        ),
      )
      for i in range(3)
    ),
    3,
  ],
)
def test_a_spike_anywhere_in_the_window_is_seen(where):
  guard = ranger.skip_anomalies(optax.sgd(1.0), watch="value", warmup=5)
  step = ranger.accumulate(guard, 4)
  params = jnp.zeros(2)
  state, update = step.init(params), jax.jit(step.update)
  for window in range(10):
    for i in range(4):
      bad = window == 9 and i == where
      gradient = jnp.full(2, 1e3 if bad else 1.0)
      value = jnp.float32(1e6 if bad else 1 + 0.01 * window)
      updates, state = update(gradient, state, params, value=value)
  np.testing.assert_array_equal(updates, 0)


@pytest.mark.xfail(
  raises=pytest.fail.Exception, reason="the window's weight divides, its sum is lost"
)
def test_an_open_window_of_another_every_is_refused():
  step = ranger.accumulate(optax.sgd(1.0), 3)
  state = step.init(jnp.zeros(()))
  for _ in range(2):
    _, state = step.update(jnp.array(10.0), state)
  with pytest.raises(ValueError, match="every"):
    ranger.accumulate(optax.sgd(1.0), 1).update(jnp.array(1.0), state)

"""`by_noise_scale`: estimates against closed forms, and the windows made of them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger

CURVATURE = np.linspace(0.5, 2.0, 20, dtype=np.float32)
PARAMS = np.full([20], 0.3, np.float32)
NOISE = np.linspace(1.0, 3.0, 20, dtype=np.float32)
TRACE = float((NOISE**2).sum())
SIGNAL = float(((CURVATURE * PARAMS) ** 2).sum())


def micro_gradient(key, batch):
  """Of a quadratic, whose examples differ by noise of known covariance."""
  noise = NOISE * jax.random.normal(key, [20]) / jnp.sqrt(batch)
  return {"w": CURVATURE * PARAMS + noise}


@functools.partial(jax.jit, static_argnames=("rule", "calls", "reduce"))
def measure(key, batches, rule, calls, reduce="mean"):
  """The state of the noise after some micro-batches at the same parameters."""
  step = ranger.accumulate(optax.sgd(0.1), rule, reduce=reduce)

  def call(state, at):
    key, batch = at
    gradient = micro_gradient(key, batch)
    _, state = step.update(gradient, state, weight=batch)
    return state, None

  sizes = jnp.resize(batches, (calls,))
  start = step.init({"w": PARAMS})
  state, _ = jax.lax.scan(call, start, (jax.random.split(key, calls), sizes))
  return state.noise


@functools.partial(jax.jit, static_argnames=("rule", "calls", "reduce"))
def measure_often(batches, rule, calls, reduce):
  run = lambda key: measure(key, batches, rule, calls, reduce)
  return jax.vmap(run)(jax.random.split(jax.random.key(1), 1000))


@pytest.mark.parametrize("batch", [4, 16, 64])
def test_noise_scale_is_that_of_the_closed_form(batch):
  rule = ranger.by_noise_scale(8, min_every=8, decay=0.9995)
  noise = measure(jax.random.key(batch), np.float32([batch]), rule, 8000)
  np.testing.assert_allclose(noise.noise_scale, TRACE / SIGNAL, rtol=0.1)
  np.testing.assert_allclose(noise.trace, TRACE, rtol=0.1)
  np.testing.assert_allclose(noise.micro_weight, batch, rtol=1e-6)


@pytest.mark.guarantees(
  "by_noise_scale", "The mean of many estimates, of the trace and of the signal"
)
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("batches", [(4,), (16,), (64,), (4, 64, 1)])
def test_estimates_are_unbiased(batches, reduce):
  """1,000 draws of one window; the smoothing is of no consequence for the first."""
  every = 2 if len(batches) == 1 else 3
  rule = ranger.by_noise_scale(every, min_every=every)
  noise = measure_often(np.float32(batches), rule, every, reduce)
  for found, expected in ((noise.trace, TRACE), (noise.signal, SIGNAL)):
    found = np.asarray(found)
    error = found.std(ddof=1) / np.sqrt(1000)
    assert abs(found.mean() - expected) < 3 * error
    assert error < 0.1 * TRACE


@pytest.mark.parametrize("decay", [1 - 1e-7, 1 - 1e-5])
def test_a_decay_near_one_keeps_its_digits(decay):
  """In float32, one minus it would be off by a fifth."""
  rule = ranger.by_noise_scale(2, min_every=2, decay=decay)
  _, state = windows(alternating(1.0, 1.0, 6), rule)
  np.testing.assert_allclose(state.noise.mass, 1 - decay**6, rtol=1e-5)


@functools.cache
def accumulating(rule):
  """A step by the rule around SGD, and its compiled update."""
  step = ranger.accumulate(optax.sgd(0.1), rule)
  return step, jax.jit(step.update)


def windows(gradients, rule, **extra):
  """How many calls each window took, and the last state."""
  step, update = accumulating(rule)
  state, sizes = step.init(np.zeros([2], np.float32)), []
  for gradient in gradients:
    size = int(state.mini_step) + 1
    _, state = update(gradient, state, **extra)
    if int(state.mini_step) == 0:
      sizes.append(size)
  return sizes, state


def alternating(mean, noise, count):
  return [np.array([mean, noise * (-1) ** i], np.float32) for i in range(count)]


def test_smoothing_is_a_mean_without_a_start():
  """The weights of the windows add up to one, from the first on."""
  rule = ranger.by_noise_scale(4, min_every=4, decay=0.9)
  gradients = [*alternating(1.0, 1.0, 4), *alternating(5.0, 3.0, 8)]
  for count, weights in ((4, [1]), (8, [0.9**4, 1]), (12, [0.9**8, 0.9**4, 1])):
    _, state = windows(gradients[:count], rule)
    traces = np.array([4 / 3, 12, 12])[: len(weights)]
    signals = np.array([1, 25, 25])[: len(weights)] - traces / 4
    expected = np.average(traces, weights=weights)
    np.testing.assert_allclose(state.noise.trace, expected, rtol=1e-5)
    signal = np.average(signals, weights=weights)
    np.testing.assert_allclose(state.noise.signal, signal, rtol=1e-5)
    np.testing.assert_allclose(state.noise.noise_scale, expected / signal, rtol=1e-5)


def test_windows_grow_as_the_noise_does():
  """At most twofold a window, to the largest, and back."""
  rule = ranger.by_noise_scale(32, ratio=1.0, decay=0.0)
  # Signs that cancel: of m the sample variance is 9 m / (m - 1).
  sizes, _ = windows(alternating(0.0, 3.0, 94), rule)
  assert sizes == [2, 4, 8, 16, 32, 32]
  sizes, state = windows(alternating(0.0, 3.0, 30) + alternating(9.0, 1.0, 36), rule)
  assert sizes == [2, 4, 8, 16, 32, 2, 2]
  np.testing.assert_allclose(state.noise.noise_scale, 2 / (81 - 1))


@pytest.mark.parametrize(("ratio", "batch"), [(1.0, 4), (0.5, 2), (2.0, 4)])
def test_windows_are_as_large_as_the_noise_scale(ratio, batch):
  rule = ranger.by_noise_scale(64, ratio=ratio, decay=0.999)
  noise = measure(jax.random.key(0), np.float32([batch]), rule, 6000)
  wanted = ratio * TRACE / SIGNAL / batch
  assert abs(int(noise.every) - wanted) < 1 + 0.1 * wanted


@pytest.mark.parametrize(
  ("bounds", "sizes"),
  [((4, 2), [2, 4, 4, 4]), ((5, 5), [5, 5]), ((3, 3), [3, 3, 3, 3])],
)
def test_bounds_hold(bounds, sizes):
  rule = ranger.by_noise_scale(bounds[0], min_every=bounds[1])
  assert windows(alternating(0.0, 1.0, 14), rule)[0] == sizes


def test_weights_are_its_unit():
  """In examples, whatever the micro-batch; the window does not change."""
  rule = ranger.by_noise_scale(64, ratio=1.0)
  gradients = alternating(2.0, 2.0, 40)
  ones, state = windows(gradients, rule)
  tens, weighted = windows(gradients, rule, weight=10.0)
  assert ones == tens
  np.testing.assert_allclose(
    weighted.noise.noise_scale, 10 * state.noise.noise_scale, rtol=1e-5
  )


@pytest.mark.guarantees("by_noise_scale", "A micro-batch that is left out does not")
@pytest.mark.parametrize(
  ("bad", "weight"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, -1.0), (1.0, 0.0)]
)
def test_what_is_left_out_does_not_count(bad, weight):
  step, update = accumulating(ranger.by_noise_scale(4, min_every=4))
  gradients, state = alternating(1.0, 2.0, 3), step.init(np.zeros([2], np.float32))
  _, state = update(np.full([2], bad, np.float32), state, weight=weight)
  for gradient in gradients:
    _, state = update(gradient, state)
  _, expected = windows(gradients, ranger.by_noise_scale(3, min_every=3))
  np.testing.assert_allclose(state.noise.micro_weight, 3 / 4, rtol=1e-6)
  for name in ("trace", "signal", "noise_scale"):
    np.testing.assert_allclose(
      getattr(state.noise, name), getattr(expected.noise, name), rtol=1e-6
    )


@pytest.mark.guarantees("by_noise_scale", "A micro-batch that is left out does not")
@pytest.mark.parametrize(
  "kind", ["squares overflow", "all bad", "one good", "overflow"]
)
@pytest.mark.parametrize("calls", [0, 6], ids=["first", "third"])
def test_a_window_without_an_estimate_changes_none(calls, kind):
  rule = ranger.by_noise_scale(16, ratio=1.0)
  _, before = windows(alternating(1.0, 3.0, calls), rule)
  _, update = accumulating(rule)
  every = int(before.noise.every)
  state, huge = before, {"squares overflow": 1e25, "overflow": 3e38}.get(kind, 1.0)
  for call in range(every):
    bad = kind == "all bad" or (kind == "one good" and call)
    gradient = np.array([huge, np.nan if bad else 1.0], np.float32)
    updates, state = update(gradient, state)
  assert int(state.mini_step) == 0
  assert bool(updates.any()) == (kind in ("squares overflow", "one good"))
  chex.assert_trees_all_equal(state.noise, before.noise)
  _, state = update(np.ones([2], np.float32), state)
  chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_sum_beyond_float16_is_seen(reduce):
  """Its square is finite in float32."""
  rule = ranger.by_noise_scale(2, min_every=2)
  step = ranger.accumulate(optax.identity(), rule, reduce=reduce)
  gradient = jnp.full([2], 4e4, jnp.float16)
  state, update = step.init(gradient), jax.jit(step.update)
  for _ in range(2):
    updates, state = update(gradient, state)
  assert int(state.num_overflowed) == (reduce == "sum")
  np.testing.assert_array_equal(updates, 0 if reduce == "sum" else gradient)


def test_no_call_no_change():
  rule = ranger.by_noise_scale(16, ratio=1.0)
  _, before = windows(alternating(1.0, 3.0, 7), rule)
  _, update = accumulating(rule)
  _, state = update(np.ones([2], np.float32), before, present=False)
  chex.assert_trees_all_equal(state, before)


def test_a_window_that_closes_early_is_measured():
  step, update = accumulating(ranger.by_noise_scale(8, min_every=8))
  state = step.init(np.zeros([2], np.float32))
  for i, gradient in enumerate(alternating(1.0, 2.0, 3)):
    _, state = update(gradient, state, last=i == 2)
  _, expected = windows(alternating(1.0, 2.0, 3), ranger.by_noise_scale(3, min_every=3))
  np.testing.assert_allclose(state.noise.trace, expected.noise.trace, rtol=1e-6)
  assert int(state.noise.num_parts) == 0


@pytest.mark.guarantees("by_noise_scale", "Devices agree")
@pytest.mark.parametrize("reduce", ["every_call", "on_emission"])
def test_devices_agree(reduce):
  """On emission, each device's part of a micro-batch is a gradient of its own."""
  rng = np.random.default_rng(0)
  batches = rng.normal(1, 2, [6, 16, 3]).astype(np.float32)
  update = ranger.train_step(
    lambda w, batch: batch @ w,
    ranger.accumulate(optax.sgd(0.0), ranger.by_noise_scale(64, ratio=1.0, decay=0.0)),
    mesh=jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]),
    reduce=reduce,
  )
  params = jnp.zeros([3])
  state = update.init(params)
  for batch in batches:
    params, state, _ = update(params, state, batch)
  noise = state.optimizer.noise
  assert noise.every.sharding.is_fully_replicated
  parts = 4 if reduce == "on_emission" else 1
  grads = batches[4:].reshape(2 * parts, -1, 3).mean(axis=1)
  size = 16 / parts
  trace = size * grads.var(axis=0, ddof=1).sum()
  signal = (grads.mean(axis=0) ** 2).sum() - trace / 32
  np.testing.assert_allclose(noise.trace, trace, rtol=1e-4)
  np.testing.assert_allclose(noise.signal, signal, rtol=1e-4)
  np.testing.assert_allclose(noise.noise_scale, trace / signal, rtol=1e-4)


def test_the_defaults_are_those_that_are_told():
  rule = ranger.by_noise_scale(8)
  assert rule._asdict() == {
    "max_every": 8,
    "min_every": 2,
    "ratio": 0.05,
    "decay": 0.9999,
  }


def test_it_is_read_from_any_chain():
  inner = optax.chain(optax.clip(1.0), optax.sgd(0.1))
  rule = ranger.by_noise_scale(64, ratio=1.0)
  tx = optax.chain(ranger.accumulate(inner, rule), optax.identity())
  state = tx.init(jnp.zeros([2]))
  assert optax.tree.get(state, "noise_scale") == 0
  update = jax.jit(tx.update)
  for gradient in alternating(1.0, 3.0, 2):
    _, state = update(gradient, state)
  np.testing.assert_allclose(optax.tree.get(state, "trace"), 18)
  # Of two gradients, the signal is 1 - 18 / 2, not positive: nothing is seen of it.
  assert optax.tree.get(state, "noise_scale") == np.finfo(np.float32).max
  recipe = ranger.ranger(0.1, every=rule)
  assert optax.tree.get(recipe.init(jnp.zeros([2])), "noise_scale") == 0


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"max_every": 1}, "max_every must be a whole number of at least 2, got 1"),
    ({"max_every": 8, "min_every": 1}, "min_every must .* at least 2, got 1"),
    ({"max_every": 8, "min_every": 9}, "max_every must .* at least 9, got 8"),
    ({"max_every": 8, "ratio": 0.0}, "ratio must lie"),
    ({"max_every": 8, "ratio": float("inf")}, "ratio must lie"),
    ({"max_every": 8, "decay": 1.0}, "decay must lie"),
  ],
)
def test_refusals(arguments, message):
  with pytest.raises(ValueError, match=message):
    ranger.by_noise_scale(**arguments)


def test_a_state_of_another_rule_is_refused():
  rule, params = ranger.by_noise_scale(8), jnp.zeros([2])
  one, other = (ranger.accumulate(optax.sgd(1.0), every) for every in (4, rule))
  for step, state in ((one, other.init(params)), (other, one.init(params))):
    with pytest.raises(ValueError, match=r"_replace\(noise=tx.init\(params\).noise\)"):
      step.update(params, state)
  moved = one.init(params)._replace(noise=other.init(params).noise)
  jax.jit(other.update)(params, moved)


@pytest.mark.parametrize(("rule", "power"), [("square_root", 0.5), ("linear", 1.0)])
def test_updates_are_scaled_to_the_window(rule, power):
  """Windows of 3, of 1 that closes early, and of 3 with one left out."""
  inner = optax.chain(optax.sgd(1.0), ranger.scale_by_window(rule))
  step = ranger.accumulate(inner, 3)
  state, found = step.init(np.zeros([2], np.float32)), []
  bad = np.array([np.nan, 1.0], np.float32)
  ones = np.ones([2], np.float32)
  for gradient, last in zip(
    (ones, ones, ones, ones, ones, bad, ones), (0, 0, 0, 1, 0, 0, 0), strict=True
  ):
    updates, state = jax.jit(step.update)(gradient, state, last=bool(last))
    if updates.any():
      found.append(float(-updates[0]))
  np.testing.assert_allclose(found, [3**power, 1, 3**power], rtol=1e-6)


@pytest.mark.parametrize("every", [2, 8])
def test_the_window_s_scale_is_that_of_large_step(every):
  rate = ranger.large_step(0.1, every, rule="square_root")
  one = ranger.accumulate(optax.sgd(rate), every)
  two = ranger.accumulate(
    optax.chain(optax.sgd(0.1), ranger.scale_by_window()), lambda step: every
  )
  states = [tx.init(PARAMS) for tx in (one, two)]
  updates = [jax.jit(tx.update) for tx in (one, two)]
  for gradient in np.random.default_rng(0).standard_normal([every, 20]):
    results = [
      update(gradient.astype(np.float32), state)
      for update, state in zip(updates, states, strict=True)
    ]
    states = [state for _, state in results]
  np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
  assert results[0][0].any()


def test_half_precision_is_scaled_in_float32():
  step = ranger.scale_by_window("linear")
  updates, _ = step.update(
    jnp.full([2], 0.1, jnp.bfloat16), step.init(()), micro_batches=257
  )
  wide = np.float32(jnp.bfloat16(0.1)) * 257
  assert updates.dtype == jnp.bfloat16
  assert float(updates[0]) == float(jnp.bfloat16(wide))


def test_outside_of_accumulate_it_is_refused():
  step = ranger.scale_by_window()
  with pytest.raises(ValueError, match="put the step inside of it"):
    step.update(jnp.ones([2]), step.init(()))
  with pytest.raises(ValueError, match="rule must be one of"):
    ranger.scale_by_window("cubic")

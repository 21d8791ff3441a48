"""Smoothing of parameters against oracles in NumPy and Optax, and its guarantees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger


def test_ema_equals_numpy():
  step = ranger.smooth_by_ema(0.8)
  params = ema = np.array([1.0, -2.0], np.float32)
  state, update = step.init(params), jax.jit(step.update)
  for i in range(10):
    updates, state = update(np.array([0.5, i], np.float32), state, params)
    params = params + np.asarray(updates)
    ema = 0.8 * ema.astype(float) + 0.2 * params
  np.testing.assert_allclose(ranger.eval_params(state, params), ema, rtol=1e-6)


@pytest.mark.guarantees("smooth_by_ema", "Updates pass through untouched")
def test_ema_passes_updates_through():
  step, params = ranger.smooth_by_ema(0.5), {"w": jnp.ones([3])}
  given = {"w": jnp.array([1.0, np.nan, 2.0])}
  updates, _ = step.update(given, step.init(params), params)
  np.testing.assert_array_equal(updates["w"], given["w"])


@pytest.mark.guarantees("smooth_by_ema", "decay=0 keeps the new parameters")
def test_ema_without_decay():
  tx = optax.chain(optax.sgd(0.1), ranger.smooth_by_ema(0.0))
  for params, smoothed in iterates(tx, jnp.ones([3]), 4):
    np.testing.assert_array_equal(smoothed, params)


@pytest.mark.guarantees(
  "smooth_by_ema", "The average of half-precision parameters keeps small"
)
def test_ema_of_half_precision_moves():
  """2,000 steps from 1 to 2 with decay 0.999: 1.865, not 1."""
  step = ranger.smooth_by_ema(0.999)
  params = jnp.ones([1], jnp.bfloat16)
  _, state = step.update(jnp.ones([1], jnp.bfloat16), step.init(params), params)
  params = params + jnp.ones([1], jnp.bfloat16)

  def body(state, _):
    return step.update(jnp.zeros([1], jnp.bfloat16), state, params)[1], None

  # Each call averages the iterate before: 2,000 of them are 2.
  state, _ = jax.lax.scan(body, state, length=2000)
  np.testing.assert_allclose(optax.tree.get(state, "ema"), [1.865], atol=1e-3)
  smoothed = ranger.eval_params(state, params)
  assert smoothed.dtype == jnp.bfloat16
  np.testing.assert_allclose(smoothed.astype(np.float32), [1.865], atol=2.0**-8)


@pytest.mark.guarantees(
  "smooth_by_ema", "A non-finite entry does not change its average"
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_ema_leaves_bad_entries_alone(value):
  step, params = ranger.smooth_by_ema(0.5), jnp.ones([3])
  _, state = step.update(jnp.ones([3]), step.init(params), params)
  lost = jnp.array([2.0, value, 2.0])
  np.testing.assert_array_equal(ranger.eval_params(state, lost), [1.5, 1.0, 1.5])
  _, state = step.update(jnp.zeros([3]), state, lost)
  np.testing.assert_array_equal(state.ema, [1.5, 1.0, 1.5])


def test_smoothing_holds_no_second_copy():
  """Beside its state, an update in place takes no memory of the parameters' size."""
  params = {"w": jnp.ones([512, 512])}
  for smoothing in (
    ranger.smooth_by_ema(0.9, every=2),
    ranger.smooth_by_lookahead(3),
    ranger.smooth_by_lookahead(3, momentum=0.5),
  ):
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), smoothing)

    def step(params, state, gradients, tx=tx):
      updates, state = tx.update(gradients, state, params)
      return optax.apply_updates(params, updates), state

    compiled = (
      jax.jit(step, donate_argnums=(0, 1))
      .lower(params, tx.init(params), params)
      .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 1e5


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
  with pytest.raises(ValueError, match="two smoothed copies"):
    ranger.eval_params(two.init(params), params)


def iterates(tx, params, steps, seed=0):
  """Parameters and evaluated parameters after each step on random gradients."""
  rng, state, update = np.random.default_rng(seed), tx.init(params), jax.jit(tx.update)
  found = []
  for _ in range(steps):
    draw = lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype)
    updates, state = update(jax.tree.map(draw, params), state, params)
    params = optax.apply_updates(params, updates)
    found.append((params, ranger.eval_params(state, params)))
  return found


@pytest.mark.guarantees(
  "smooth_by_ema", "A uniform decay gives the mean of the iterates from start"
)
@pytest.mark.parametrize(("start", "every"), [(0, 1), (3, 1), (0, 2), (4, 3)])
def test_uniform_decay_is_the_mean(start, every):
  step = ranger.smooth_by_ema(ranger.uniform_decay_schedule(), start=start, every=every)
  seen = []
  for t, (params, smoothed) in enumerate(
    iterates(optax.chain(optax.sgd(0.1), step), jnp.ones([3]), 14)
  ):
    if t >= start and (t + 1 - start) % every == 0:
      seen.append(np.asarray(params))
    expected = np.mean(seen, axis=0) if seen else params
    np.testing.assert_allclose(smoothed, expected, rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_ema_with_start_and_warmup_equals_numpy(warmup):
  step = ranger.smooth_by_ema(0.8, warmup=warmup, start=2)
  found = iterates(optax.chain(optax.sgd(0.1), step), jnp.ones([3]), 12)
  ema = np.asarray(found[1][0])
  for n, (params, smoothed) in enumerate(found[2:]):
    beta = min(0.8, (1 + n) / (warmup + n)) if warmup + n else 0.8
    ema = beta * ema + (1 - beta) * np.asarray(params)
    np.testing.assert_allclose(smoothed, ema, rtol=1e-5)
  for params, smoothed in found[:2]:
    np.testing.assert_array_equal(smoothed, params)


def test_decay_may_be_a_schedule_of_the_averages():
  given = ranger.smooth_by_ema(lambda n: jnp.where(n < 2, 0.0, 0.5), every=2)
  found = iterates(optax.chain(optax.sgd(0.1), given), jnp.ones([3]), 6)
  expected = (np.asarray(found[3][0]) + np.asarray(found[5][0])) / 2
  np.testing.assert_allclose(found[5][1], expected, rtol=1e-6)


@pytest.mark.guarantees(
  "smooth_by_lookahead", "Without momentum, fast and slow parameters are those of"
)
@pytest.mark.parametrize("every", [1, 2, 6])
@pytest.mark.parametrize("step_size", [0.0, 0.5, 0.8])
def test_lookahead_equals_optax(every, step_size):
  fast = optax.sgd(0.1, momentum=0.9)
  params = {"w": jnp.ones([3]), "b": jnp.zeros([2, 2])}
  found = iterates(
    optax.chain(fast, ranger.smooth_by_lookahead(every, step_size)), params, 50
  )
  theirs = optax.lookahead(fast, every, step_size)
  pair, rng = optax.LookaheadParams.init_synced(params), np.random.default_rng(0)
  state, update = theirs.init(pair), jax.jit(theirs.update)
  for ours in found:
    draw = lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype)
    with jax.numpy_dtype_promotion("standard"):  # Theirs multiplies by a boolean.
      updates, state = update(jax.tree.map(draw, params), state, pair)
    pair = optax.apply_updates(pair, updates)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(pair), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.guarantees(
  "smooth_by_lookahead", "Without momentum, step_size=1 does not change the"
)
def test_a_window_that_shrinks_closes_at_once():
  params = jnp.zeros([3])
  state = ranger.smooth_by_lookahead(6).init(params)._replace(count=jnp.int32(4))
  step = ranger.smooth_by_lookahead(3)
  updates, state = step.update(params + 1, state, params)
  np.testing.assert_allclose(updates, 0.5)
  assert int(state.count) == 0


def test_lookahead_of_whole_steps():
  plain = iterates(optax.sgd(0.1), jnp.ones([3]), 9)
  tx = optax.chain(optax.sgd(0.1), ranger.smooth_by_lookahead(3, 1.0))
  for (params, _), (expected, _) in zip(
    iterates(tx, jnp.ones([3]), 9), plain, strict=True
  ):
    np.testing.assert_allclose(params, expected, rtol=1e-6)


@pytest.mark.guarantees(
  "smooth_by_lookahead", "The slow copy of half-precision parameters keeps what a"
)
def test_lookahead_of_half_precision_moves():
  """Steps of one bfloat16 place, of which the slow copy takes a tenth."""
  step = ranger.smooth_by_lookahead(1, 0.1)
  place = jnp.full([1], 2.0**-7, jnp.bfloat16)

  def body(carry, _):
    params, state = carry
    updates, state = step.update(place, state, params)
    return (optax.apply_updates(params, updates), state), None

  params = jnp.ones([1], jnp.bfloat16)
  (params, state), _ = jax.lax.scan(body, (params, step.init(params)), length=100)
  # A rounded copy would stay at 1; each step moves 0.1 of the way to params + place.
  assert state.slow.dtype == jnp.float32
  assert 1.05 < float(state.slow[0]) < 1.15
  np.testing.assert_allclose(params.astype(np.float32), state.slow, atol=2.0**-7)


@pytest.mark.guarantees(
  "smooth_by_lookahead", "A non-finite entry does not change its slow copy"
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_lookahead_leaves_bad_entries_alone(value):
  step, params = ranger.smooth_by_lookahead(2, 0.5), jnp.ones([3])
  state = step.init(params)
  for _ in range(2):
    updates, state = step.update(jnp.array([1.0, value, 1.0]), state, params)
  np.testing.assert_array_equal(params + updates, [1.5, 1.0, 1.5])
  # A parameter that is lost does not take its slow copy along.
  lost = jnp.array([1.5, value, 1.5])
  _, state = step.update(jnp.zeros([3]), state, lost)
  np.testing.assert_array_equal(state.slow, [1.5, 1.0, 1.5])


def test_eval_params_is_a_leaf_for_each_leaf():
  params = {"w": jnp.ones([3]), "deep": {"a": jnp.zeros([2]), "b": jnp.zeros([1])}}
  # A mask that ends above the leaves: one node stands for two of them.
  tx = optax.masked(ranger.smooth_by_lookahead(2), {"w": True, "deep": False})
  updates = jax.tree.map(jnp.ones_like, params)
  _, state = tx.update(updates, tx.init(params), params)
  moved = optax.apply_updates(params, updates)
  smoothed = ranger.eval_params(state, moved)
  np.testing.assert_array_equal(smoothed["w"], np.ones(3))
  np.testing.assert_array_equal(smoothed["deep"]["a"], np.ones(2))
  assert smoothed["deep"]["b"].shape == (1,)


def test_smoothing_ticks_on_emission_only():
  for smoothing in (ranger.smooth_by_ema(0.5), ranger.smooth_by_lookahead(2)):
    inner = optax.chain(optax.sgd(0.1), smoothing)
    tx, params = ranger.accumulate(inner, 3), jnp.ones([2])
    state, alone, expected = tx.init(params), inner.init(params), params
    update, update_alone = jax.jit(tx.update), jax.jit(inner.update)
    ones = np.ones([2], np.float32)
    for _ in range(4):
      for _ in range(3):
        updates, state = update(ones, state, params)
        params = optax.apply_updates(params, updates)
      updates, alone = update_alone(ones, alone, expected)
      expected = optax.apply_updates(expected, updates)
      np.testing.assert_allclose(params, expected, rtol=1e-6)
      np.testing.assert_allclose(
        ranger.eval_params(state, params),
        ranger.eval_params(alone, expected),
        rtol=1e-6,
      )


@pytest.mark.guarantees(
  "smooth_by_ema", "1 - decay is exact. With float64 parameters the average"
)
@pytest.mark.parametrize("decay", [1 - 1e-6, 0.999, 0.3])
@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_ema_of_float64_keeps_its_digits(decay, shape):
  """Twenty steps against NumPy, to 1e-14; and the warm-up likewise."""
  rng = np.random.default_rng(0)
  iterates = rng.standard_normal((20, *shape))
  with jax.enable_x64(True):
    for warmup in (0, 10):
      step = ranger.smooth_by_ema(decay, warmup=warmup)
      ema = iterates[0]
      state = step.init(jnp.asarray(ema))
      update = jax.jit(step.update)
      for n, params in enumerate(iterates):
        _, state = update(jnp.zeros(shape), state, jnp.asarray(params))
        if n:  # An iterate is averaged when the next call brings it along.
          beta = min(decay, n / (warmup + n - 1)) if warmup else decay
          ema = ema + max(1 - decay, 1 - beta) * (params - ema)
      np.testing.assert_allclose(state.ema, ema, rtol=1e-14, atol=1e-15)


@pytest.mark.guarantees(
  "smooth_by_ema", "1 - decay is exact. With float64 parameters the average"
)
@pytest.mark.parametrize("decay", [1 - 1e-6, np.float64(1 - 1e-6), 1 - 1e-7])
def test_the_rest_of_a_slow_decay_is_exact(decay):
  """In float32 as well, in which the decay itself is off by a part of its rest."""
  params = {"w": jnp.ones([3])}
  step = ranger.smooth_by_ema(decay)
  _, state = step.update(params, step.init(params), params)
  assert state.rate == np.float32(1 - np.float64(decay))
  guard = ranger.skip_anomalies(optax.sgd(1.0), decay=decay, threshold=np.inf)
  state = guard.init(params)._replace(count=jnp.int32(2**30))
  _, state = guard.update(params, state, params)
  rest = max(1 - np.float64(decay), 2.0**-30)
  np.testing.assert_allclose(state.mean, rest * np.log(3**0.5), rtol=1e-5)
  radam = ranger.ranger_radam(0.1, b2=decay, b1=decay, output_axis=None)
  _, state = radam.update(params, radam.init(params), params)
  for moment in (state.first_moment, state.second_moment):
    np.testing.assert_array_equal(moment["w"], np.float32(1 - np.float64(decay)))


def test_a_traced_decay_passes_as_it_is():
  def rate(decay):
    step = ranger.smooth_by_ema(decay)
    params = jnp.ones([2])
    return step.update(params, step.init(params), params)[1].rate

  np.testing.assert_allclose(jax.jit(rate)(jnp.float32(0.9)), 0.1, rtol=1e-6)


@pytest.mark.parametrize("step_size", [0.1, 0.7])
@pytest.mark.parametrize("every", [1, 3])
def test_lookahead_of_float64_keeps_its_digits(step_size, every):
  rng = np.random.default_rng(0)
  slow = fast = rng.standard_normal([4])
  with jax.enable_x64(True):
    step, params = ranger.smooth_by_lookahead(every, step_size), jnp.asarray(fast)
    state, update = step.init(params), jax.jit(step.update)
    for call in range(12):
      move = rng.standard_normal([4])
      updates, state = update(jnp.asarray(move), state, params)
      params = optax.apply_updates(params, updates)
      fast = fast + move
      if (call + 1) % every == 0:
        slow = fast = slow + step_size * (fast - slow)
    np.testing.assert_allclose(params, fast, rtol=1e-13)


def returns(moves, every, step_size, momentum, start=1.0):
  """Fast and slow parameters in NumPy, the slow ones by PyTorch's SGD with nesterov.

  `momentum` is a number, or one for each move.
  """
  slow = fast = np.full(moves[0].shape, start)
  buffer, momentum = np.zeros_like(slow), np.broadcast_to(momentum, len(moves))
  for call, (move, mu) in enumerate(zip(moves, momentum, strict=True), 1):
    fast = fast + move
    if call % every == 0:
      gradient = slow - fast
      buffer = mu * buffer + gradient
      slow = fast = slow - step_size * (gradient + mu * buffer)
    yield fast, slow


def follow(step, moves, dtype="float32", start=1.0, jit=True):
  """Fast and evaluated parameters and the state after each update by a move."""
  params = jnp.full(moves[0].shape, start, dtype)
  state, update = step.init(params), jax.jit(step.update) if jit else step.update
  for move in moves:
    updates, state = update(jnp.asarray(move, dtype), state, params)
    params = optax.apply_updates(params, updates)
    yield params, ranger.eval_params(state, params), state


@pytest.mark.guarantees(
  "smooth_by_lookahead", "With momentum, the slow copy moves as by SGD with"
)
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
  ("step_size", "momentum"), [(0.68, 0.37), (1.0, 0.9), (0.0, 0.5)]
)
def test_lookahead_with_momentum_equals_numpy(every, step_size, momentum):
  moves = 0.1 * np.random.default_rng(0).standard_normal([30, 2, 3])
  for dtype, rtol in (("float32", 2e-5), ("float64", 1e-13)):
    with jax.enable_x64(dtype == "float64"):
      step = ranger.smooth_by_lookahead(every, step_size, momentum=momentum)
      found = follow(step, moves, dtype)
      expected = returns(moves, every, step_size, momentum)
      for (params, smoothed, _), (fast, slow) in zip(found, expected, strict=True):
        np.testing.assert_allclose(params, fast, rtol, atol=rtol)
        np.testing.assert_allclose(smoothed, slow, rtol, atol=rtol)


@pytest.mark.guarantees(
  "smooth_by_lookahead", "Without momentum, step_size=1 does not change the"
)
@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), np.zeros([])])
def test_no_momentum_holds_no_velocity(zero):
  moves = np.random.default_rng(0).standard_normal([30, 3]).astype(np.float32)
  slow = fast = np.ones([3], np.float32)
  step = ranger.smooth_by_lookahead(4, 0.5, momentum=zero)
  for call, (params, smoothed, state) in enumerate(follow(step, moves, jit=False), 1):
    move = moves[call - 1]
    if call % 4 == 0:  # In float32, one operation after the other: bit for bit.
      move = (slow + np.float32(0.5) * (fast + move - slow)) - fast
    fast = fast + move
    slow = fast if call % 4 == 0 else slow
    assert len(jax.tree.leaves(state)) == 2
    np.testing.assert_array_equal(params, fast)
    np.testing.assert_array_equal(smoothed, slow)


@pytest.mark.guarantees(
  "smooth_by_lookahead", "The momentum may be traced, and may change from one"
)
def test_momentum_may_be_traced_and_change():
  moves = 0.1 * np.random.default_rng(0).standard_normal([24, 3])
  injected = optax.inject_hyperparams(ranger.smooth_by_lookahead)
  schedule = optax.linear_schedule(0.0, 0.69, 23)
  pairs = (
    (injected(4, 0.7, momentum=0.6), np.full(24, 0.6)),
    (injected(4, 0.7), np.zeros(24)),
    (injected(4, 0.7, momentum=schedule), 0.03 * np.arange(24)),
  )
  for step, momentum in pairs:
    expected = returns(moves, 4, 0.7, momentum)
    for (params, smoothed, state), (fast, slow) in zip(
      follow(step, moves), expected, strict=True
    ):
      assert state.inner_state.velocity.shape == (3,)
      np.testing.assert_allclose(params, fast, rtol=1e-5)
      np.testing.assert_allclose(smoothed, slow, rtol=1e-5)
  without = optax.inject_hyperparams(ranger.smooth_by_lookahead, ("momentum",))
  assert without(4).init(jnp.ones([3])).inner_state.velocity == ()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lookahead_with_momentum_in_half_precision(dtype):
  """The slow copy and its velocity are those of float32, for the moves as rounded."""
  moves = 0.05 * np.random.default_rng(0).standard_normal([30, 4])
  step = ranger.smooth_by_lookahead(3, 0.68, momentum=0.37)
  slow, velocity, fast = np.ones(4), np.zeros(4), jnp.ones([4], dtype)
  moves = moves.astype(jnp.dtype(dtype))
  for call, (params, _, state) in enumerate(follow(step, moves, dtype), 1):
    fast = (np.asarray(fast) + moves[call - 1]).astype(np.float64)
    if call % 3 == 0:
      velocity = 0.37 * velocity + 0.68 * (fast - slow)
      slow = slow + 0.68 * (fast - slow) + 0.37 * velocity
    fast = params
    assert state.slow.dtype == state.velocity.dtype == jnp.float32
    np.testing.assert_allclose(state.slow, slow, rtol=1e-5)
    np.testing.assert_allclose(state.velocity, velocity, rtol=1e-4, atol=1e-6)
    if call % 3 == 0:
      np.testing.assert_allclose(params.astype(np.float32), slow, rtol=2.0**-7)


@pytest.mark.guarantees(
  "smooth_by_lookahead", "A non-finite entry does not change the velocity of others"
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_momentum_leaves_bad_entries_alone(value, dtype):
  """The entry is bad at the second return, and moves on from its slow copy."""
  moves = np.full([9, 3], 0.25)
  bad = moves.copy()
  bad[3, 1] = value
  step = ranger.smooth_by_lookahead(2, 0.5, momentum=0.5)
  found, clean = (list(follow(step, given, dtype)) for given in (bad, moves))
  for (params, _, state), (expected, _, other) in zip(found, clean, strict=True):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
    for ours, theirs in (
      (params, expected),
      (state.slow, other.slow),
      (state.velocity, other.velocity),
    ):
      np.testing.assert_array_equal(ours[::2], theirs[::2])
  # From 1, by half of a move of 0.5 and half of a velocity of 0.25.
  for params, _, _ in (found[1], found[3]):
    assert params[1] == 1.375
  # The velocity is mixed with a move of zero, with a weight of 1 / 1.5.
  np.testing.assert_allclose(found[4][2].velocity[1], 0.25 / 3, rtol=1e-6)
  # Parameters that are lost do not take slow copy and velocity along.
  state = found[3][2]
  lost = jnp.asarray([2.0, value, 2.0], dtype)
  _, after = step.update(jnp.zeros([3], dtype), state, lost)
  assert np.isfinite(after.velocity).all()
  assert after.slow[1] == 1.375


def test_momentum_is_refused():
  for momentum in (1.0, -0.1, 1):
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got"):
      ranger.smooth_by_lookahead(momentum=momentum)
  with pytest.raises(TypeError, match="momentum must be a number, got True"):
    ranger.smooth_by_lookahead(momentum=True)
  params = jnp.ones([3])
  state = ranger.smooth_by_lookahead().init(params)
  with pytest.raises(ValueError, match="needs a state with a velocity"):
    ranger.smooth_by_lookahead(momentum=0.5).update(params, state, params)

"""Step 3 against an oracle in NumPy and Nesterov SGD, and its guarantees."""

import functools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from optax_ranger._core import parts
from tests.helpers import temporaries
from tests.laws import registry


def draw(count, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal([count, 5]).astype(np.float32)


def run(step, gradients):
  state, results, factors = step.init(np.zeros([5], np.float32)), [], []
  update = jax.jit(step.update)
  for gradient in gradients:
    updates, state = update(gradient, state)
    results.append(updates)
    factors.append(float(optax.tree.get(state, "acceleration")))
  return np.stack(results), np.array(factors)


def oracle(gradients, momentum, a, beta, shrink, hurry, low, high):
  """The formulas of the docstring, in NumPy and float64."""
  m, reference = np.zeros(gradients.shape[1]), 0.0
  for g in gradients.astype(float):
    norms = np.linalg.norm(g) * np.linalg.norm(m)
    cosine = g @ m / norms if norms else 0.0
    growth = np.linalg.norm(g) / np.sqrt(reference) if reference else 0.0
    explosion = max(1, -cosine * growth)
    hurry = 1 if explosion > 1 else max(1, hurry * 2 ** (min(cosine, 0) / 2))
    pull = cosine if cosine > 0 else shrink * cosine
    a = np.clip(a * np.exp(beta * hurry * pull) / explosion, low, high)
    norm = g @ g
    reference = 0.9 * reference + 0.1 * min(norm, 100 * reference) or norm
    m = momentum * m + g
    yield a * (g + momentum * m), a, explosion


def test_ngs_equals_numpy():
  gradients = draw(60)
  gradients[30:35] *= np.array([-3, 9, -27, 81, -243], np.float32)[:, None]
  step = ranger.scale_by_ngs(
    0.8,
    acceleration=0.99,
    hyper_rate=0.3,
    shrink=0.5,
    hurry=3.0,
    bounds=(0.01, 1.4),
  )
  results, factors = run(step, gradients)
  expected = list(oracle(gradients, 0.8, 0.99, 0.3, 0.5, 3.0, 0.01, 1.4))
  np.testing.assert_allclose(factors, [a for _, a, _ in expected], rtol=2e-4)
  for result, (update, _, _) in zip(results, expected, strict=True):
    np.testing.assert_allclose(result, update, rtol=1e-3, atol=1e-4)
  assert factors.min() < 0.1
  assert factors.max() > 1.3
  assert max(explosion for _, _, explosion in expected) > 5


@pytest.mark.guarantees(
  "scale_by_ngs", "hyper_rate=0 equals optax.sgd with Nesterov momentum"
)
@pytest.mark.parametrize("acceleration", [1.0, 0.25])
def test_no_hyper_rate_is_nesterov_sgd(acceleration):
  gradients = draw(20)
  gradients[10:] *= -1000  # An explosion, which must not count here.
  rate = optax.scale_by_learning_rate(0.03)
  ngs = ranger.scale_by_ngs(0.9, acceleration=acceleration, hyper_rate=0.0)
  sgd = optax.sgd(0.03, momentum=0.9, nesterov=True)
  tx, state = optax.chain(ngs, rate), sgd.init(jnp.zeros([5]))
  own = tx.init(jnp.zeros([5]))
  for gradient in gradients:  # Not compiled: XLA may round two programs unlike.
    result, own = tx.update(jnp.asarray(gradient), own)
    expected, state = sgd.update(jnp.asarray(gradient), state)
    np.testing.assert_array_equal(result, acceleration * expected)


@pytest.mark.guarantees(
  "accelerate", "hyper_rate=0 equals inner, times the acceleration"
)
@pytest.mark.parametrize("per_leaf", [False, True])
def test_no_hyper_rate_is_the_inner_optimizer(per_leaf):
  inner = optax.sgd(0.03, momentum=0.9)
  tx = ranger.accelerate(inner, acceleration=0.5, hyper_rate=0.0, per_leaf=per_leaf)
  params = registry.params()
  state, expected_state = tx.init(params), inner.init(params)
  for call in range(5):
    gradients = registry.gradients(registry.CASES[-1], call, params)
    result, state = jax.jit(tx.update)(gradients, state, params)
    expected, expected_state = jax.jit(inner.update)(gradients, expected_state, params)
    halved = jax.tree.map(lambda leaf: 0.5 * leaf, expected)
    jax.tree.map(np.testing.assert_array_equal, result, halved)


@pytest.mark.guarantees(
  "accelerate", "The factor is positive, finite and within bounds for any"
)
@pytest.mark.guarantees(
  "scale_by_ngs", "The factor is positive, finite and within bounds for any"
)
@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
  st.lists(
    st.sampled_from([0.0, 1.0, -1.0, 1e30, -1e-30, np.nan, np.inf]),
    min_size=5,
    max_size=20,
  )
)
def test_acceleration_stays_within_bounds(values):
  settings = {"acceleration": 1.0, "hyper_rate": 1.0, "bounds": (0.5, 2.0)}
  for step in (
    ranger.scale_by_ngs(0.9, **settings),
    ranger.accelerate(optax.sgd(0.1), **settings),
  ):
    results, factors = run(step, [np.full(5, v, np.float32) for v in values])
    assert np.isfinite(results).all()
    assert (factors >= 0.5).all()
    assert (factors <= 2.0).all()


@pytest.mark.guarantees(
  "scale_by_ngs", "The factor does not depend on the scale of the gradient"
)
def test_acceleration_is_scale_free():
  gradients, step = draw(20), ranger.scale_by_ngs()
  _, factors = run(step, gradients)
  _, scaled = run(step, 1024 * gradients)
  np.testing.assert_allclose(scaled, factors, rtol=1e-6)


def test_float16_updates_stop_at_the_largest_number():
  """Momentum of large gradients leaves the range of float16."""
  step = ranger.scale_by_ngs(acceleration=1.0, hyper_rate=0.0)
  gradients = np.full([3], 6e4, np.float16)
  state, update = step.init(gradients), jax.jit(step.update)
  for _ in range(3):
    updates, state = update(gradients, state)
  np.testing.assert_array_equal(updates, jnp.finfo(jnp.float16).max)


@pytest.mark.parametrize(
  ("make", "hurry"),
  [(ranger.scale_by_ngs, 10), (lambda: ranger.accelerate(optax.sgd(0.1)), 14)],
  ids=["scale_by_ngs", "accelerate"],
)
def test_the_defaults_are_those_that_are_told(make, hurry):
  """A start of 0.001, a hyper rate of 0.05, a fifth of it downwards, and the hurry."""
  ones = np.ones([5], np.float32)
  _, factors = run(make(), np.stack([ones, ones, -0.01 * ones]))
  up = 1e-3 * np.exp(0.05 * hurry)
  down = up * np.exp(-0.05 * 0.2 * hurry / np.sqrt(2))
  np.testing.assert_allclose(factors, [1e-3, up, down], rtol=1e-5)


def test_factors_are_swept_without_recompiling():
  traces = []

  @jax.jit
  def one(hyper_rate, gradients):
    traces.append(1)
    step = ranger.scale_by_ngs(hyper_rate=hyper_rate)
    body = lambda state, g: step.update(g, state)[::-1]
    return jax.lax.scan(body, step.init(gradients[0]), gradients)[0].factor.acceleration

  gradients = jnp.asarray(np.abs(draw(10)))
  factors = [float(one(rate, gradients)) for rate in (0.0, 0.1, 0.2)]
  assert len(traces) == 1
  assert factors[0] == pytest.approx(1e-3)
  assert factors == sorted(factors)
  swept = jax.vmap(one, in_axes=(0, None))(jnp.array([0.0, 0.1, 0.2]), gradients)
  np.testing.assert_allclose(swept, factors, rtol=1e-5)


@functools.partial(jax.jit, static_argnames=("make", "length"))
def descend(make, rates, length=300):
  """Final losses on a quadratic, by rate; `make` gives an optimizer of a rate."""
  curvature = jnp.array([1.0, 3.0, 10.0])

  def train(rate):
    tx = make(rate)

    def body(carry, _):
      params, state = carry
      updates, state = tx.update(curvature * params, state, params)
      return (optax.apply_updates(params, updates), state), None

    start = jnp.ones([3])
    (params, _), _ = jax.lax.scan(body, (start, tx.init(start)), length=length)
    return (curvature * params**2).sum()

  return jax.vmap(train)(rates)


def ngs(rate):
  return optax.chain(ranger.scale_by_ngs(), optax.scale_by_learning_rate(rate))


RATES = jnp.array([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_any_rate_of_five_decades_converges():
  plain = descend(lambda rate: optax.sgd(rate, 0.9, nesterov=True), RATES)
  assert not (plain < 1).all()
  assert (descend(ngs, RATES) < 1e-4).all()


def test_any_rate_converges_around_another_optimizer():
  make = lambda rate: ranger.accelerate(optax.sgd(rate, momentum=0.5))
  assert (descend(make, RATES) < 1e-4).all()


@pytest.mark.few(2)
@pytest.mark.parametrize(
  "inner", [optax.contrib.muon(1e-5), optax.lion(1e-5), optax.adamw(1e-5)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizers_with_directions_that_are_no_gradients(inner, dtype):
  """From a rate far too small, accumulated, in half precision too."""
  tx = ranger.accumulate(ranger.accelerate(inner), 2)
  rng = np.random.default_rng(0)
  inputs = rng.standard_normal([8, 4], np.float32)
  targets = inputs @ rng.standard_normal([4, 4], np.float32)
  loss = lambda w: ((inputs @ w.astype(jnp.float32) - targets) ** 2).mean()

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  start = jnp.zeros([4, 4], dtype)
  with jax.numpy_dtype_promotion("standard"):  # Optax's own arithmetic needs it.
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, length=600)[0])
    params, state = train((start, tx.init(start)))
  assert loss(params) < 0.1 * loss(start)
  assert optax.tree.get(state, "acceleration") > 10


def test_an_explosion_is_braked_at_once():
  """Without the brake a start ten times too large is lost within 20 steps."""
  start = lambda rate: optax.chain(
    ranger.scale_by_ngs(acceleration=1.0), optax.scale_by_learning_rate(rate)
  )
  (loss,) = descend(start, jnp.array([1.0]))
  assert loss < 1e-3
  (loss,) = descend(lambda rate: optax.sgd(rate, 0.9, nesterov=True), jnp.array([1.0]))
  assert not loss < 1e20


@functools.partial(jax.jit, static_argnames="hyper_rate")
def factors_of_noise(noise, hyper_rate, shrink):
  step = ranger.scale_by_ngs(
    acceleration=1.0, hyper_rate=hyper_rate, shrink=shrink, hurry=1.0
  )

  def walk(noise):
    body = lambda state, g: (step.update(g, state)[1], None)
    return jax.lax.scan(body, step.init(noise[0]), noise)[0].factor.acceleration

  return jax.vmap(walk)(noise)


@pytest.mark.guarantees(
  "scale_by_ngs", "If gradients are pure noise of a hundred dimensions or"
)
@pytest.mark.parametrize("shrink", [0.2, 1.0])
def test_noise_alone_does_not_bleed(shrink):
  """Drift of the logarithm of the factor over 2,000 steps of pure noise."""
  size, steps, beta = 400, 2000, 0.05
  noise = np.random.default_rng(0).standard_normal([8, steps, size], np.float32)
  factors = factors_of_noise(noise, beta, np.float32(shrink))
  drift = np.log(factors).mean() / steps
  unit = beta / np.sqrt(size)
  spread = unit / np.sqrt(8 * steps)
  assert abs(drift - 0.4 * (1 - shrink) * unit) < 5 * spread
  assert drift > -5 * spread


def test_each_leaf_learns_its_own_factor():
  curvature = {"flat": 1e-3, "steep": 10.0}
  tx = optax.chain(ranger.scale_by_ngs(per_leaf=True), optax.scale(-1e-3))
  params = {"flat": jnp.ones([3]), "steep": jnp.ones([2])}

  @jax.jit
  def step(params, state):
    gradients = jax.tree.map(lambda c, p: c * p, curvature, params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in range(200):
    params, state = step(params, state)
  factors = optax.tree.get(state, "acceleration")
  assert factors["flat"] > 100 * factors["steep"]
  assert max(float(abs(leaf).max()) for leaf in params.values()) < 0.05


def test_devices_agree_under_shard_map():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  params, gradients = registry.params(), registry.params()
  mean = jax.tree.map(lambda g: 1.5 * g, gradients)
  for step in (
    ranger.scale_by_ngs(),
    ranger.scale_by_ngs(per_leaf=True),
    ranger.accelerate(optax.sgd(0.1)),
  ):

    def reduced(scale, gradients, state, step=step):
      own = jax.tree.map(lambda g: g * scale[0], gradients)
      return step.update(jax.lax.pmean(own, "data"), state, params)

    specs = (PartitionSpec("data"), PartitionSpec(), PartitionSpec())
    # Out specs without an axis: refused unless all devices hold the same.
    mapped = jax.jit(
      jax.shard_map(reduced, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    )
    expected_state, update = step.init(params), jax.jit(step.update)
    state = jax.device_put(expected_state, NamedSharding(mesh, PartitionSpec()))
    for _ in range(3):
      result, state = mapped(np.arange(4, dtype=np.float32), gradients, state)
      expected, expected_state = update(mean, expected_state, params)
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7),
        (result, state),
        (expected, expected_state),
      )


@pytest.mark.slow
def test_factor_advances_on_emission_only():
  tx = ranger.accumulate(ranger.accelerate(optax.sgd(0.1)), 2)
  alone = ranger.accelerate(optax.sgd(0.1))
  params = jnp.zeros([5])
  state, expected_state = tx.init(params), alone.init(params)
  for pair in draw(12).reshape(6, 2, 5):
    for gradient in pair:
      result, state = tx.update(jnp.asarray(gradient), state, params)
    expected, expected_state = alone.update(
      jnp.asarray(pair.mean(axis=0)), expected_state, params
    )
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-7)
    assert int(optax.tree.get(state.inner_state, "count")) == int(expected_state.count)


def test_factor_multiplies_the_schedule_inside():
  schedule = optax.linear_schedule(1.0, 0.0, 4)
  tx = ranger.accelerate(optax.sgd(schedule), acceleration=2.0, hyper_rate=0.0)
  state, moves, update = tx.init(np.float32(0)), [], jax.jit(tx.update)
  for _ in range(5):
    move, state = update(np.float32(1), state)
    moves.append(float(move))
  np.testing.assert_allclose(moves, [-2, -1.5, -1, -0.5, 0])


def test_extra_args_reach_the_inner_optimizer():
  def update(updates, state, params=None, *, value, **extra_args):
    return jax.tree.map(lambda g: value * g, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
  tx = ranger.accelerate(inner, acceleration=1.0)
  result, _ = tx.update(jnp.ones([2]), tx.init(jnp.ones([2])), value=jnp.float32(3))
  np.testing.assert_array_equal(result, [3, 3])


def test_an_inner_optimizer_that_overflows_is_survived():
  tx = ranger.accelerate(optax.scale(-1e22), acceleration=1.0, hyper_rate=0.0)
  state, update = tx.init(np.zeros([2], np.float32)), jax.jit(tx.update)
  for value in (1e17, 1e-5, 1e-5):
    move, state = update(np.full([2], value, np.float32), state)
    assert np.isfinite(move).all()
  np.testing.assert_allclose(move, np.full(2, -1e17), rtol=1e-5)
  assert int(state.num_skipped) == 1


def test_float16_does_not_overflow():
  step = ranger.scale_by_ngs(0.9)
  state, update = step.init(np.zeros([3], np.float16)), jax.jit(step.update)
  for value in (3e4, 3e4, 3e4, 1.0, 1.0):
    updates, state = update(np.full([3], value, np.float16), state)
    assert np.isfinite(updates).all()
    assert np.isfinite(state.momentum).all()
  assert int(state.num_skipped) == 0


@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("acceleration", [1e-3, 0.3])
def test_float64_keeps_its_digits(per_leaf, acceleration):
  """Momentum and factor multiply float64 gradients as float64 numbers."""
  rng = np.random.default_rng(0)
  shapes, beta = {"a": (), "b": (3, 4), "c": (7,)}, 0.9
  with jax.enable_x64(True):
    options = {"acceleration": acceleration, "hyper_rate": 0.0, "per_leaf": per_leaf}
    ngs = ranger.scale_by_ngs(beta, **options)
    around = ranger.accelerate(optax.scale(-0.1), **options)
    params = {name: np.ones(shape) for name, shape in shapes.items()}
    states = [step.init(params) for step in (ngs, around)]
    updates, momentum = [jax.jit(step.update) for step in (ngs, around)], {}
    for _ in range(5):
      g = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
      momentum = {name: g[name] + beta * momentum.get(name, 0) for name in g}
      for i, update in enumerate(updates):
        found, states[i] = update(g, states[i], params)
        for name in g:
          ahead = -0.1 * g[name] if i else g[name] + beta * momentum[name]
          np.testing.assert_allclose(found[name], acceleration * ahead, rtol=1e-13)


STEPS = {
  "scale_by_ngs": ranger.scale_by_ngs,
  "accelerate": lambda **options: ranger.accelerate(optax.sgd(1e-2, 0.9), **options),
}


DEFAULTS = {name: make() for name, make in STEPS.items()}


@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_large_leaves_are_looked_at_in_parts(name, per_leaf):
  """The factor learns from the cosine over the part of the step alone."""
  shape, hyper_rate = (512, 256), 0.1
  tx = STEPS[name](
    acceleration=1.0, hyper_rate=hyper_rate, hurry=1.0, per_leaf=per_leaf
  )
  mean, *noise = np.random.default_rng(0).standard_normal([4, *shape], np.float32)
  params = {"large": mean, "small": mean[0, :8]}
  state, update = tx.init(params), jax.jit(tx.update)
  seen = parts.view(mean)
  last, factor = None, {"large": 1.0, "small": 1.0}
  for count, each in enumerate(noise):
    gradients = {"large": mean + each, "small": mean[0, :8] + each[0, :8]}
    _, state = update(gradients, state, params)
    if last is not None:
      phase = jnp.int32(count % seen.count)
      pairs = {
        leaf: [np.asarray(x, float).ravel() for x in (gradients[leaf], last[leaf])]
        for leaf in params
      }
      pairs["large"] = [
        np.asarray(seen.part(x["large"], phase), float).ravel()
        for x in (gradients, last)
      ]
      weights = {"large": seen.count, "small": 1}
      sums = {
        leaf: weights[leaf] * np.array([a @ b, a @ a, b @ b])
        for leaf, (a, b) in pairs.items()
      }
      for leaf in params:
        total = sums[leaf] if per_leaf else sum(sums.values())
        factor[leaf] *= np.exp(hyper_rate * total[0] / np.sqrt(total[1] * total[2]))
    found = optax.tree.get(state, "acceleration")
    for leaf in params:
      np.testing.assert_allclose(
        found[leaf] if per_leaf else found, factor[leaf], rtol=1e-4
      )
    # Both are the sum of past gradients, decayed.
    last = jax.tree.map(
      lambda g, m: g + np.float32(0.9) * m,
      gradients,
      last or jax.tree.map(np.zeros_like, params),
    )


@pytest.mark.parametrize("value", [np.nan, 1e30])
@pytest.mark.parametrize("name", STEPS)
def test_a_bad_entry_of_a_large_leaf_is_seen_wherever_it_is(name, value):
  """Also one whose square is infinite: a moment inside would stay so."""
  tx, params = DEFAULTS[name], {"w": np.ones([512, 256], np.float32)}
  update = jax.jit(tx.update)
  _, state = update(params, tx.init(params), params)
  for row in (0, 9, 131, 511):
    bad = {"w": params["w"].copy()}
    bad["w"][row, 7] = value
    updates, after = update(bad, state, params)
    assert not np.asarray(updates["w"]).any()
    assert int(after.num_skipped) == 1
    same = after._replace(num_skipped=state.num_skipped)
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_an_entry_that_overflows_in_the_inner_optimizer_is_zero():
  params = {"w": np.ones([512, 256], np.float32)}
  tx = ranger.accelerate(optax.scale(-1e30), acceleration=1.0)
  gradients = {"w": np.full([512, 256], 1e-20, np.float32)}
  # Row 9 is in none of the two parts that are looked at.
  gradients["w"][9, 9] = 1e10
  updates, state = jax.jit(tx.update)(gradients, tx.init(params), params)
  assert updates["w"][9, 9] == 0
  np.testing.assert_allclose(updates["w"][0], -1e10, rtol=1e-5)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
  assert int(state.num_skipped) == 0


def test_a_direction_that_overflowed_does_not_cost_the_next_update():
  """Its entries are finite, its squared norm and its product with g aren't."""
  rate = lambda count: jnp.where(count == 0, -1e10, -1.0)
  tx = ranger.accelerate(optax.scale_by_schedule(rate), acceleration=1.0)
  state, update = tx.init(np.zeros([2], np.float32)), jax.jit(tx.update)
  move, state = update(np.full([2], 1e12, np.float32), state)
  assert not np.asarray(move).any()
  move, state = update(np.full([2], 1e17, np.float32), state)
  np.testing.assert_allclose(move, -1e17, rtol=1e-5)
  assert int(state.num_skipped) == 1


@pytest.mark.parametrize("name", STEPS)
def test_no_temporaries_of_the_parameters_size(name):
  """And the direction that is kept is at most a seventh of them."""
  params = [np.ones([1024, 1024], np.float32) for _ in range(2)]
  size = sum(leaf.nbytes for leaf in params)
  tx = DEFAULTS[name]
  state = tx.init(params)
  assert temporaries(tx, params) < 0.03 * size
  if name == "accelerate":
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(state._replace(inner_state=())))
    assert own < size / 7


@pytest.mark.few(1)
@pytest.mark.parametrize("name", STEPS)
def test_all_laws_hold_in_parts(name, monkeypatch):
  monkeypatch.setattr(parts, "SMALLEST", 32)
  params = {"w": jnp.ones([64, 4]), "c": jnp.ones([3])}
  assert parts.view(params["w"]) is not None
  report = ranger.testing.check(STEPS[name](), params=params)
  assert not report.failed, str(report)


DECAY = optax.linear_schedule(1.0, 0.0, 10, 10)


@pytest.mark.guarantees(
  "scale_by_ngs", "While schedule falls, the factor does not change"
)
@pytest.mark.guarantees(
  "accelerate", "While schedule falls, the factor does not change"
)
@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_a_falling_schedule_is_followed(name, per_leaf):
  """Of gradients that agree, the factor would make more and more."""
  options = {"hyper_rate": 0.1, "hurry": 1.0, "per_leaf": per_leaf}
  tx = STEPS[name](schedule=DECAY, **options)
  free = STEPS[name](**options)
  params = {"a": np.ones([3], np.float32), "b": np.ones([2], np.float32)}
  state = free_state = tx.init(params)
  update, free_update = jax.jit(tx.update), jax.jit(free.update)
  factors = []
  for count in range(20):
    updates, state = update(params, state, params)
    expected, free_state = free_update(params, free_state, params)
    factor = jax.device_get(optax.tree.get(state, "acceleration"))
    factors.append(factor["a"] if per_leaf else factor)
    if count <= 10:
      jax.tree.map(np.testing.assert_array_equal, updates, expected)
    else:
      grown = jax.device_get(optax.tree.get(free_state, "acceleration"))
      for leaf in params:
        ratio = grown[leaf] / factor[leaf] if per_leaf else grown / factor
        np.testing.assert_allclose(
          updates[leaf],
          (2 - count / 10) * np.asarray(expected[leaf]) / ratio,
          rtol=1e-5,
        )
  assert factors[10] > factors[1]
  assert len({float(factor) for factor in factors[10:]}) == 1


def test_a_schedule_that_falls_from_the_start_does_not_hold_the_start():
  schedule = optax.linear_schedule(1.0, 0.0, 300)
  make = lambda rate: optax.chain(
    ranger.scale_by_ngs(schedule=schedule), optax.scale_by_learning_rate(rate)
  )
  assert (descend(make, RATES) < 1e-2).all()


def test_an_explosion_is_braked_while_the_schedule_falls():
  tx = ranger.scale_by_ngs(schedule=DECAY, acceleration=1.0, hurry=1.0)
  gradient = np.ones([3], np.float32)
  state, update = tx.init(gradient), jax.jit(tx.update)
  for _ in range(12):
    _, state = update(gradient, state)
  _, after = update(-100 * gradient, state)
  assert optax.tree.get(after, "acceleration") < 0.02 * optax.tree.get(
    state, "acceleration"
  )


@pytest.mark.parametrize("name", STEPS)
def test_a_schedule_that_is_no_function_is_refused(name):
  with pytest.raises(TypeError, match=r"schedule must be a function.*got 0\.1"):
    STEPS[name](schedule=0.1)


def test_a_count_that_is_full_still_looks_at_what_was_kept():
  """Of gradients that agree, the cosine is one, whatever part is looked at."""
  params = {"w": np.random.default_rng(0).standard_normal([512, 256], np.float32)}
  tx = ranger.accelerate(optax.sgd(0.1), acceleration=1.0, hyper_rate=0.1, hurry=1.0)
  state = tx.init(params)._replace(count=np.int32(np.iinfo(np.int32).max))
  update = jax.jit(tx.update)
  for _ in range(3):
    _, state = update(params, state, params)
  np.testing.assert_allclose(state.factor.acceleration, np.exp(0.2), rtol=1e-4)

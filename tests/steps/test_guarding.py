"""The guard: what it skips, what it leaves alone, and a run that it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from tests.helpers import temporaries


def run(step, gradients, **extra):
  params = jnp.zeros([3])
  state, results, states = step.init(params), [], []
  update = jax.jit(step.update)
  for i, gradient in enumerate(gradients):
    args = {name: values[i] for name, values in extra.items()}
    updates, state = update(gradient, state, params, **args)
    results.append(np.asarray(updates))
    states.append(state)
  return results, states


def draw(count, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.standard_normal([3]).astype(np.float32) for _ in range(count)]


def test_a_counter_stops_at_the_largest_number():
  """A run of billions of skips doesn't count backward."""
  step, top = ranger.skip_nonfinite(optax.sgd(0.1)), np.iinfo(np.int32).max
  state, params = step.init(jnp.zeros([3])), jnp.zeros([3])
  for count, expected in ((top - 1, top), (top, top)):
    state = state._replace(num_skipped=jnp.int32(count))
    _, state = step.update(params + jnp.nan, state, params)
    assert int(state.num_skipped) == expected


@pytest.mark.parametrize("guard", [ranger.skip_nonfinite, ranger.skip_anomalies])
def test_no_temporaries_of_the_parameters_size(guard):
  if guard is ranger.skip_anomalies and jax.__version_info__ < (0, 10, 2):
    pytest.skip("XLA shares the squares of the norm with adamw, and writes them")
  params = [np.ones([1024, 1024], np.float32) for _ in range(2)]
  size = sum(leaf.nbytes for leaf in params)
  with jax.numpy_dtype_promotion("standard"):
    assert temporaries(guard(optax.adamw(0.1)), params) < 0.01 * size


@pytest.mark.guarantees(
  "skip_anomalies", "Without outliers, updates are those of inner"
)
def test_without_outliers_it_is_the_inner():
  inner = optax.sgd(0.1, momentum=0.9)
  results, states = run(ranger.skip_anomalies(inner), draw(50))
  expected, _ = run(optax.with_extra_args_support(inner), draw(50))
  np.testing.assert_array_equal(np.stack(results), np.stack(expected))
  assert int(states[-1].num_skipped) == 0


@pytest.mark.guarantees(
  "skip_anomalies", "A skipped update is zero and does not change the state of"
)
@pytest.mark.parametrize("bad", [1e4, np.nan, np.inf])
def test_skip_leaves_the_inner_state_alone(bad):
  gradients = draw(40)
  gradients[30] = gradients[30] * bad
  step = ranger.skip_anomalies(optax.sgd(0.1, momentum=0.9))
  results, states = run(step, gradients)
  assert not results[30].any()
  np.testing.assert_array_equal(states[30].inner_state[0].trace,
                                states[29].inner_state[0].trace)  # fmt: skip
  without, _ = run(step, gradients[:30] + gradients[31:])
  np.testing.assert_array_equal(results[31:], without[30:])
  skipped = [(int(s.num_skipped), int(s.num_skipped_in_a_row)) for s in states]
  assert skipped[29:32] == [(0, 0), (1, 1), (1, 0)]


@pytest.mark.guarantees("skip_anomalies", "Skipped values do not enter the statistics")
def test_skipped_values_stay_out_of_the_statistics():
  gradients = draw(40)
  spiked = [g * 1e4 if 25 <= i < 30 else g for i, g in enumerate(gradients)]
  step = ranger.skip_anomalies(optax.sgd(0.1))
  _, states = run(step, spiked)
  _, expected = run(step, gradients[:25] + gradients[30:])
  assert int(states[-1].num_skipped) == 5
  assert float(states[-1].mean) == float(expected[-1].mean)
  assert float(states[-1].variance) == float(expected[-1].variance)


def test_statistics_equal_numpy():
  gradients = draw(30)
  _, states = run(ranger.skip_anomalies(optax.sgd(0.1), decay=0.9), gradients)
  levels = np.log([np.linalg.norm(g) for g in gradients])
  np.testing.assert_allclose(states[4].mean, levels[:5].mean(), rtol=1e-4)
  np.testing.assert_allclose(states[4].variance, levels[:5].var(), rtol=1e-4)
  mean, variance = levels[:10].mean(), levels[:10].var()
  for level in levels[10:]:
    deviation = level - mean
    mean += 0.1 * deviation
    variance = 0.9 * (variance + 0.1 * deviation**2)
  np.testing.assert_allclose(states[-1].mean, mean, rtol=1e-3)
  np.testing.assert_allclose(states[-1].variance, variance, rtol=1e-3)


def test_the_defaults_are_those_that_are_told():
  """Six spreads, of five percent at least, after twenty updates; a decay of 0.98."""
  step = ranger.skip_anomalies(optax.identity())
  start, update = step.init(jnp.zeros([3])), jax.jit(step.update)

  def at(level, count=20, variance=0.25):
    state = start._replace(count=jnp.int32(count), variance=jnp.float32(variance))
    updates, after = update(jnp.zeros([3]).at[1].set(np.exp(level)), state)
    return bool(updates.any()), after

  for level, spread in ((3, 0.5), (0.3, 0.0)):
    assert at(0.98 * level, variance=spread**2)[0]
    assert not at(1.02 * level, variance=spread**2)[0]
  assert at(30.0, count=19)[0]
  accepted, after = at(-30.0, count=1000)
  assert accepted
  np.testing.assert_allclose(after.mean, -0.02 * 30, rtol=1e-4)
  np.testing.assert_allclose(after.variance, 0.98 * (0.25 + 0.02 * 900), rtol=1e-4)


def test_finite_entries_whose_squares_are_not_are_skipped():
  step = ranger.skip_nonfinite(optax.sgd(0.1, momentum=0.9))
  start = step.init(jnp.zeros([3]))
  updates, state = jax.jit(step.update)(jnp.array([1.0, 2e19, 1.0]), start)
  np.testing.assert_array_equal(updates, 0)
  expected = start._replace(num_skipped=jnp.int32(1))
  jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_value_may_be_watched(sign):
  step = ranger.skip_anomalies(optax.sgd(0.1), watch="value", warmup=5)
  values = [sign * jnp.float32(1 + 0.01 * i) for i in range(20)]
  values[12] = sign * jnp.float32(500)
  results, states = run(step, draw(20), value=values)
  assert not results[12].any()
  assert int(states[-1].num_skipped) == 1
  with pytest.raises(ValueError, match="needs value="):
    step.update(jnp.zeros([3]), states[-1])


@pytest.mark.guarantees("skip_anomalies", "Non-finite updates are never accepted")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("watch", ["norm", "value"])
def test_never_accepts_what_is_not_finite(bad, watch):
  """Not in the warm-up, and not when the limit of skips in a row is reached."""
  step = ranger.skip_anomalies(optax.sgd(0.1), watch=watch, warmup=30, max_in_a_row=2)
  gradients = draw(24)
  for i, gradient in enumerate(gradients):
    if i % 4:
      gradient[1] = bad
  results, states = run(step, gradients, value=[jnp.float32(1)] * 24)
  assert all(r.any() == (i % 4 == 0) for i, r in enumerate(results))
  assert int(states[-1].num_skipped) == 18
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]))


def test_limit_in_a_row_accepts_a_new_level():
  gradients = [g * (1e4 if i >= 30 else 1) for i, g in enumerate(draw(60))]
  keep, _ = run(ranger.skip_anomalies(optax.sgd(0.1)), gradients)
  assert not np.any(keep[30:])
  limited, states = run(
    ranger.skip_anomalies(optax.sgd(0.1), max_in_a_row=3), gradients
  )
  assert [bool(r.any()) for r in limited[30:35]] == [False] * 3 + [True] * 2
  assert all(r.any() for r in limited[33:])
  # The statistics start again from the first that was accepted.
  assert int(states[33].count) == 1
  assert float(states[33].variance) == 0
  np.testing.assert_allclose(
    states[33].mean, np.log(np.linalg.norm(gradients[33])), rtol=1e-5
  )
  assert int(states[-1].num_skipped) == 3


def test_zeros_are_accepted_and_teach_nothing():
  zeros = [jnp.zeros([3])] * 30
  results, states = run(ranger.skip_anomalies(optax.sgd(0.1)), zeros + draw(30))
  assert int(states[29].count) == 0
  assert int(states[-1].num_skipped) == 0
  assert all(r.any() for r in results[30:])


def test_infinite_threshold_skips_only_what_is_not_finite():
  gradients = [g * (1e4 if i == 30 else 1) for i, g in enumerate(draw(40))]
  gradients[35] = gradients[35] * np.nan
  step = ranger.skip_anomalies(optax.sgd(0.1), threshold=float("inf"))
  results, _ = run(step, gradients)
  assert results[30].any()
  assert not results[35].any()


def test_extra_args_reach_the_inner_update():
  seen = {}

  def update(updates, state, params=None, **extra_args):
    seen.update(extra_args)
    return updates, state

  inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
  step = ranger.skip_anomalies(inner)
  loss = lambda p: p.sum()
  step.update(jnp.ones([3]), step.init(jnp.ones([3])), value=1.0, value_fn=loss)
  assert seen["value_fn"] is loss
  assert seen["value"] == 1.0


def test_a_run_on_digits_survives_spikes_and_nan():
  """1 % of gradients times 1e4 and 1 % NaN: within 0.01 of the undisturbed run."""
  from sklearn import datasets
  from sklearn import model_selection

  pixels, targets = datasets.load_digits(return_X_y=True)
  data = model_selection.train_test_split(
    pixels.astype(np.float32) / 16, targets, test_size=360, random_state=0
  )
  x, test_x, y, test_y = map(jnp.asarray, data)
  rng = np.random.default_rng(0)
  params = {
    "w1": (rng.standard_normal([64, 64]) / 8).astype(np.float32),
    "w2": (rng.standard_normal([64, 10]) / 8).astype(np.float32),
  }
  logits = lambda params, x: jax.nn.relu(x @ params["w1"]) @ params["w2"]
  steps = 1000
  batches = jnp.asarray(rng.integers(0, len(x), [steps, 64]))
  kind = rng.choice(3, steps, p=[0.98, 0.01, 0.01])
  factors = np.array([1.0, 1e4, np.nan], np.float32)[kind]

  def loss(params, ids):
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits(params, x[ids]), y[ids]
    )
    return losses.mean()

  def accuracy(tx, factors):
    def step(carry, inputs):
      params, state = carry
      ids, factor = inputs
      grads = jax.tree.map(lambda g: g * factor, jax.grad(loss)(params, ids))
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    (final, state), _ = jax.lax.scan(
      step, (params, tx.init(params)), (batches, factors)
    )
    return (logits(final, test_x).argmax(axis=1) == test_y).mean(), state

  inner = optax.sgd(0.1, momentum=0.9)
  run_bare = jax.jit(lambda factors: accuracy(inner, factors))
  run_guarded = jax.jit(lambda factors: accuracy(ranger.skip_anomalies(inner), factors))
  undisturbed, _ = run_bare(np.ones_like(factors))
  guarded, state = run_guarded(factors)
  bare, _ = run_bare(factors)
  assert undisturbed > 0.95
  assert guarded > undisturbed - 0.01
  assert bare < undisturbed - 0.01
  # Every spike and NaN, but for those among the first twenty.
  assert abs(int(state.num_skipped) - int((kind > 0).sum())) <= 1

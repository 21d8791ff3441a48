"""The cautious mask: against its published form, and what it never does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from optax_ranger._core import parts
from tests.helpers import close
from tests.helpers import temporaries


def gradients(count, shape=(5, 40), seed=0):
  rng = np.random.default_rng(seed)
  return [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]


def run(step, given, params):
  state, update, results = step.init(params), jax.jit(step.update), []
  for gradient in given:
    result, state = update(gradient, state, params)
    results.append(result)
  return results, state


def published(update, gradient):
  """The code of the paper, where updates are subtracted."""
  update, gradient = -np.asarray(update, np.float64), np.asarray(gradient, np.float64)
  mask = (update * gradient > 0).astype(np.float64)
  return -update * mask / max(mask.mean(), 1e-3)


@pytest.mark.parametrize(
  "inner",
  [optax.sgd(0.1, momentum=0.9), optax.lion(0.1), optax.scale_by_learning_rate(1.0)],
)
def test_it_is_the_published_mask(inner):
  given = [{"w": g, "b": g[0]} for g in gradients(6)]
  params = jax.tree.map(np.zeros_like, given[0])
  results, _ = run(ranger.mask_contradictions(inner), given, params)
  plain, _ = run(optax.with_extra_args_support(inner), given, params)
  for result, update, gradient in zip(results, plain, given, strict=True):
    close(result, jax.tree.map(published, update, gradient), atol=1e-6)


@pytest.mark.guarantees(
  "mask_contradictions", "No entry of an update has the sign of its gradient"
)
@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_no_entry_goes_up(scale):
  """Also where the product of update and gradient is too small for float32."""
  given = [np.float32(scale) * g for g in gradients(8)]
  inner = optax.sgd(0.1, momentum=0.95)
  results, _ = run(ranger.mask_contradictions(inner), given, given[0])
  plain, _ = run(optax.with_extra_args_support(inner), given, given[0])
  last = [np.sign(x[-1]) for x in (plain, results, given)]
  assert (last[0] == last[2]).mean() > 0.2
  assert (last[1] != last[2]).all()
  assert (last[1] == 0).mean() == (last[0] == last[2]).mean()


@pytest.mark.guarantees(
  "mask_contradictions", "An update without a contradiction is that of"
)
def test_without_contradictions_it_is_the_inner():
  """Also where the gradient is zero, as in the rows that a batch does not touch."""
  given = [np.abs(g) for g in gradients(5)]
  for i, g in enumerate(given):
    g[i] = 0
  inner = optax.sgd(0.1, momentum=0.9)
  results, _ = run(ranger.mask_contradictions(inner), given, given[0])
  plain, _ = run(optax.with_extra_args_support(inner), given, given[0])
  chex.assert_trees_all_equal(results, plain)


def test_few_that_are_kept_are_scaled_at_most_a_thousandfold():
  inner = optax.sgd(1.0, momentum=0.5)
  first, step = np.ones([4000], np.float32), ranger.mask_contradictions(inner)
  second = np.full([4000], -0.1, np.float32)
  results, _ = run(step, [first, np.where(np.arange(4000), second, first)], first)
  close(results[-1], np.eye(1, 4000)[0] * -1.5 * 1000, atol=1e-3)
  results, _ = run(step, [first, second], first)
  assert not np.asarray(results[-1]).any()


def test_complex_parameters():
  """An entry goes up if its real inner product with the gradient is positive."""
  rng = np.random.default_rng(0)
  draw = lambda: (rng.standard_normal([50, 2]) @ [1, 1j]).astype(np.complex64)
  given, inner = [draw() for _ in range(4)], optax.sgd(0.1, momentum=0.9)
  results, _ = run(ranger.mask_contradictions(inner), given, given[0])
  plain, _ = run(optax.with_extra_args_support(inner), given, given[0])
  up = np.real(np.conj(given[-1]) * np.asarray(plain[-1])) > 0
  assert 0 < up.sum() < 50
  expected = np.where(up, 0, np.asarray(plain[-1]) * 50 / (50 - up.sum()))
  close(results[-1], expected, atol=1e-6)


MASKED_ADAM = ranger.mask_contradictions(optax.adam(0.1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_is_skipped_is_counted(bad):
  given = gradients(5)
  wrong = given[3].copy()
  wrong[0, 0] = bad
  step = MASKED_ADAM
  with jax.numpy_dtype_promotion("standard"):
    expected, end = run(step, given[:3] + given[4:], given[0])
    results, state = run(step, [*given[:3], wrong, given[4]], given[0])
  assert not np.asarray(results[3]).any()
  close(results[4], expected[3])
  close(state.inner_state, end.inner_state)
  assert int(state.num_skipped) == 1


SGD = optax.sgd(0.1, momentum=0.9)
MASKED_SGD = ranger.mask_contradictions(SGD)


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_a_bad_entry_of_a_large_leaf_is_seen_wherever_it_is(value):
  params = {"w": np.ones([512, 256], np.float32)}
  step, update = MASKED_SGD, jax.jit(MASKED_SGD.update)
  _, state = update(params, step.init(params), params)
  for row in (0, 9, 131):
    bad = {"w": params["w"].copy()}
    bad["w"][row, 7] = value
    updates, after = update(bad, state, params)
    assert not np.asarray(updates["w"]).any()
    assert int(after.num_skipped) == 1
    chex.assert_trees_all_equal(after._replace(num_skipped=state.num_skipped), state)


def test_the_share_of_large_leaves_is_that_of_a_part():
  params = np.zeros([512, 256], np.float32)
  seen, given = parts.view(params), gradients(4, [512, 256])
  results, _ = run(MASKED_SGD, given, params)
  plain, _ = run(optax.with_extra_args_support(SGD), given, params)
  for count, triple in enumerate(zip(results, plain, given, strict=True)):
    result, update, gradient = map(np.asarray, triple)
    kept = update * gradient <= 0
    share = np.asarray(seen.part(jnp.asarray(kept), count)).mean()
    close(result, np.where(kept, update, 0) / share, atol=1e-6)
    assert share == pytest.approx(kept.mean(), abs=0.02)
  assert share < 0.9


def test_no_temporaries_of_the_parameters_size():
  params = [np.ones([1024, 1024], np.float32) for _ in range(2)]
  size = sum(leaf.nbytes for leaf in params)
  with jax.numpy_dtype_promotion("standard"):
    step = ranger.mask_contradictions(optax.adamw(0.1))
    assert temporaries(step, params) < 0.01 * size
    assert temporaries(ranger.accelerate(step), params) < 0.03 * size


@pytest.mark.few(1)
def test_all_laws_hold_in_parts(monkeypatch):
  monkeypatch.setattr(parts, "SMALLEST", 32)
  params = {"b": jnp.ones([64]), "c": jnp.ones([3])}
  step = ranger.mask_contradictions(optax.sgd(0.1, momentum=0.9))
  report = ranger.testing.check(step, params=params)
  assert not report.failed, str(report)


def test_it_works_inside_of_others():
  """The masked update, times a factor, and once a window."""
  masked, given = MASKED_SGD, gradients(4)
  expected, _ = run(masked, given, given[0])
  halved = ranger.accelerate(masked, hyper_rate=0, acceleration=0.5)
  results, _ = run(halved, given, given[0])
  close(results, [np.asarray(each) / 2 for each in expected])
  twice = [each for each in given for _ in range(2)]
  results, _ = run(ranger.accumulate(masked, 2), twice, given[0])
  close(results[1::2], expected)

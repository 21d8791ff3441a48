"""Clipping of examples: the norms, the quantile, and the memory of the fused form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from tests.helpers import close


def draw(n=10, seed=0):
  rng = np.random.default_rng(seed)
  scale = 10 ** rng.uniform(-1, 1, n)
  normal = lambda *shape: (
    rng.standard_normal((n, *shape)) * scale.reshape(n, *[1] * len(shape))
  ).astype(np.float32)
  return {"a": normal(3, 2), "b": normal()}


def norms(tree):
  squares = [
    (np.asarray(leaf, float).reshape(len(leaf), -1) ** 2).sum(axis=1)
    for leaf in tree.values()
  ]
  return np.sqrt(sum(squares))


@pytest.mark.guarantees("clip_examples", "No gradient comes out longer than the norm")
@pytest.mark.guarantees("clip_examples", "Without normalize, gradients that are")
def test_longer_gradients_are_clipped_and_others_kept():
  tree, step = draw(), ranger.clip_examples(2.0)
  found, _ = jax.jit(step.update)(tree, step.init(tree))
  found = jax.device_get(found)
  before, after = norms(tree), norms(found)
  assert (before > 2).any()
  assert (before < 2).any()
  np.testing.assert_allclose(after, np.minimum(before, 2), rtol=1e-5)
  for leaf, old in zip(found.values(), tree.values(), strict=True):
    np.testing.assert_array_equal(leaf[before < 2], old[before < 2])
    factor = np.maximum(before / 2, 1).reshape(-1, *[1] * (old.ndim - 1))
    np.testing.assert_allclose(leaf * factor, old, rtol=1e-5)


def test_all_are_normalized():
  tree, step = draw(), ranger.clip_examples(2.0, normalize=True)
  for leaf in tree.values():
    leaf[3] = 0
  found, _ = jax.jit(step.update)(tree, step.init(tree))
  expected = np.full(10, 2.0)
  expected[3] = 0
  np.testing.assert_allclose(norms(found), expected, rtol=1e-5)


@functools.cache
def at_quantile(quantile):
  return ranger.clip_examples(quantile=quantile, rate=None)


@pytest.mark.parametrize("corrupt", [1, 3, 4])
def test_the_batch_may_choose_the_norm(corrupt):
  """As in adaptive robust clipping, where the longest ones are clipped to the next."""
  tree, n = draw(), 10
  step = at_quantile(1 - 2 * corrupt * (n - corrupt) / n**2)
  found, state = jax.jit(step.update)(tree, step.init(tree))
  before = norms(tree)
  top = np.sort(before)[n - int(2 * corrupt / n * (n - corrupt)) - 1]
  np.testing.assert_allclose(norms(found), np.minimum(before, top), rtol=1e-5)
  assert float(state.norm) == pytest.approx(top, rel=1e-5)
  # Absent ones do not choose.
  short = before < np.median(before)
  for quantile, present, place in ((1.0, short, 4), (0.0, ~short, 5)):
    step = at_quantile(quantile)
    weights = present.astype(np.float32)
    _, state = jax.jit(step.update)(tree, state, member_weights=weights)
    assert float(state.norm) == pytest.approx(np.sort(before)[place], rel=1e-5)
  # A norm of zero is none.
  _, kept = jax.jit(step.update)(jax.tree.map(np.zeros_like, tree), state)
  assert float(kept.norm) == float(state.norm)
  with pytest.raises(ValueError, match="rate=None needs quantile=, got None"):
    ranger.clip_examples(rate=None)


@pytest.mark.parametrize("quantile", [0.2, 0.8])
def test_the_norm_finds_the_quantile(quantile):
  step = ranger.clip_examples(1e-3, quantile=quantile)
  state, update = step.init(None), jax.jit(step.update)
  for seed in range(300):
    tree = draw(100, seed)
    _, state = update(tree, state)
  expected = np.quantile(
    np.concatenate([norms(draw(100, s)) for s in range(20)]), quantile
  )
  np.testing.assert_allclose(state.norm, expected, rtol=0.1)


def test_the_quantile_is_of_weights():
  step = ranger.clip_examples(2.0, quantile=0.5, rate=0.3)
  tree, state = draw(), step.init(None)
  weights = np.array([3, 1, 0, 2, 0, 1, 5, 0.5, 1, 2], np.float32)
  _, state = jax.jit(step.update)(tree, state, member_weights=weights)
  share = weights[norms(tree) <= 2].sum() / weights.sum()
  assert 0 < share < 1
  np.testing.assert_allclose(state.norm, 2 * np.exp(-0.3 * (share - 0.5)), rtol=1e-5)
  # Norms may be given; one that would overflow is not taken.
  state = ranger.steps.ClipExamplesState(np.float32(3e38))
  far = np.full(10, 3.2e38, np.float32)
  _, kept = jax.jit(step.update)(tree, state, norms=far)
  np.testing.assert_array_equal(kept.norm, state.norm)


@pytest.mark.guarantees("clip_examples", "A non-finite gradient stays what it is")
def test_bad_gradients_reach_the_aggregation_only():
  tree, step = draw(), ranger.clip_examples(1.0, quantile=0.5)
  update, others = jax.jit(step.update), np.arange(10) != 4
  bad = {**tree, "b": np.where(others, tree["b"], np.float32(np.nan))}
  found, state = jax.device_get(update(bad, step.init(tree)))
  assert np.isnan(found["b"][4])
  good = jax.tree.map(lambda leaf: leaf[others], tree)
  expected, other = update(good, step.init(tree))
  close(state, other)
  close(jax.tree.map(lambda leaf: leaf[others], found), expected)
  everything = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), tree)
  _, state = update(everything, step.init(tree))
  close(state, step.init(tree))


def losses(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["w"])
  return ((hidden @ params["v"]) - batch["y"]) ** 2


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0))
@jax.grad
def gradients(params, row):
  return losses(params, jax.tree.map(lambda leaf: leaf[None], row))[0]


def problem(n=24, width=6):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  params = {"w": normal(5, width), "v": normal(width)}
  return params, {"x": normal(n, 5), "y": normal(n)}


@functools.cache
def steps(**options):
  return optax.chain(
    ranger.clip_examples(0.5, **options),
    ranger.aggregate_by_mean(),
  )


@pytest.mark.parametrize("options", [{}, {"quantile": 0.3}, {"normalize": True}])
def test_the_engine_computes_norms_first(options):
  """The gradient of the per-example form, also of a bad example."""
  params, batch = problem()
  batch["x"][3] = np.inf
  step = steps(**options)
  rows = gradients(params, batch)
  expected, other = jax.jit(step.update)(rows, step.init(params))
  grad_fn = jax.jit(ranger.value_and_grad(losses, step))
  _, found, state = grad_fn(params, batch, state=step.init(params))
  close(found, expected, rtol=1e-5, atol=1e-6)
  close(state, other, rtol=1e-5)
  assert int(state[1].num_dropped) == 1


def test_float16_gradients_of_norms_whose_square_overflows():
  step = optax.chain(ranger.clip_examples(100.0), ranger.aggregate_by_mean())
  rows = np.array([[300.0, 400.0], [10.0, 0.0]], np.float16)
  grad_fn = jax.jit(
    ranger.value_and_grad(lambda w, rows: (rows * w[None]).sum(axis=1), step)
  )
  params = np.zeros(2, np.float16)
  _, found, state = grad_fn(params, rows, state=step.init(params))
  assert found.dtype == jnp.float16
  np.testing.assert_allclose(found, [35, 40], rtol=1e-3)
  assert int(state[1].num_dropped) == 0


def test_the_memory_is_that_of_a_micro_batch():
  params, batch = problem(n=128, width=4096)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  grad_fn = ranger.value_and_grad(losses, steps(), micro_batch_size=8)
  compiled = jax.jit(grad_fn).lower(params, batch).compile()
  activations = 3 * 128 * 4096 * 4
  room = compiled.memory_analysis().temp_size_in_bytes - activations
  assert room < 1.5 * 8 * size


@functools.cache
def updater(**options):
  step = steps(quantile=0.4)
  return ranger.train_step(losses, optax.sgd(0.1), step=step, donate=False, **options)


@pytest.mark.parametrize("options", [{"mesh": True}, {"num_micro_batches": 3}])
def test_devices_and_micro_batches_change_nothing(options):
  params, batch = problem()
  if "mesh" in options:
    options = {"mesh": jax.make_mesh((2,), ("data",))}
  results = []
  for update in (updater(), updater(**options)):
    found, state, metrics = update(params, update.init(params), batch)
    results.append(jax.device_get((found, state.step, metrics)))
  close(*results, atol=1e-5)


def test_a_chain_that_would_need_other_norms_is_refused_in_sweeps():
  params, batch = problem()
  step = optax.chain(ranger.clip_examples(0.5), ranger.aggregate_by_krum(2))
  step = step._replace(update=jax.jit(step.update))  # It is tried on three shapes.
  with pytest.raises(ValueError, match="num_sweeps above 1 needs a step"):
    jax.jit(ranger.value_and_grad(losses, step, num_sweeps=2))(params, batch)


def test_a_norm_equal_to_the_threshold_lies_below_it():
  step = ranger.clip_examples(1.0, quantile=0.5, rate=0.2)
  gradients = np.eye(4, dtype=np.float32)
  _, state = jax.jit(step.update)(gradients, step.init(gradients[0]))
  np.testing.assert_allclose(state.norm, np.exp(-0.2 * (1 - 0.5)), rtol=1e-6)


def test_an_example_with_a_finite_loss_and_no_gradient_is_left_out():
  """The square root has none at zero; its norm is found in the first pass."""
  chain = optax.chain(ranger.clip_examples(0.5), ranger.aggregate_by_mean())
  losses = lambda w, batch: jnp.sqrt(jnp.abs(batch["x"] @ w))
  x = np.random.default_rng(0).standard_normal([5, 3]).astype(np.float32)
  x[2] = 0
  grad_fn, params = ranger.value_and_grad(losses, chain), np.ones(3, np.float32)
  grad_fn = jax.jit(grad_fn)
  state = chain.init(params)
  _, gradient, after = grad_fn(params, {"x": x}, state=state)
  _, expected, others = grad_fn(params, {"x": np.delete(x, 2, 0)}, state=state)
  np.testing.assert_allclose(gradient, expected, rtol=1e-6)
  assert np.isfinite(gradient).all()
  assert int(optax.tree.get(after, "num_dropped")) == 1
  assert int(optax.tree.get(others, "num_dropped")) == 0

"""The loops that people have: Flax NNX, Flax Linen, Equinox, a plain pytree."""

from collections.abc import Callable

import equinox as eqx
from flax import linen
from flax import nnx
from flax.training import train_state
import jax
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from tests.laws import registry

X = np.random.default_rng(0).standard_normal([6, 3]).astype(np.float32)
Y = np.random.default_rng(1).standard_normal([6, 2]).astype(np.float32)

# Extra args, members, windows, tables: each once.
LOOPED = (
  "average_neighbors-batch",
  "accumulate-sgd",
  "smooth_predictions",
  "ranger-whole",
)


def chained(case):
  """A step in a chain that ends in a plain optimizer."""
  step = case.make()
  if case.members:
    step = optax.chain(step, ranger.aggregate_by_mean())
  if case.factory not in ("accumulate", "ranger"):
    step = optax.chain(step, optax.sgd(0.02))
  return step


def gradients(case, loss, params):
  """Mean gradients, or per-example ones for the steps that take them."""
  if not case.members:
    return jax.grad(lambda params: loss(params, X, Y))(params)
  one = lambda params, x, y: loss(params, x[None], y[None])
  return jax.vmap(jax.grad(one), in_axes=(None, 0, 0))(params, X, Y)


@pytest.fixture(autouse=True)
def _promotion_of_foreign_code():
  """Flax and Optax's own optimizers need Optax's and Flax's default promotion."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.mark.few(2)
@pytest.mark.parametrize("name", LOOPED)
def test_loops_pass_extra_args(name):
  """NNX's Optimizer, and Linen's TrainState by hand, equal a plain loop."""
  (case,) = (case for case in registry.CASES if case.name == name)
  tx = chained(case)
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  params = {"kernel": model.kernel[...] + 0, "bias": model.bias[...] + 0}
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  dense = linen.Dense(2)
  apply = lambda params, x: dense.apply({"params": params}, x)
  train = train_state.TrainState.create(apply_fn=apply, params=params, tx=tx)
  loss = lambda params, x, y: ((apply(params, x) - y) ** 2).mean()

  @jax.jit
  def step(params, state, extra):
    updates, state = tx.update(gradients(case, loss, params), state, params, **extra)
    return optax.apply_updates(params, updates), state

  @nnx.jit
  def nnx_step(model, optimizer, extra):
    graphdef, params = nnx.split(model, nnx.Param)
    loss = lambda params, x, y: ((nnx.merge(graphdef, params)(x) - y) ** 2).mean()
    optimizer.update(model, gradients(case, loss, params), **extra)

  @jax.jit
  def linen_step(train, extra):
    # TrainState.apply_gradients drops extra args.
    grads = gradients(case, loss, train.params)
    updates, state = train.tx.update(grads, train.opt_state, train.params, **extra)
    return train.replace(
      params=optax.apply_updates(train.params, updates), opt_state=state
    )

  state, first = tx.init(params), float(loss(params, X, Y))
  for call in range(9):
    extra = registry.extra_args(case, call)
    params, state = step(params, state, extra)
    nnx_step(model, optimizer, extra)
    train = linen_step(train, extra)
  assert loss(params, X, Y) < 0.9 * first
  for leaf in ("kernel", "bias"):
    np.testing.assert_allclose(getattr(model, leaf)[...], params[leaf], rtol=1e-5)
    np.testing.assert_allclose(train.params[leaf], params[leaf], rtol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize(
  "tx",
  [
    optax.chain(optax.adam(0.1), ranger.smooth_by_ema(0.9)),
    optax.chain(optax.adam(0.1), ranger.smooth_by_lookahead(3)),
    ranger.ranger_radam(0.1),
  ],
  ids=["ema", "lookahead", "ranger_radam"],
)
def test_loops_give_the_same_parameters(tx):
  """NNX's Optimizer, Linen's TrainState, Equinox and a plain loop."""
  loss = lambda params, x, y: ((x @ params["kernel"] + params["bias"] - y) ** 2).mean()

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss)(params, X, Y), state, params)
    return optax.apply_updates(params, updates), state

  @nnx.jit
  def nnx_step(model, optimizer):
    optimizer.update(model, nnx.grad(lambda model: ((model(X) - Y) ** 2).mean())(model))

  @jax.jit
  def linen_step(train):
    return train.apply_gradients(grads=jax.grad(loss)(train.params, X, Y))

  @eqx.filter_jit
  def equinox_step(module, state):
    grads = eqx.filter_grad(lambda module: loss(vars(module), X, Y))(module)
    updates, state = tx.update(grads, state, eqx.filter(module, eqx.is_array))
    return eqx.apply_updates(module, updates), state

  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  params = {"kernel": model.kernel[...] + 0, "bias": model.bias[...] + 0}
  train = train_state.TrainState.create(apply_fn=loss, params=params, tx=tx)
  module = _Module(**params)
  module_state = tx.init(eqx.filter(module, eqx.is_array))
  state = tx.init(params)
  for _ in range(8):
    params, state = step(params, state)
    nnx_step(model, optimizer)
    train = linen_step(train)
    module, module_state = equinox_step(module, module_state)
  expected = ranger.eval_params(state, params)
  smoothed_model = nnx.clone(model)
  nnx.update(smoothed_model, ranger.eval_params(optimizer, nnx.state(model, nnx.Param)))
  smoothed_train = ranger.eval_params(train, train.params)
  arrays = eqx.filter(module, eqx.is_array)
  smoothed_module = ranger.eval_params(module_state, arrays)
  assert not np.array_equal(expected["kernel"], params["kernel"])
  for name in ("kernel", "bias"):
    for raw in (model, train.params, module):
      raw = raw[name] if isinstance(raw, dict) else getattr(raw, name)[...]
      np.testing.assert_allclose(raw, params[name], rtol=1e-6)
    for smoothed in (smoothed_model, smoothed_train, smoothed_module):
      leaf = smoothed[name] if isinstance(smoothed, dict) else getattr(smoothed, name)
      np.testing.assert_allclose(leaf[...], expected[name], rtol=1e-6)


class _Module(eqx.Module):
  kernel: jax.Array
  bias: jax.Array
  activation: Callable = jax.nn.relu


def test_chain_of_the_readme_runs_on_per_example_gradients():
  tx = optax.chain(
    ranger.average_neighbors(), ranger.aggregate_by_mean(), optax.adam(1e-3)
  )
  params = {"w": np.zeros([3, 2], np.float32), "b": np.zeros(2, np.float32)}
  grads = jax.tree.map(lambda p: np.ones([6, *p.shape], np.float32), params)
  updates, _ = jax.jit(tx.update)(
    grads, tx.init(params), params, neighbors=registry.neighbors()
  )
  jax.tree.map(
    lambda u: np.testing.assert_allclose(u, np.full(u.shape, -1e-3), rtol=1e-4),
    updates,
  )

"""Each step in the loops that people have: Flax NNX, Flax Linen, a plain pytree."""

from collections.abc import Callable

import equinox as eqx
from flax import linen
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from tests.laws import registry

X = jnp.asarray(np.random.default_rng(0).standard_normal([6, 3]), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).standard_normal([6, 2]), jnp.float32)

_OPTIMIZERS = (
  "accelerate",
  "accumulate",
  "ranger",
  "ranger_radam",
  "skip_anomalies",
  "skip_nonfinite",
)


def chains():
  """Each step in a chain that ends in a plain optimizer."""
  for case in registry.CASES:
    step = case.make()
    if case.factory == "average_neighbors":
      step = optax.chain(step, ranger.aggregate_by_mean())
    if case.factory in ("smooth_by_ema", "smooth_by_lookahead"):
      step = optax.chain(optax.sgd(0.02), step)
    elif case.factory not in _OPTIMIZERS:
      step = optax.chain(step, optax.sgd(0.02))
    yield pytest.param(case, step, id=case.name)


each_chain = pytest.mark.parametrize(("case", "tx"), list(chains()))


def gradients(case, loss, params):
  """Mean gradients, or per-example ones for the steps that take them."""
  if not case.members:
    return jax.grad(lambda params: loss(params, X, Y))(params)
  one = lambda params, x, y: loss(params, x[None], y[None])
  return jax.vmap(jax.grad(one), in_axes=(None, 0, 0))(params, X, Y)


def falls(case, losses):
  assert np.isfinite(losses).all()
  if "krum" in case.name:  # It follows one example, which may raise the mean loss.
    assert losses[-1] != losses[0]
  else:
    assert min(losses[1:]) < losses[0]


@pytest.fixture(autouse=True)
def _promotion_of_foreign_code():
  """Flax and Optax's own optimizers need Optax's and Flax's default promotion."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@each_chain
def test_plain_loop(case, tx):
  loss = lambda params, x, y: ((x @ params["w"] + params["b"] - y) ** 2).mean()
  params = {"w": jnp.zeros([3, 2]), "b": jnp.zeros([2])}
  state, losses = tx.init(params), []

  @jax.jit
  def step(params, state, extra):
    grads = gradients(case, loss, params)
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  for call in range(9):
    losses.append(float(loss(params, X, Y)))
    params, state = step(params, state, registry.extra_args(case, call))
  falls(case, losses)


@each_chain
def test_nnx_loop(case, tx):
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  losses = []

  @nnx.jit
  def step(model, optimizer, extra):
    graphdef, params = nnx.split(model, nnx.Param)
    loss = lambda params, x, y: ((nnx.merge(graphdef, params)(x) - y) ** 2).mean()
    optimizer.update(model, gradients(case, loss, params), **extra)
    return loss(params, X, Y)

  for call in range(9):
    losses.append(float(step(model, optimizer, registry.extra_args(case, call))))
  falls(case, losses)


@each_chain
def test_linen_loop(case, tx):
  model = linen.Dense(2)
  params = model.init(jax.random.key(0), X)
  loss = lambda params, x, y: ((model.apply(params, x) - y) ** 2).mean()
  state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
  losses = []

  @jax.jit
  def step(state, extra):
    grads = gradients(case, loss, state.params)
    # TrainState.apply_gradients drops extra args.
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, **extra)
    return state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
    )

  for call in range(9):
    losses.append(float(loss(state.params, X, Y)))
    state = step(state, registry.extra_args(case, call))
  falls(case, losses)


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
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  params = {"kernel": model.kernel[...] + 0, "bias": model.bias[...] + 0}
  train = train_state.TrainState.create(apply_fn=loss, params=params, tx=tx)
  module = _Module(**params)
  module_state = tx.init(eqx.filter(module, eqx.is_array))
  state = tx.init(params)
  for _ in range(8):
    updates, state = tx.update(jax.grad(loss)(params, X, Y), state, params)
    params = optax.apply_updates(params, updates)
    optimizer.update(model, nnx.grad(lambda model: ((model(X) - Y) ** 2).mean())(model))
    train = train.apply_gradients(grads=jax.grad(loss)(train.params, X, Y))
    grads = eqx.filter_grad(lambda module: loss(vars(module), X, Y))(module)
    updates, module_state = tx.update(
      grads, module_state, eqx.filter(module, eqx.is_array)
    )
    module = eqx.apply_updates(module, updates)
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
  params = {"w": jnp.zeros([3, 2]), "b": jnp.zeros([2])}
  grads = jax.tree.map(lambda p: jnp.ones([6, *p.shape]), params)
  updates, _ = tx.update(grads, tx.init(params), params, neighbors=registry.neighbors())
  jax.tree.map(
    lambda u: np.testing.assert_allclose(u, np.full(u.shape, -1e-3), rtol=1e-4),
    updates,
  )

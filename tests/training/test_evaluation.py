"""`eval_params`: the smoothed parameters of any state, or a sentence."""

import functools

import flax
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_ranger as ranger


def test_a_checkpoint_without_a_template_is_refused(tmp_path):
  params, state = trained("ema")
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "checkpoint", {"params": params, "state": state})
    saver.wait_until_finished()
    found = saver.restore(tmp_path / "checkpoint")
  with pytest.raises(ValueError, match="template"):
    ranger.eval_params(found["state"], found["params"])


SMOOTHED = {
  "ema": lambda: optax.chain(optax.sgd(1.0), ranger.smooth_by_ema(0.5)),
  "lookahead": lambda: optax.chain(optax.sgd(1.0), ranger.smooth_by_lookahead(4)),
  "recipe": lambda: ranger.ranger(0.1, acceleration=1.0, ema_decay=0.5),
}


@functools.cache
def trained(name, steps=3):
  tx = SMOOTHED[name]()

  @jax.jit
  def step(params, state):
    updates, state = tx.update({"w": -jnp.ones(2)}, state, params)
    return optax.apply_updates(params, updates), state

  params = {"w": np.zeros(2, np.float32)}
  state = tx.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  return params, state


@pytest.mark.parametrize("name", SMOOTHED)
def test_plain_containers_are_refused_in_a_sentence(name):
  params, state = trained(name)
  plain = flax.serialization.to_state_dict(state)
  bare = jax.tree.map(
    lambda leaf: leaf,
    flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(plain)),
  )
  for given in (plain, bare, [plain]):
    with pytest.raises(ValueError, match=r"jax.eval_shape\(optimizer.init, params\)"):
      ranger.eval_params(given, params)


@pytest.mark.parametrize("name", SMOOTHED)
def test_msgpack_into_a_template_works(name):
  params, state = trained(name)
  blob = flax.serialization.to_bytes(state)
  restored = flax.serialization.from_bytes(SMOOTHED[name]().init(params), blob)
  expected = ranger.eval_params(state, params)
  np.testing.assert_array_equal(
    ranger.eval_params(restored, params)["w"], expected["w"]
  )
  assert not np.array_equal(expected["w"], params["w"])


def test_states_without_smoothing_give_the_parameters():
  params = {"w": np.ones(2, np.float32)}
  for tx in (
    optax.adam(0.1),
    optax.named_chain(("a", optax.sgd(0.1, momentum=0.9)), ("b", optax.identity())),
    optax.partition({"x": optax.adam(0.1)}, {"w": "x"}),
    optax.identity(),
  ):
    assert ranger.eval_params(tx.init(params), params) is params


@pytest.mark.few(1)
@pytest.mark.parametrize("name", SMOOTHED)
def test_an_nnx_optimizer_and_its_model(name):
  """Two lines: the model to evaluate, and the one in training as it was."""
  model = nnx.Sequential(
    nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
  )
  optimizer = nnx.Optimizer(model, SMOOTHED[name](), wrt=nnx.Param)
  x = np.tile(np.arange(5, dtype=np.float32)[:, None], 3)
  loss = lambda model: (model(x) ** 2).mean() + model.layers[0](x).sum()

  @nnx.jit
  def step(model, optimizer):
    optimizer.update(model, nnx.grad(loss)(model))

  for _ in range(3):
    step(model, optimizer)
  # Copies: the variables themselves would change with the model.
  before = jax.tree.map(np.array, nnx.state(model))
  evaluated = ranger.eval_params(optimizer, model)
  assert isinstance(evaluated, nnx.Sequential)
  expected = ranger.eval_params(optimizer, nnx.state(model, nnx.Param))
  jax.tree.map(np.testing.assert_array_equal, nnx.state(evaluated, nnx.Param), expected)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
  kernel = lambda model: np.asarray(model.layers[0].kernel[...])
  assert not np.array_equal(kernel(evaluated), kernel(model))
  # Batch statistics are those in training; their arrays are its own.
  evaluated.layers[1].mean[...] = np.ones(4, np.float32)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)

"""Replayed updates: equal to the optimizer's own, undone where they are bad."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from optax_ranger._core import replay


def trees(seed):
  draw = np.random.default_rng(seed).standard_normal
  return {"w": draw([16, 8], np.float32), "b": draw([8], np.float32)}


INNER = {
  "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
  "nadam": lambda: optax.nadam(1e-2),
  "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
  "schedule": lambda: optax.adam(optax.cosine_decay_schedule(1e-2, 10)),
  "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
  "lion": lambda: optax.lion(1e-3),
  "muon": lambda: optax.contrib.muon(1e-2),
  "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
  "compiled": lambda: optax.GradientTransformation(
    optax.adamw(1e-2).init, jax.jit(optax.adamw(1e-2).update)
  ),
}


@pytest.mark.parametrize("name", INNER)
def test_a_replayed_update_is_the_optimizers_own(name):
  tx, params = INNER[name](), trees(0)
  state = tx.init(params)

  @jax.jit
  def run(gradients, state, good):
    nodes, new = replay.guarded(lambda s: tx.update(gradients, s, params), state, good)
    parts = {name: node.part(lambda leaf: leaf[2:5]) for name, node in nodes.items()}
    return jax.tree.map(lambda node: node.value, nodes, is_leaf=is_node), parts, new

  is_node = lambda node: isinstance(node, replay.Node)
  with jax.numpy_dtype_promotion("standard"):  # Optax's own arithmetic needs it.
    for seed in (1, 2):
      gradients = trees(seed)
      expected, advanced = jax.jit(tx.update)(gradients, state, params)
      found, parts, new = run(gradients, state, jnp.bool(True))
      close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
      jax.tree.map(close, (found, new), (expected, advanced))
      jax.tree.map(close, parts, jax.tree.map(lambda leaf: leaf[2:5], expected))
      _, _, same = run(jax.tree.map(lambda g: g * jnp.nan, gradients), state, False)
      jax.tree.map(np.testing.assert_array_equal, same, state)
      state = advanced


def test_a_state_that_is_constant_passed_through_or_shared():
  def update(state):
    total = state["a"] + 1
    return 2 * total, {"a": total, "b": total, "c": state["c"], "d": jnp.float32(7)}

  old = {name: jnp.float32(i) for i, name in enumerate("abcd")}
  node, new = replay.guarded(update, old, jnp.bool(True))
  assert node.value == 2
  assert new == {"a": 1, "b": 1, "c": 2, "d": 7}
  _, same = replay.guarded(update, old, jnp.bool(False))
  assert same == old


def test_what_follows_a_state_reads_what_is_stored():
  """The reason for all this: XLA needs no copy of the old state then."""

  def update(state):
    new = jnp.sqrt(state)
    return new + 1, new

  node, new = replay.guarded(update, jnp.float32(16), jnp.bool(False))
  assert new == 16
  assert node.value == 17


@pytest.mark.parametrize(
  ("function", "problem"),
  [
    (lambda state: (state, {"a": state["a"]}), "must return a state of"),
    (lambda state: (state, {**state, "b": jnp.ones([3])}), r"\(3,\).*\(2,\).*'b'"),
    (lambda state: (state, {**state, "b": jnp.ones([2], "int32")}), "int32.*float32"),
  ],
)
def test_a_state_that_changes_its_form_is_refused(function, problem):
  old = {"a": jnp.ones([2]), "b": jnp.ones([2])}
  with pytest.raises(TypeError, match=problem):
    replay.guarded(function, old, jnp.bool(True))


@pytest.mark.parametrize("split", ["state", "gradients"])
def test_state_and_gradients_that_are_split_unlike(split):
  """On an explicit mesh; the state keeps its sharding, good or bad."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
  split_over = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
  whole = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
  put_state, put = (split_over, whole) if split == "state" else (whole, split_over)
  tx = optax.sgd(0.1, momentum=0.9)
  gradients, old = put(jnp.ones([8, 4])), put_state(2 * jnp.ones([8, 4]))

  @jax.jit
  def run(gradients, old, good):
    state = optax.tree.set(tx.init(gradients), trace=old)
    node, new = replay.guarded(lambda s: tx.update(gradients, s), state, good)
    return node.value, optax.tree.get(new, "trace")

  update, new = run(gradients, old, True)
  np.testing.assert_allclose(update, -0.28, rtol=1e-6)
  np.testing.assert_allclose(new, 2.8, rtol=1e-6)
  assert jax.typeof(new) == jax.typeof(old)
  _, same = run(gradients, old, False)
  np.testing.assert_array_equal(same, old)

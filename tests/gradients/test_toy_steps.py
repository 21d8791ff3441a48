"""A step of somebody else takes the place of each kind of ours, everywhere."""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_ranger as ranger
from tests.helpers import close

N, D, ITEMS = 24, 5, 40
_RNG = np.random.default_rng(0)
X = _RNG.standard_normal([N, D]).astype(np.float32)
Y = _RNG.standard_normal([N]).astype(np.float32)
IDS = _RNG.permutation(ITEMS)[:N].astype(np.int32)
TRUST = _RNG.uniform(0, 1, N).astype(np.float32)
WAYS = {
  "one device": {},
  "micro-batches": {"num_micro_batches": 3},
  "mesh": {"mesh": 8},
  "mesh, micro-batches": {"mesh": 8, "num_micro_batches": 3},
  "explicit mesh": {"mesh": 8, "kind": AxisType.Explicit},
  "compiler": {"mesh": 8, "partition": "jit"},
  "split state": {"mesh": 8, "shard_state": True},
}
each_way = pytest.mark.parametrize("way", WAYS)


class Empty(NamedTuple):
  """Nothing to keep."""


def trusting():
  """A per-example step: it multiplies every gradient by an array of its own."""

  def update(updates, state, params=None, *, trust, **extra_args):
    del params, extra_args
    weigh = lambda leaf: leaf * jnp.expand_dims(trust, tuple(range(1, leaf.ndim)))
    return jax.tree.map(weigh, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: Empty(), update)


def summing_half():
  """An aggregator: half of the sum over those that are not left out."""

  def update(updates, state, params=None, *, member_weights=None, **extra_args):
    del params, extra_args
    n = jax.tree.leaves(updates)[0].shape[0]
    weights = jnp.ones([n]) if member_weights is None else member_weights
    half = lambda leaf: 0.5 * jnp.tensordot(weights.astype(leaf.dtype), leaf, axes=1)
    return jax.tree.map(half, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: Empty(), update)


class CountingState(NamedTuple):
  visits: Any

  split_by_rows = ("visits",)
  gathered = ("hits",)

  def readers(self):
    return {"visits": lambda ids: _read(self.visits, ids)}


def _first_row(table):
  kind = getattr(jax.typeof(table), "manual_axis_type", None)
  axes = tuple(kind.varying) if kind is not None else ()
  return axes, (jax.lax.axis_index(axes) * table.shape[0] if axes else 0)


def _read(table, ids):
  axes, first = _first_row(table)
  places = jnp.where(ids >= first, ids - first, table.shape[0])
  rows = table.at[places].get(mode="fill", fill_value=0)
  return jax.lax.psum(rows, axes) if axes else rows


def counting():
  """A step with state that is split by rows: how much of an item each example had."""

  def update(updates, state, params=None, *, hits, example_ids, **extra_args):
    del params, extra_args
    _, first = _first_row(state.visits)
    size = state.visits.shape[0]
    places = jnp.where(example_ids >= first, example_ids - first, size)
    return updates, CountingState(state.visits.at[places].add(hits, mode="drop"))

  init = lambda params: CountingState(jnp.zeros([ITEMS]))
  return optax.GradientTransformationExtraArgs(init, update)


class WindowState(NamedTuple):
  total: Any
  count: Any
  inner: Any

  open_window = "total"
  inside = "inner"


def every_other(inner):
  """A step with an open window: the sum of two gradients in every second call."""
  inner = optax.with_extra_args_support(inner)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return WindowState(zeros, jnp.zeros([], jnp.int32), inner.init(params))

  def update(updates, state, params=None, **extra_args):
    total = jax.tree.map(jnp.add, state.total, updates)
    apart = any(
      jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(total)
    )

    def emit():
      whole = jax.lax.psum(total, "data") if apart else total
      return inner.update(whole, state.inner, params, **extra_args)

    zeros = jax.tree.map(jnp.zeros_like, params)
    emits = state.count == 1
    result, inside = jax.lax.cond(emits, emit, lambda: (zeros, state.inner))
    keep = lambda leaf: jnp.where(emits, jnp.zeros_like(leaf), leaf)
    return result, WindowState(jax.tree.map(keep, total), 1 - state.count, inside)

  return optax.GradientTransformationExtraArgs(init, update)


class HalfState(NamedTuple):
  copy: Any

  def smoothed_copy(self):
    return jnp.float32(0), self.copy


def halved():
  """A step with a smoothed copy: half of the parameters."""

  def update(updates, state, params=None, **extra_args):
    del state, extra_args
    return updates, HalfState(jax.tree.map(lambda leaf: leaf / 2, params))

  init = lambda params: HalfState(jax.tree.map(jnp.copy, params))
  return optax.GradientTransformationExtraArgs(init, update)


def params():
  return {"w": np.linspace(-1, 1, D, dtype=np.float32), "b": np.float32(0)}


def losses(params, batch):
  return (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2


def losses_and_hits(params, batch, visits):
  values = losses(params, batch)
  return values * (1 + visits), {"hits": jnp.ones_like(values)}


def head():
  return optax.named_chain(("trust", trusting()), ("half", summing_half()))


@functools.cache
def updater(way, optimizer, loss, **options):
  options = {**WAYS[way], **options}
  devices, kind = options.pop("mesh", 0), options.pop("kind", AxisType.Auto)
  if devices:
    options["mesh"] = jax.make_mesh((devices,), ("data",), axis_types=(kind,))
  return ranger.train_step(loss, optimizer, step=head(), row_args=("trust",), **options)


def train(way, optimizer, steps=4, loss=losses, **options):
  update, here = updater(way, optimizer, loss, **options), params()
  state = update.init(here)
  for _ in range(steps):
    here, state, _ = update(here, state, {"x": X, "y": Y}, trust=TRUST, example_ids=IDS)
  return here, state


@jax.jit
@jax.grad
def gradient(here, factor):
  """Of half of the losses' sum, each as often as it is trusted, times a factor."""
  return 0.5 * (TRUST * factor * losses(here, {"x": X, "y": Y})).sum()


def by_hand(optimizer, steps=4):
  """Per example, in NumPy where it matters."""
  here, state = params(), optimizer.init(params())
  visits = np.zeros(N, np.float32)
  for _ in range(steps):
    grads = gradient(here, 1 + visits)
    updates, state = optimizer.update(grads, state, here)
    here = optax.apply_updates(here, updates)
    visits = visits + 1
  return here, visits


def test_fusion():
  weigh = lambda trust: ranger.example_weights(head(), N, trust=trust)
  np.testing.assert_allclose(jax.jit(weigh)(TRUST), TRUST / 2, rtol=1e-6)
  grad_fn = ranger.value_and_grad(losses, head(), row_args=("trust",))
  _, grads = jax.jit(grad_fn)(params(), {"x": X, "y": Y}, trust=TRUST)
  rows = jax.vmap(jax.grad(lambda p, x, y: losses(p, {"x": x, "y": y})), (None, 0, 0))
  rows = jax.jit(rows)(params(), X, Y)
  expected, _ = jax.jit(head().update)(rows, head().init({}), trust=TRUST)
  close(grads, expected)


def plain_losses(params, batch):
  return losses(params, batch)


@each_way
def test_steps_over_examples(way):
  found, _ = train(way, optax.sgd(0.01), loss=plain_losses)
  here, state = params(), optax.sgd(0.01).init(params())
  for _ in range(4):
    updates, state = optax.sgd(0.01).update(gradient(here, np.float32(1)), state, here)
    here = optax.apply_updates(here, updates)
  close(found, here)


@each_way
def test_state_by_rows(way):
  optimizer = optax.chain(counting(), optax.sgd(0.01))
  found, state = train(way, optimizer, loss=losses_and_hits, has_aux=True)
  expected, visits = by_hand(optax.sgd(0.01))
  close(found, expected)
  table = state.optimizer[0].visits
  np.testing.assert_array_equal(np.asarray(table)[IDS], visits)
  assert float(table.sum()) == visits.sum()
  if "mesh" in WAYS[way]:
    assert table.addressable_shards[0].data.shape == (ITEMS // 8,)


@pytest.mark.parametrize("way", [*WAYS, "on emission"])
def test_open_window(way):
  options = {} if way != "on emission" else {"reduce": "on_emission"}
  way = "mesh" if way == "on emission" else way
  found, state = train(way, every_other(optax.sgd(0.01)), steps=5, **options)
  here, one = params(), np.float32(1)
  for _ in range(2):
    here = jax.tree.map(
      lambda p, g: p - 0.02 * np.asarray(g), here, gradient(here, one)
    )
  close(found, here)
  left = np.asarray(state.optimizer.total["w"])
  close(left.sum(axis=0) if options else left, gradient(here, one)["w"])
  if options:
    assert left.shape == (8, D)


@each_way
def test_smoothed_copy(way):
  tx = optax.chain(optax.sgd(0.01), halved())
  found, state = train(way, tx)
  before, _ = train(way, tx, steps=3)
  close(
    ranger.eval_params(state, found), jax.tree.map(lambda p: np.asarray(p) / 2, before)
  )


def test_checkpoints(tmp_path):
  tx = optax.chain(counting(), every_other(optax.chain(optax.sgd(0.01), halved())))
  options = {"loss": losses_and_hits, "has_aux": True}
  found, state = train("one device", tx, steps=3, **options)
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "state", state)
    saver.wait_until_finished()
    restored = saver.restore(tmp_path / "state", jax.eval_shape(lambda: state))
  close(restored, state)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  close(ranger.eval_params(restored, found), ranger.eval_params(state, found))

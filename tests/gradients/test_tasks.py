"""Losses of tasks: the step over their gradients, in every form."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from tests.helpers import close

STEPS = {
  "mean": ranger.aggregate_by_mean(),
  "upgrad": ranger.aggregate_by_upgrad(),
  "mgda": ranger.aggregate_by_mgda(),
  "median": ranger.aggregate_by_median(),
  "clipped": optax.chain(ranger.clip_examples(1.0), ranger.aggregate_by_sum()),
}


def tasks(params, batch, scale=1.0):
  """Two on rows of different numbers, one on no rows."""
  hidden = jnp.tanh(batch["inside"] @ params["w"])
  return scale * jnp.stack(
    [
      ((hidden @ params["v"] - 1) ** 2).mean(),
      30 * jnp.abs(batch["border"] @ params["w"]).mean(),
      (params["v"] ** 2).sum(),
    ]
  )


gradients = jax.jit(jax.jacrev(tasks))
losses_of = jax.jit(tasks)


def problem():
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  params = {"w": normal(5, 7), "v": normal(7)}
  return params, {"inside": normal(16, 5), "border": normal(7, 5)}


@pytest.mark.parametrize("num_sweeps", [1, 3])
@pytest.mark.parametrize("name", sorted(STEPS))
def test_the_step_is_over_the_gradients_of_tasks(name, num_sweeps):
  params, batch = problem()
  step, weights = STEPS[name], np.array([1.0, 2.0, 1.0], np.float32)
  rows = gradients(params, batch)
  state = step.init(params)
  expected, _ = jax.jit(step.update)(rows, state, member_weights=weights)
  grad_fn = ranger.value_and_grad(tasks, step, over="tasks", num_sweeps=num_sweeps)
  losses, found = jax.jit(grad_fn)(params, batch, member_weights=weights)
  close(losses, losses_of(params, batch))
  close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "in a loop"])
def test_losses_without_a_forward_mode(form):
  """Their gradients are held instead."""

  @jax.custom_vjp
  def tripled(params):
    return params

  tripled.defvjp(lambda params: (params, None), lambda _, g: (3 * g,))
  params, batch = problem()

  def losses(params, batch):
    if form == "plain":
      return tasks(jax.tree.map(tripled, params), batch)
    again = lambda tree, _: (jax.tree.map(tripled, tree), None)
    return tasks(jax.lax.scan(again, params, length=2)[0], batch)

  step = STEPS["upgrad"]
  rows = jax.jit(jax.jacrev(losses))(params, batch)
  expected, _ = jax.jit(step.update)(rows, step.init(params))
  _, found = jax.jit(ranger.value_and_grad(losses, step, over="tasks"))(params, batch)
  close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("scale", [1e-33, 1e34])
def test_gradients_whose_squares_overflow_or_vanish(scale):
  params, batch = problem()
  step, by = STEPS["mgda"], np.array([scale, 3.0, scale], np.float32)
  losses = lambda params, batch: by * tasks(params, batch)
  rows = jax.jit(jax.jacrev(losses))(params, batch)
  expected, _ = jax.jit(step.update)(rows, step.init(params))
  _, found = jax.jit(ranger.value_and_grad(losses, step, over="tasks"))(params, batch)
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
  close(found, expected, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.few(1)
@pytest.mark.parametrize(
  ("dtype", "room"), [(jnp.complex64, 1e-5), (jnp.float16, 1e-2), (jnp.bfloat16, 5e-2)]
)
def test_other_types(dtype, room):
  rng = np.random.default_rng(1)
  draws = rng.standard_normal([2, 3, 6]) * np.array([1.0, 30.0, 0.1])[:, None]
  is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
  rows = (draws[0] + 1j * draws[1] if is_complex else draws[0]).astype(dtype)
  losses = lambda params, _: jnp.real(rows.conj() @ params)
  step, params = STEPS["upgrad"], np.ones(6, dtype)
  expected, _ = jax.jit(step.update)(rows.conj(), step.init(params))
  _, found = jax.jit(ranger.value_and_grad(losses, step, over="tasks"))(params, None)
  assert found.dtype == dtype
  close(found, expected, rtol=room, atol=room * 30)


def test_no_gradient_is_held_beside_another():
  """The matrix of inner products comes without them."""
  params, n = {"w": np.ones([512, 512], np.float32)}, 16
  losses = lambda params, batch: jnp.tanh(batch @ params["w"]).sum(axis=1)
  batch = np.eye(n, 512, dtype=np.float32)
  grad_fn = ranger.value_and_grad(losses, STEPS["upgrad"], over="tasks")
  compiled = jax.jit(grad_fn).lower(params, batch).compile()
  one = params["w"].nbytes
  assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * one


def test_auxiliary_output_and_extra_args():
  params, batch = problem()
  both = lambda params, batch, scale: (tasks(params, batch, scale), {"any": batch})
  grad_fn = ranger.value_and_grad(both, STEPS["mean"], over="tasks", has_aux=True)
  (losses, aux), found = jax.jit(grad_fn)(params, batch, scale=2.0)
  close(aux, {"any": batch})
  close(losses, 2 * np.asarray(losses_of(params, batch)))
  expected = jax.tree.map(
    lambda rows: 2 * np.mean(rows, axis=0), gradients(params, batch)
  )
  close(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["mean", "upgrad", "median"])
def test_a_task_without_a_number_is_left_out(name):
  """Its own parameters get no gradient; the others' is that without it."""
  params = {"a": np.float32(2), "b": np.float32(0)}
  losses = lambda p, _: jnp.stack([p["a"] ** 2, jnp.log(p["b"] - 1), 3 * p["a"]])
  grad_fn = jax.jit(ranger.value_and_grad(losses, STEPS[name], over="tasks"))
  _, found, state = grad_fn(params, None, state=STEPS[name].init(params))
  assert float(found["a"]) == pytest.approx(3.5, rel=1e-4)
  assert float(found["b"]) == 0
  assert int(state.num_dropped) == 1


@pytest.mark.parametrize("name", ["mean", "upgrad", "median"])
def test_a_gradient_that_tasks_share_is_never_nan(name):
  params = np.array([1, 2], np.float32)

  def losses(p, _):
    shared = jnp.sqrt(p - 1)  # of zero, whose slope is infinite
    return jnp.stack([shared.sum(), (shared**2).sum(), 3 * shared[0]])

  step = STEPS[name]
  update = ranger.train_step(
    losses, optax.sgd(0.1), step=step, over="tasks", donate=False
  )
  moved, state, metrics = update(params, update.init(params), {})
  close(moved, params)
  assert int(metrics["weight"]) == 0
  assert int(state.step.num_dropped) == 3


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["upgrad", "mean"])
def test_train_step_over_tasks_on_a_mesh(name, kind):
  params, batch = problem()
  step = None if name == "mean" else STEPS[name]
  mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
  weights = np.array([1.0, 2.0, 1.0], np.float32)
  expected, _ = jax.jit(STEPS[name].update)(
    gradients(params, batch), STEPS[name].init(params), member_weights=weights
  )
  expected = jax.tree.map(lambda p, g: p - 0.1 * np.asarray(g), params, expected)
  losses = np.asarray(losses_of(params, batch))
  for options in ({}, {"mesh": mesh, "partition": "jit"}):
    update = ranger.train_step(
      tasks, optax.sgd(0.1), step=step, over="tasks", donate=False, **options
    )
    moved, _, metrics = update(
      params, update.init(params), batch, member_weights=weights
    )
    close(moved, expected, atol=1e-5)
    close(metrics["losses"], losses)
    close(metrics["loss"], (weights * losses).sum() / 4)


def test_without_a_step_it_is_the_mean():
  """Weighted; aux and the losses are metrics."""
  params, batch = problem()
  both = lambda params, batch: (tasks(params, batch), {"any": params["v"]})
  update = ranger.train_step(both, optax.sgd(0.1), over="tasks", has_aux=True)
  weights = np.array([1.0, 2.0, 1.0], np.float32)
  expected = jax.tree.map(
    lambda p, rows: p - 0.1 * np.tensordot(weights, rows, axes=1) / 4,
    params,
    gradients(params, batch),
  )
  moved, _, metrics = update(params, update.init(params), batch, member_weights=weights)
  close(moved, expected, atol=1e-5)
  losses = np.asarray(losses_of(params, batch))
  found = {"loss": weights @ losses / 4, "losses": losses, "any": params["v"]}
  close({name: metrics[name] for name in found}, found)
  assert (metrics["weight"], metrics["num_dropped"]) == (4, 0)


@pytest.mark.parametrize("item", ["loss", "losses"])
def test_items_of_aux_must_not_be_named_like_metrics_of_tasks(item):
  params, batch = problem()
  both = lambda params, batch: (tasks(params, batch), {item: params["v"]})
  update = ranger.train_step(both, optax.sgd(0.1), over="tasks", has_aux=True)
  with pytest.raises(ValueError, match=f"aux must not have an item named '{item}'"):
    update(params, update.init(params), batch)


def test_a_leaf_of_the_batch_is_split_where_devices_divide_its_rows():
  params, batch = problem()
  mesh = jax.make_mesh((8,), ("data",))
  update = ranger.train_step(
    tasks, optax.sgd(0.1), over="tasks", mesh=mesh, partition="jit"
  )
  _, _, given = update._prepare(params, update.init(params), batch, {})
  split = NamedSharding(mesh, PartitionSpec("data"))
  assert given.batch["inside"].sharding.is_equivalent_to(split, 2)
  assert given.batch["border"].sharding.is_fully_replicated


def test_no_task_gets_worse_where_the_mean_makes_one_worse():
  """Two with opposite gradients, of which one is a thousand times the other."""
  target = np.array([[1, 0.5], [-1, 0.5], [0, 0.5]], np.float32)
  scale = np.array([1, 1000, 1], np.float32)
  losses = lambda w, _: scale * ((w[None] - target) ** 2).sum(axis=1)
  start = np.array([0, 0.8], np.float32)
  rows = 2 * scale[:, None] * (start - target)
  for name, fair in (("mean", False), ("upgrad", True), ("mgda", True)):
    grad_fn = ranger.value_and_grad(losses, STEPS[name], over="tasks")
    _, gradient = jax.jit(grad_fn)(start, None)
    slopes = rows @ np.asarray(gradient) / np.linalg.norm(rows, axis=1)
    assert (slopes > -1e-4 * np.linalg.norm(gradient)).all() == fair

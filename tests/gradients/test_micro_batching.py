"""Micro-batches in one compiled step: exact, guarded, and reduced once."""

import functools
import re

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

PARAMS = {"w": np.random.default_rng(0).standard_normal([4]).astype(np.float32)}


def draw(n, seed=1):
  rng = np.random.default_rng(seed)
  return {
    "x": rng.standard_normal([n, 4]).astype(np.float32),
    "y": rng.standard_normal([n]).astype(np.float32),
    "tokens": rng.integers(1, 9, n).astype(np.float32),
  }


def spoiled(batch, row, value=np.nan):
  x = batch["x"].copy()
  x[row, 0] = value
  return {**batch, "x": x}


def losses(params, batch):
  return (batch["x"] @ params["w"] - batch["y"]) ** 2


def mean_loss(params, batch):
  return losses(params, batch).mean()


mean_grad = jax.jit(jax.value_and_grad(mean_loss))


def token_loss(params, batch):
  weighted = batch["tokens"] * losses(params, batch)
  return weighted.sum() / batch["tokens"].sum(), {"losses": weighted}


@pytest.mark.guarantees(
  "micro_batched", "The result is the gradient of the whole batch, for any"
)
@pytest.mark.parametrize("n", [1, 7, 8, 10])
@pytest.mark.parametrize("num_micro_batches", [1, 3, 4, 16])
def test_micro_batches_are_the_whole_batch(n, num_micro_batches):
  batch = draw(n)
  function = jax.jit(ranger.micro_batched(mean_grad, num_micro_batches))
  value, grads, report = function(PARAMS, batch)
  close((value, grads), mean_grad(PARAMS, batch))
  assert float(report.weight) == n
  assert int(report.num_left_out) == 0


def test_weights_are_exact_and_rows_come_back():
  batch = draw(10)
  grad_fn = jax.jit(jax.value_and_grad(token_loss, has_aux=True))
  function = ranger.micro_batched(
    grad_fn, 4, weigh=lambda part: part["tokens"].sum(), value_axes=(None, 0)
  )
  value, grads, report = jax.jit(function)(PARAMS, batch)
  close((value, grads), grad_fn(PARAMS, batch))
  assert float(report.weight) == float(batch["tokens"].sum())


def test_fused_steps_run_in_micro_batches():
  batch = draw(10)
  grad_fn = jax.jit(ranger.value_and_grad(losses, ranger.aggregate_by_mean()))
  value, grads, _ = jax.jit(ranger.micro_batched(grad_fn, 3))(PARAMS, batch)
  close((value, grads), grad_fn(PARAMS, batch))


def test_only_losses_of_examples_come_back_as_rows():
  """Of tasks they are averaged, and so is what comes with the losses."""
  batch, step = draw(10), ranger.aggregate_by_mean()
  both = lambda params, batch: (
    losses(params, batch),
    {"mean": batch["x"].mean(axis=0)},
  )
  grad_fn = ranger.value_and_grad(both, step, has_aux=True)
  (value, aux), _, _ = jax.jit(ranger.micro_batched(grad_fn, 5))(PARAMS, batch)
  close(value, (batch["x"] @ PARAMS["w"] - batch["y"]) ** 2)
  close(aux["mean"], batch["x"].mean(axis=0))
  own = lambda params, batch: jnp.stack([mean_loss(params, batch), params["w"].sum()])
  grad_fn = ranger.value_and_grad(own, step, over="tasks")
  value, _, _ = jax.jit(ranger.micro_batched(grad_fn, 5))(PARAMS, batch)
  close(value, jax.jit(own)(PARAMS, batch))


def test_value_axes_are_checked():
  grad_fn = jax.value_and_grad(token_loss, has_aux=True)
  for axes, problem in (
    ((None, 1), "value_axes must hold 0 or None, got 1"),
    ((0, None), r"value\[0\] must have one row for each of the 5 .* got \[\]"),
  ):
    with pytest.raises(ValueError, match=problem):
      ranger.micro_batched(grad_fn, 2, value_axes=axes)(PARAMS, draw(10))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [1, 9])
def test_left_out_is_weight_zero_here_too(bad, place):
  batch = draw(10)
  function = jax.jit(ranger.micro_batched(mean_grad, 4))
  keep = np.array([i // 3 != place // 3 for i in range(10)])
  expected = mean_grad(PARAMS, jax.tree.map(lambda leaf: leaf[keep], batch))
  value, grads, report = function(PARAMS, spoiled(batch, place, bad))
  close((value, grads), expected)
  assert int(report.num_left_out) == 1
  assert float(report.weight) == keep.sum()


def test_bfloat16_sums_in_float32():
  grad_fn = jax.value_and_grad(lambda w, batch: (w * batch).mean())
  batch = np.full([1024], 0.01, jnp.bfloat16)
  batch[0] = 2
  function = ranger.micro_batched(grad_fn, 1024)
  value, grads, _ = jax.jit(function)(jnp.bfloat16(1), batch)
  assert value.dtype == grads.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(grads), (2 + 1023 * 0.01001) / 1024, rtol=5e-3)


@functools.cache
def sharded(num_micro_batches, tx=None):
  """A step over eight devices, each with its part of the batch."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  grad_fn = ranger.micro_batched(
    jax.value_and_grad(mean_loss), num_micro_batches, axis_name="data"
  )

  def step(params, state, batch):
    value, grads, report = grad_fn(params, batch)
    if tx is None:
      return value, grads, report
    updates, state = tx.update(grads, state, params, weight=report.weight)
    return optax.apply_updates(params, updates), state, report

  whole, split = PartitionSpec(), PartitionSpec("data")
  function = jax.shard_map(
    step, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole
  )
  place = lambda batch: jax.device_put(batch, NamedSharding(mesh, split))
  return jax.jit(function), place


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_varying_gradients_are_reduced_at_the_end(num_micro_batches):
  batch = draw(64)
  function, place = sharded(num_micro_batches)
  value, grads, report = function(PARAMS, (), place(batch))
  close((value, grads), mean_grad(PARAMS, batch))
  assert float(report.weight) == 64


@pytest.mark.guarantees("micro_batched", "One reduction across devices")
def test_one_all_reduce_for_any_number():
  counts = []
  for num_micro_batches in (1, 4, 8):
    function, place = sharded(num_micro_batches)
    text = function.lower(PARAMS, (), place(draw(64))).compile().as_text()
    results = re.findall(r" = (.*?) all-reduce(?:-start)?\(", text)
    assert len([types for types in results if "f32[4]" in types]) == 1
    # In the entry computation: not in the body of the loop.
    assert re.search(r" all-reduce(?:-start)?\(", text.split("\nENTRY ")[1])
    counts.append(len(results))
  assert len(set(counts)) == 1


@pytest.mark.guarantees(
  "micro_batched", "A non-finite micro-batch has weight zero, on its own"
)
def test_left_out_on_one_device():
  """The device with a NaN leaves its micro-batch out; all keep the same bits."""
  tx = ranger.accumulate(optax.sgd(0.1, momentum=0.9), 2)
  batch = draw(64)
  broken = spoiled(batch, 8 * 3 + 1)
  function, place = sharded(4, tx)
  params, state = PARAMS, tx.init(PARAMS)
  for part in (broken, batch):
    params, state, report = function(params, state, place(part))
    assert int(report.num_left_out) == (part is broken)
  for leaf in jax.tree.leaves((params, state)):
    copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(copies) == 8
    for copy in copies[1:]:
      np.testing.assert_array_equal(copy, copies[0])
  # Device 3 holds rows 24 to 31; its first micro-batch is rows 24 and 25.
  keep = np.array([i not in (24, 25) for i in range(64)])
  both = jax.tree.map(lambda leaf: np.concatenate([leaf[keep], leaf]), batch)
  _, expected = mean_grad(PARAMS, both)
  close(params["w"], PARAMS["w"] - 0.1 * np.asarray(expected["w"]))


@pytest.mark.parametrize(
  ("name", "tx"),
  [
    ("accumulate", ranger.accumulate(optax.sgd(0.1), 2)),
    ("skip_anomalies", ranger.skip_anomalies(optax.sgd(0.1))),
    ("skip_nonfinite", ranger.skip_nonfinite(optax.sgd(0.1))),
    ("scale_by_ngs", ranger.scale_by_ngs()),
    ("accelerate", ranger.accelerate(optax.sgd(0.1))),
    ("mask_contradictions", ranger.mask_contradictions(optax.sgd(0.1))),
    ("ranger_radam", ranger.ranger_radam(0.1)),
  ],
)
def test_varying_gradients_are_refused_by_name(name, tx):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

  def step(params, batch):
    vary = lambda leaf: jax.lax.pcast(leaf, "data", to="varying")
    grads = jax.grad(mean_loss)(jax.tree.map(vary, params), batch)
    return tx.update(grads, tx.init(params), params)[0]

  whole, split = PartitionSpec(), PartitionSpec("data")
  function = jax.shard_map(step, mesh=mesh, in_specs=(whole, split), out_specs=split)
  batch = jax.device_put(draw(64), NamedSharding(mesh, split))
  message = rf"updates\['w'\] differs over the mesh axis 'data', and {name}"
  with pytest.raises(ValueError, match=message):
    jax.jit(function)(PARAMS, batch)


@pytest.mark.parametrize(
  "tx",
  [ranger.skip_anomalies(optax.sgd(0.1)), ranger.scale_by_ngs(), ranger.ranger(0.1)],
  ids=["skip_anomalies", "scale_by_ngs", "ranger"],
)
def test_steps_run_on_reduced_gradients_under_shard_map(tx):
  batch = draw(64)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  grad_fn = ranger.micro_batched(jax.value_and_grad(mean_loss), 2, axis_name="data")

  def step(params, state, batch):
    _, grads, _ = grad_fn(params, batch)
    return tx.update(grads, state, params)

  whole, split = PartitionSpec(), PartitionSpec("data")
  function = jax.shard_map(
    step, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole
  )
  place = jax.device_put(batch, NamedSharding(mesh, split))
  updates, _ = jax.jit(function)(PARAMS, tx.init(PARAMS), place)
  _, grads = mean_grad(PARAMS, batch)
  close(updates, jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)[0])


@pytest.mark.parametrize("rule", ["linear", "square_root"])
def test_large_step(rule):
  factor = {"linear": 4, "square_root": 2}[rule]
  assert ranger.large_step(0.1, 4, rule=rule) == pytest.approx(0.1 * factor)
  schedule = ranger.large_step(lambda count: 0.1 * (count + 1), 4, rule=rule)
  assert schedule(2) == pytest.approx(0.3 * factor)


def test_a_scalar_that_is_not_finite_leaves_its_micro_batch_out():
  def function(params, batch):
    value, grads = jax.value_and_grad(mean_loss)(params, batch)
    return {"loss": value, "metric": batch["metric"].mean()}, grads

  metric = np.where(np.arange(8) == 5, np.float32(np.nan), np.float32(1))
  batch = {**draw(8), "metric": metric}
  value, grads, report = jax.jit(ranger.micro_batched(function, 4))(PARAMS, batch)
  keep = np.array([i not in (4, 5) for i in range(8)])
  _, expected = mean_grad(PARAMS, jax.tree.map(lambda x: x[keep], batch))
  close(grads, expected)
  assert float(value["metric"]) == 1
  assert int(report.num_left_out) == 1


@pytest.mark.parametrize("num_micro_batches", [3, 4, 8])
def test_a_statistic_of_features_is_not_taken_for_rows(num_micro_batches):
  def loss(w, batch):
    return ((batch @ w) ** 2).mean(), {"mean": batch.mean(axis=0)}

  batch = np.random.default_rng(0).standard_normal([32, 4]).astype(np.float32)
  grad_fn = jax.value_and_grad(loss, has_aux=True)
  function = jax.jit(ranger.micro_batched(grad_fn, num_micro_batches))
  (_, aux), _, _ = function(np.ones(4, np.float32), batch)
  assert aux["mean"].shape == (4,)
  np.testing.assert_allclose(aux["mean"], batch.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_counts_are_added_up_whatever_the_weights():
  """Integers of a value are counts; booleans become a share."""

  def value_and_grad(params, batch):
    value = {"positive": (batch > 0).sum(dtype=jnp.int32), "first": batch[0] > 0}
    return value, params

  function = ranger.micro_batched(
    value_and_grad, 2, weigh=lambda batch: batch.sum() + 9
  )
  batch = np.array([1, 2, -1, 3], np.float32)
  value, _, _ = jax.jit(function)(np.ones(2, np.float32), batch)
  assert value["positive"] == 3
  assert value["first"] == pytest.approx(12 / 23)


def test_a_micro_batch_of_weight_zero_is_not_left_out():
  mean_loss = lambda w, batch: (w * batch).mean()
  grad_fn = ranger.micro_batched(
    jax.value_and_grad(mean_loss), 2, weigh=lambda batch: (batch > 0).sum()
  )
  batch = np.array([1, 3, -1, -1], np.float32)
  _, grad, report = jax.jit(grad_fn)(np.float32(2), batch)
  assert float(grad) == 2
  assert int(report.num_left_out) == 0


def test_a_weight_that_is_none_leaves_its_micro_batch_out():
  mean_loss = lambda w, batch: (w * batch["x"]).mean()
  grad_fn = ranger.micro_batched(
    jax.value_and_grad(mean_loss), 2, weigh=lambda part: part["weight"].sum()
  )
  x = np.array([1.0, 3.0, 5.0, 5.0], np.float32)
  for bad in (-1, np.nan, np.inf):
    weight = np.array([1, 1, bad, 0], np.float32)
    value, grad, report = jax.jit(grad_fn)(np.float32(3), {"x": x, "weight": weight})
    assert float(value) == 6
    assert float(grad) == 2
    assert float(report.weight) == 2
    assert int(report.num_left_out) == 1

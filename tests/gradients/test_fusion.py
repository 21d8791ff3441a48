"""Fusion: the same gradient as the per-example form, or a refusal."""

import chex
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
from tests.laws import registry

N = 6
PARAMS = {
  "w": np.random.default_rng(0).standard_normal([4, 3]).astype(np.float32),
  "b": np.zeros(3, np.float32),
}
BATCH = {
  "x": np.random.default_rng(1).standard_normal([N, 4]).astype(np.float32),
  "y": np.random.default_rng(2).integers(0, 3, N).astype(np.int32),
}
LINEAR = {
  "mean": ranger.aggregate_by_mean(),
  "sum": ranger.aggregate_by_sum(),
  "regions": ranger.aggregate_by_regions(3),
  "regions-sum": ranger.aggregate_by_regions(3, within="sum"),
  "head": ranger.ranger_head(),
  "neighbors-regions": optax.chain(
    ranger.average_neighbors(include_self=False), ranger.aggregate_by_regions(3)
  ),
  "scaled": optax.chain(ranger.aggregate_by_mean(), optax.scale(-0.1)),
}
NON_LINEAR = {
  "max": ranger.aggregate_by_max(),
  "regions-max": ranger.aggregate_by_regions(3, within="max"),
  "neighbors-max": optax.chain(ranger.average_neighbors(), ranger.aggregate_by_max()),
  "clipped": optax.chain(ranger.aggregate_by_mean(), optax.clip(0.01)),
}
EXTRA = {
  "neighbors": registry.neighbors(),
  "regions": np.array([0, 0, 1, 2, 2, 2], np.int32),
  "member_weights": np.array([1.0, 2.0, 0.0, 1.0, 1.0, 3.0], np.float32),
}


def losses(params, batch):
  logits = jnp.tanh(batch["x"] @ params["w"]) + params["b"][None]
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def with_bad_row(batch, row):
  x = batch["x"].copy()
  x[row] = np.nan
  return {**batch, "x": x}


@jax.jit
def per_example(params, batch):
  one = lambda params, row: losses(params, jax.tree.map(lambda x: x[None], row))[0]
  return jax.vmap(jax.grad(one), in_axes=(None, 0))(params, batch)


@pytest.mark.guarantees(
  "example_weights", "The weighted loss has the gradient of the per-example"
)
@pytest.mark.guarantees(
  "value_and_grad", "The gradient is that of the step on per-example gradients"
)
@pytest.mark.few(3)
@pytest.mark.parametrize(
  ("name", "jit"),
  [
    pytest.param("head", False, marks=pytest.mark.slow),
    *((name, True) for name in sorted(LINEAR)),
  ],
)
def test_fused_equals_per_example(name, jit):
  step = LINEAR[name]
  expected, _ = jax.jit(step.update)(
    per_example(PARAMS, BATCH), step.init(PARAMS), PARAMS, **EXTRA
  )
  function = ranger.value_and_grad(losses, step)
  if jit:
    function = jax.jit(function)
  value, grads = function(PARAMS, BATCH, **EXTRA)
  close(value, jax.jit(losses)(PARAMS, BATCH))
  close(grads, expected)
  weights = jax.jit(lambda extra: ranger.example_weights(step, N, **extra))(EXTRA)
  weighted = jax.jit(jax.grad(lambda params: weights @ losses(params, BATCH)))(PARAMS)
  close(weighted, expected)
  assert weights.dtype == jnp.float32


@pytest.mark.guarantees(
  "value_and_grad", "The gradient is that of the step on per-example gradients"
)
@pytest.mark.few(2)
@pytest.mark.parametrize("name", sorted(NON_LINEAR))
@pytest.mark.parametrize(
  "micro_batch_size",
  [
    pytest.param(1, marks=pytest.mark.slow),
    4,
    pytest.param(64, marks=pytest.mark.slow),
  ],
)
def test_non_linear_runs_per_example(name, micro_batch_size):
  step = NON_LINEAR[name]
  expected, _ = jax.jit(step.update)(
    per_example(PARAMS, BATCH), step.init(PARAMS), PARAMS, **EXTRA
  )
  function = ranger.value_and_grad(losses, step, micro_batch_size=micro_batch_size)
  value, grads = jax.jit(function)(PARAMS, BATCH, **EXTRA)
  close(value, jax.jit(losses)(PARAMS, BATCH))
  close(grads, expected)
  with pytest.raises(ranger.NotLinearError, match="not linear"):
    ranger.example_weights(step, N, **EXTRA)


@pytest.mark.guarantees(
  "example_weights", "A linear step that is not one weight per example is"
)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
  "step",
  [
    optax.chain(ranger.aggregate_by_mean(), optax.centralize()),
    optax.chain(optax.centralize(), ranger.aggregate_by_mean()),
    optax.stateless(
      lambda updates, params: jax.tree.map(lambda u: u.mean(axis=0) + 1, updates)
    ),
    optax.stateless(
      lambda updates, params: jax.tree.map(
        lambda u: u.mean(axis=0) * (2 if u.ndim > 2 else 1), updates
      )
    ),
    optax.chain(
      ranger.aggregate_by_mean(),
      optax.stateless(
        lambda updates, params: jax.tree.map(
          lambda u: u.at[:1].multiply(0) if u.ndim else u, updates
        )
      ),
    ),
  ],
  ids=["centralized", "centralized-first", "affine", "by-rank", "by-row"],
)
def test_shape_dependent_step_is_refused(step, jit):
  function = ranger.value_and_grad(losses, step)
  with pytest.raises(ValueError, match="not one weight per example"):
    (jax.jit(function) if jit else function)(PARAMS, BATCH)


def test_step_without_aggregation_is_refused():
  with pytest.raises(ValueError, match="must end in an aggregation"):
    ranger.example_weights(
      ranger.average_neighbors(), N, neighbors=registry.neighbors()
    )


def test_step_with_momentum_is_refused():
  step = optax.chain(ranger.aggregate_by_mean(), optax.trace(0.9))
  function = ranger.value_and_grad(losses, step)
  with pytest.raises(ValueError, match="chain that part with the optimizer"):
    function(PARAMS, BATCH, state=step.init(PARAMS))


def test_state_comes_third_and_counts():
  step = LINEAR["mean"]
  batch = with_bad_row(BATCH, (3, 0))
  function = jax.jit(ranger.value_and_grad(losses, step))
  state = step.init(PARAMS)
  for count in (1, 2):
    _, _, state = function(PARAMS, batch, state=state)
    assert int(state.num_dropped) == count


@pytest.mark.guarantees(
  "value_and_grad", "A non-finite example changes only a counter, also if the"
)
@pytest.mark.few(3)
@pytest.mark.parametrize(
  ("name", "where"),
  [
    pytest.param(
      name,
      where,
      marks=[pytest.mark.slow] * (where == "loss" and name not in ("mean", "max")),
    )
    for name in ("mean", "sum", "head", "regions", "max", "clipped")
    for where in ("input", "loss")
  ],
)
@pytest.mark.parametrize(
  "value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)]
)
def test_bad_example_is_left_out(name, value, where):
  step = {**LINEAR, **NON_LINEAR}[name]

  def function(params, batch):
    own = losses(params, batch)
    return own + batch["add"] if where == "loss" else own

  extra = {**EXTRA, "member_weights": np.ones(N, np.float32)}
  good = {**BATCH, "add": np.zeros(N, np.float32)}
  bad = {name: leaf.copy() for name, leaf in good.items()}
  bad["x" if where == "input" else "add"][3] = value
  absent = {**extra, "member_weights": (np.arange(N) != 3).astype(np.float32)}
  grad_fn = jax.jit(ranger.value_and_grad(function, step))
  state = step.init(PARAMS)
  _, expected, _ = grad_fn(PARAMS, good, state=state, **absent)
  found, grads, state = grad_fn(PARAMS, bad, state=state, **extra)
  close(grads, expected)
  chex.assert_tree_all_finite(grads)
  assert max(int(leaf) for leaf in jax.tree.leaves(state)) == 1
  assert np.isfinite(found).sum() >= N - 1


def test_overflow_inside_the_model_is_one_example_where_they_are_apart():
  """A loss that is finite and a gradient that is not: left out, and counted."""

  def function(params, batch):
    return jnp.sqrt(batch["x"][:, 0] * params)

  params, batch = (
    np.float32(1),
    {"x": np.array([[1], [0], [4], [4], [4], [4]], np.float32)},
  )
  step = NON_LINEAR["max"]
  grad_fn = jax.jit(ranger.value_and_grad(function, step))
  _, grad, state = grad_fn(params, batch, state=step.init(params))
  assert float(grad) == 1.0
  assert int(state.num_dropped) == 1


def test_aux_and_extra_args_reach_the_losses():
  def function(params, batch, scale, smoothed):
    own = losses(params, batch) * scale + smoothed.sum(axis=1)
    return own, {"predictions": own}

  smoothed = np.ones([N, 2], np.float32)
  extra = {"scale": np.float32(2), "smoothed": smoothed, "unused": 1}
  for step in (LINEAR["mean"], NON_LINEAR["max"]):
    grad_fn = jax.jit(ranger.value_and_grad(function, step, has_aux=True))
    (value, aux), grads = grad_fn(PARAMS, BATCH, **extra)
    close(value, 2 * np.asarray(jax.jit(losses)(PARAMS, BATCH)) + 2)
    close(aux["predictions"], value)
    expected, _ = jax.jit(step.update)(
      per_example(PARAMS, BATCH), step.init(PARAMS), PARAMS
    )
    close(grads, jax.tree.map(lambda leaf: 2 * np.asarray(leaf), expected))

  def open_ended(params, batch, **others):
    assert others["nothing"] is None
    return function(params, batch, others["scale"], smoothed[: others["unused"]])

  grad_fn = ranger.value_and_grad(open_ended, step, has_aux=True)
  jax.eval_shape(lambda: grad_fn(PARAMS, BATCH, nothing=None, scale=1.0, unused=1))


def test_losses_reach_the_step():
  def update(updates, state, params=None, *, losses=None, **extra_args):
    del params, extra_args
    soft = jax.nn.softmax(losses)
    return jax.tree.map(lambda u: jnp.tensordot(soft, u, axes=1), updates), state

  step = optax.GradientTransformationExtraArgs(lambda p: (), update)
  _, grads = jax.jit(ranger.value_and_grad(losses, step))(PARAMS, BATCH)
  soft = np.asarray(jax.jit(lambda *args: jax.nn.softmax(losses(*args)))(PARAMS, BATCH))
  close(grads, jax.tree.map(
    lambda u: np.tensordot(soft, u, axes=1), per_example(PARAMS, BATCH)
  ))  # fmt: skip


def test_weights_are_those_of_the_state():
  step = ranger.aggregate_by_worst_regions(2)
  state = step.init(())._replace(log_weights=np.log(np.float32([0.25, 0.75])))
  regions = np.array([0, 1, 1, 0, 0, 1], np.int32)
  extra = {"losses": np.zeros(N, np.float32), "regions": regions}
  weigh = lambda state, extra: ranger.example_weights(step, N, state=state, **extra)
  found = jax.jit(weigh)(state, extra)
  np.testing.assert_allclose(found, np.where(regions, 0.25, 0.25 / 3), rtol=1e-6)


def test_weights_are_as_wide_as_numbers_are():
  step, given = ranger.aggregate_by_mean(), np.array([1.0, 2.0, 4.0, 1.0, 2.0, 4.0])
  with jax.enable_x64(True):
    weigh = lambda given: ranger.example_weights(step, N, member_weights=given)
    found = jax.jit(weigh)(given)
  assert found.dtype == np.float64
  np.testing.assert_allclose(found, given / 14, rtol=1e-15)
  assert ranger.example_weights(step, 0).shape == (0,)


def test_bfloat16_losses_are_weighed_in_float32():
  function = lambda params, batch: losses(params, batch).astype(jnp.bfloat16)
  grad_fn = ranger.value_and_grad(function, ranger.aggregate_by_mean())
  value, grads = jax.jit(grad_fn)(PARAMS, BATCH)
  assert value.dtype == jnp.float32
  expected = jax.jit(jax.grad(lambda params: losses(params, BATCH).mean()))(PARAMS)
  close(grads, expected, rtol=2e-2)


@pytest.mark.guarantees(
  "value_and_grad", "A linear step needs the memory of the plain mean"
)
def test_fused_holds_no_per_example_gradients():
  """A 1 MB model: the fused form needs what the plain mean needs, not 64 MB."""
  params = np.ones([512, 512], np.float32)
  batch = {"x": np.ones([64, 512], np.float32)}
  square = lambda params, batch: ((batch["x"] @ params) ** 2).sum(axis=1)
  neighbors = ranger.Neighbors(
    np.arange(1, 6) + np.arange(64)[:, None] % 32,
    np.ones([64, 5], np.float32),
    np.full([64, 5], 0.2, np.float32),
  )

  def temporaries(function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  plain = temporaries(
    jax.value_and_grad(lambda p, b: square(p, b).mean()), params, batch
  )
  fused = ranger.value_and_grad(square, ranger.ranger_head())
  fused = temporaries(lambda p, b: fused(p, b, neighbors=neighbors), params, batch)
  assert fused < plain + 2**18


@pytest.mark.parametrize(
  "axis_type",
  [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)],
)
def test_batch_sharded_over_devices(axis_type):
  """A neighbor on another device counts as a local one."""
  mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
  function = jax.jit(ranger.value_and_grad(losses, LINEAR["head"]))
  value, grads = function(PARAMS, BATCH, neighbors=EXTRA["neighbors"])
  with jax.set_mesh(mesh):
    batch = jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec("data")))
    result = function(PARAMS, batch, neighbors=EXTRA["neighbors"])
  close(result, (value, grads))


@pytest.mark.guarantees(
  "value_and_grad", "A non-finite example changes only a counter, also if the"
)
def test_bad_example_is_left_out_of_a_singular_loss():
  """A norm has no gradient at zero: the bad row must not become zeros."""
  norm = lambda params, batch: jnp.linalg.norm(params * batch, axis=1)
  good, bad = np.float32([[1, 2], [3, 4], [1, 3], [4, 2], [1, 5]]), [[np.nan, 1]]
  params = np.ones([1, 2], np.float32)
  for step in (LINEAR["mean"], NON_LINEAR["max"]):
    grad_fn = jax.jit(ranger.value_and_grad(norm, step))
    expected = grad_fn(params, good)[1]
    for place in range(N):
      batch = np.insert(good, place, bad, axis=0)
      close(grad_fn(params, batch)[1], expected)


grad_of_log = jax.jit(
  ranger.value_and_grad(lambda p, batch: jnp.log(batch["x"]) * p, LINEAR["mean"])
)


@pytest.mark.parametrize("x", [-1.0, 0.0])
def test_a_loss_that_ruins_the_gradient_drops_the_batch(x):
  """Zero times a derivative that isn't finite is NaN, and the rows share the pass."""
  step = LINEAR["mean"]
  for third, expected, count in ((x, 0.0, N), (np.e, 0.5, 0)):
    batch = {"x": np.array([1.0, np.e, third, 1.0, 1.0, np.e], np.float32)}
    state = step.init(np.float32(1))
    value, grads, state = grad_of_log(np.float32(1), batch, state=state)
    np.testing.assert_allclose(grads, expected, rtol=1e-6)
    assert jax.tree.leaves(state) == [count]
    assert np.isfinite(value).tolist() == [True, True, not count, True, True, True]


def test_a_bad_loss_with_a_derivative_drops_itself():
  losses = lambda params, batch: batch["x"] * params + batch["y"]
  grad_fn = jax.jit(ranger.value_and_grad(losses, LINEAR["mean"]))
  batch = {
    "x": np.float32([1, 3e38, 3, 1, 3, 2]),
    "y": np.float32([0, 3e38, 0, 0, 0, 0]),
  }
  state = LINEAR["mean"].init(np.float32(1))
  value, grads, state = grad_fn(np.float32(1), batch, state=state)
  assert not np.isfinite(value[1])
  np.testing.assert_allclose(grads, 2)
  assert jax.tree.leaves(state) == [1]


def test_weights_differ_from_device_to_device():
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
  member = np.array([1.0, 2.0, 1.0, 3.0], np.float32)
  split = PartitionSpec("data")
  function = jax.shard_map(
    lambda m: ranger.example_weights(ranger.aggregate_by_mean(), 2, member_weights=m),
    mesh=mesh,
    in_specs=split,
    out_specs=split,
  )
  weights = jax.jit(function)(jax.device_put(member, NamedSharding(mesh, split)))
  np.testing.assert_allclose(weights, [1 / 3, 2 / 3, 1 / 4, 3 / 4], rtol=1e-6)


def test_examples_of_different_devices_are_kept_apart():
  """A maximum of each device's own examples, or a refusal that names the leaf."""
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  split = PartitionSpec("data")
  grad_fn = ranger.value_and_grad(lambda p, x: p * x, NON_LINEAR["max"])

  def local(params, x):
    return grad_fn(jax.lax.pcast(params, "data", to="varying"), x)[1][None]

  def run(function, out_specs):
    over = jax.shard_map(
      function, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=out_specs
    )
    x = np.arange(1, 9, dtype=np.float32)
    return jax.jit(over)(np.float32(2), jax.device_put(x, NamedSharding(mesh, split)))

  np.testing.assert_array_equal(run(local, split), [2, 4, 6, 8])
  with pytest.raises(ValueError, match="params is the same over the mesh axis 'data'"):
    run(lambda params, x: grad_fn(params, x)[1], PartitionSpec())


@pytest.mark.guarantees(
  "value_and_grad", "On several devices it is the gradient of the whole batch"
)
@pytest.mark.parametrize(
  "map_", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)]
)
def test_a_split_batch_has_the_gradient_of_the_whole(map_):
  """Two examples on each of three devices; one of them is bad."""
  step, batch = LINEAR["neighbors-regions"], with_bad_row(BATCH, 4)
  state = step.init(PARAMS)
  whole = jax.jit(ranger.value_and_grad(losses, step))
  values, expected, new_state = whole(PARAMS, batch, state=state, **EXTRA)
  split = ranger.value_and_grad(losses, step, axis_name="data")
  call = lambda batch, extra: split(PARAMS, batch, state=state, **extra)
  cut = lambda tree: jax.tree.map(lambda a: a.reshape(3, 2, *a.shape[1:]), tree)
  if map_ == "pmap":
    mapped = jax.pmap(call, axis_name="data", devices=jax.devices()[:3])
    own, grads, after = mapped(cut(batch), cut(EXTRA))
    grads, after = jax.tree.map(lambda leaf: leaf[2], (grads, after))
  else:
    mesh = jax.make_mesh((3,), ("data",), (AxisType.Auto,), devices=jax.devices()[:3])
    rows = PartitionSpec("data")
    over = jax.shard_map(
      call, mesh=mesh, in_specs=rows, out_specs=(rows, PartitionSpec(), PartitionSpec())
    )
    own, grads, after = jax.jit(over)(batch, EXTRA)
  good = np.arange(N) != 4
  close(np.asarray(own).reshape(-1)[good], np.asarray(values)[good])
  close(grads, expected)
  jax.tree.map(np.testing.assert_array_equal, after, new_state)


def test_a_step_that_is_not_linear_is_refused_over_devices():
  mesh = jax.make_mesh((3,), ("data",), (AxisType.Auto,), devices=jax.devices()[:3])
  split = ranger.value_and_grad(losses, ranger.aggregate_by_max(), axis_name="data")
  over = jax.shard_map(
    lambda batch: split(PARAMS, batch)[1],
    mesh=mesh,
    in_specs=PartitionSpec("data"),
    out_specs=PartitionSpec(),
  )
  with pytest.raises(ValueError, match="never leave their device"):
    jax.jit(over)(BATCH)


def test_many_neighbors_are_no_rounding_error():
  """The trial of a step on stand-ins must not add up thousands at one place."""
  n, k = 4096, 10
  neighbors = ranger.Neighbors(
    (np.arange(n)[:, None] + np.arange(1, k + 1)) % n,
    np.ones([n, k], np.float32),
    np.full([n, k], 1 / k, np.float32),
  )
  weights = jax.jit(
    lambda neighbors: ranger.example_weights(
      ranger.ranger_head(), n, neighbors=neighbors
    )
  )(neighbors)
  np.testing.assert_allclose(weights, np.full(n, 1 / n), rtol=1e-5)


def test_float64_keeps_its_digits():
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(N, 3)), rng.normal(size=3)
  with jax.enable_x64(True):
    losses = lambda w, batch: (batch @ w - 1) ** 2
    grad_fn = jax.jit(ranger.value_and_grad(losses, ranger.aggregate_by_mean()))
    _, found = grad_fn(w, x)
  np.testing.assert_allclose(found, 2 * x.T @ (x @ w - 1) / N, rtol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize(
  "step", ["aggregate_by_median", "aggregate_by_geometric_median"]
)
def test_rows_that_are_not_declared_are_refused_per_example(step):
  losses = lambda w, batch, scale: scale * (batch @ w - 1) ** 2
  step = getattr(ranger, step)()
  batch, scale = jnp.ones([5, 3]), jnp.arange(5.0)
  with pytest.raises(ValueError, match=r"shape \[1\].*got \[5\].*row_args="):
    ranger.value_and_grad(losses, step)(jnp.ones(3), batch, scale=scale)
  grad_fn = ranger.value_and_grad(losses, step, row_args=("scale",))
  _, found = grad_fn(jnp.ones(3), batch, scale=scale)
  np.testing.assert_allclose(found, np.full(3, 8.0), rtol=1e-4)  # that of the middle


def test_rows_of_large_numbers_are_finite():
  """Their sum is not; the rows are used."""
  losses = lambda params, batch: (params[None] * (batch * 1e-37)).sum(axis=1)
  step = LINEAR["mean"]
  batch, params = np.full([N, 3], 3e38, np.float32), np.ones(3, np.float32)
  grad_fn = jax.jit(ranger.value_and_grad(losses, step))
  _, grads, state = grad_fn(params, batch, state=step.init(params))
  np.testing.assert_allclose(grads, 30.0, rtol=1e-5)
  assert int(state.num_dropped) == 0

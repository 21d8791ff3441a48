"""Layers: the same as a loop over regions, on grids, in time, on graphs, sharded."""

import subprocess
import sys

import chex
from flax import linen as nn
from flax import nnx
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from optax_ranger import layers
from tests.helpers import close


class Conv(nnx.Module):
  """A small CNN that pools its cell to one vector."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)

  def __call__(self, x):
    return nnx.relu(self.conv(x)).mean(axis=(1, 2))


class Conv3d(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 4, (3, 3, 3), rngs=rngs)

  def __call__(self, x):
    return nnx.relu(self.conv(x)).mean(axis=(1, 2, 3))


class LastState(nnx.Module):
  """An RNN over one window of a long sequence."""

  def __init__(self, rngs):
    self.rnn = nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs))

  def __call__(self, x):
    return self.rnn(x)[:, -1]


class Points(nnx.Module):
  """A mean over the points that are there."""

  def __init__(self, rngs):
    self.dense = nnx.Linear(2, 4, rngs=rngs)

  def __call__(self, x, mask):
    features = jnp.where(mask[:, :, None], nnx.relu(self.dense(x)), 0)
    # 0 / 0 where a region is empty: it must count for nothing.
    return features.sum(axis=1) / mask.sum(axis=1).astype(features.dtype)[:, None]


class Messages(nnx.Module):
  """A mean over nodes, each with what its neighbors send."""

  def __init__(self, rngs):
    self.dense = nnx.Linear(3, 4, rngs=rngs)

  def __call__(self, x, mask, adjacency):
    sent = jnp.einsum("ij,bjc->bic", adjacency, x, precision="highest")
    features = jnp.where(mask[:, :, None], nnx.relu(self.dense(x + sent)), 0)
    return features.sum(axis=1) / mask.sum(axis=1).astype(features.dtype)[:, None]


NODES = 11
# An edge joins the two nodes without a region.
REGIONS = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1])
EDGES = np.array([[i, (i + 1) % NODES] for i in range(NODES)])
CENTERS = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [90.0, 90.0]], np.float32)


def graph_piece(x, region):
  nodes = np.flatnonzero(region == REGIONS)
  joined = {tuple(edge) for edge in EDGES.tolist()}
  adjacency = np.array(
    [[(a, b) in joined or (b, a) in joined for b in nodes] for a in nodes], np.float32
  )
  return x[:, nodes], np.ones([len(x), len(nodes)], bool), adjacency


def center_piece(x, region):
  """Points of one input at a time: they differ in number."""
  distances = np.linalg.norm(np.asarray(x)[:, :, None] - CENTERS, axis=-1)
  return x, distances.argmin(axis=-1) == region


CASES = {
  "grid": (
    layers.Grid((2, 3)),
    Conv,
    (5, 8, 12, 3),
    lambda x, r: (x[:, 4 * (r // 3) :][:, :4, 4 * (r % 3) :][:, :, :4],),
  ),
  "grid-3d": (
    layers.Grid((2, 1, 2)),
    Conv3d,
    (2, 4, 4, 4, 1),
    lambda x, r: (x[:, 2 * (r // 2) :][:, :2, :, 2 * (r % 2) :][:, :, :, :2],),
  ),
  "time": (layers.TimeWindows(5), LastState, (3, 20, 3), lambda x, r: (
    x[:, 4 * r : 4 * r + 4],
  )),
  "centers": (layers.Centers(CENTERS), Points, (3, 9, 2), center_piece),
  "graph": (layers.Graph(REGIONS, EDGES), Messages, (3, NODES, 3), graph_piece),
}  # fmt: skip
each_case = pytest.mark.parametrize("name", sorted(CASES))
# Each partition with the mean, each aggregator on the grid; the rest is slow.
each_case_and_aggregator = pytest.mark.parametrize(
  ("name", "aggregator"),
  [
    pytest.param(
      name,
      aggregator,
      marks=[pytest.mark.slow] * (name != "grid" and aggregator != "mean"),
    )
    for name in sorted(CASES)
    for aggregator in ("mean", "sum", "max")
  ],
)


apply = nnx.jit(lambda layer, *args: layer(*args))
state_of = jax.jit(lambda state, i: jax.tree.map(lambda leaf: leaf[i], state))


def draw(name, seed=0):
  shape = CASES[name][2]
  x = np.random.default_rng(seed).standard_normal(shape) + (name == "centers")
  return x.astype(np.float32)


def build(name, aggregator="mean", **kwargs):
  partition, local, _, _ = CASES[name]
  return layers.RegionalAggregator(
    partition, local, aggregator, rngs=nnx.Rngs(0), **kwargs
  )


def local_of(layer, region):
  if layer.shared:
    return layer.local
  graphdef, state = nnx.split(layer.local)
  return nnx.merge(graphdef, state_of(state, region))


def loop(name, layer, x, weights):
  """Region by region, input by input."""
  _, _, _, piece = CASES[name]
  rows = []
  for i in range(len(x)):
    results, kept = [], []
    for region in range(layer.partition.num_regions):
      pieces = piece(x[i : i + 1], region)
      if len(pieces) > 1 and not pieces[1].any():
        continue
      result = apply(local_of(layer, region), *pieces)
      results.append(np.asarray(result, np.float64)[0])
      kept.append(weights[region])
    results, kept = np.stack(results), np.array(kept)
    if layer.aggregator == "max":
      rows.append(results.max(axis=0))
    elif layer.aggregator == "sum":
      rows.append(kept @ results)
    else:
      rows.append(kept @ results / kept.sum())
  return np.stack(rows)


@pytest.mark.guarantees(
  "layers.RegionalAggregator", "The result equals a loop over regions"
)
@pytest.mark.few(3)
@each_case_and_aggregator
@pytest.mark.parametrize("shared", [True, False])
def test_the_layer_is_a_loop_over_regions(name, shared, aggregator):
  count = CASES[name][0].num_regions
  weights = np.ones(count)
  given = None
  if aggregator != "max":
    weights = given = np.random.default_rng(1).uniform(0.5, 2, count)
    given = given.astype(np.float32)
  layer = build(name, aggregator, shared=shared, weights=given)
  x = draw(name)
  close(apply(layer, x), loop(name, layer, x, weights))


@pytest.mark.guarantees(
  "layers.RegionalAggregator", "Gradients flow through everything, weights included"
)
@pytest.mark.few(2)
@each_case_and_aggregator
def test_gradients_flow_through_everything(name, aggregator):
  """Against finite differences, for parameters, weights and inputs."""
  learned = None if aggregator == "max" else "learned"
  layer = build(name, aggregator, shared=False, weights=learned)
  graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
  count = layer.partition.num_regions
  given = np.linspace(0.5, 1.5, count, dtype=np.float32)
  x = draw(name)

  def loss(params, given, x, rest=rest):
    extra = () if aggregator == "max" else (given,)
    return (nnx.merge(graphdef, params, rest, copy=True)(x, *extra) ** 2).sum()

  grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, given, x, rest)
  chex.assert_tree_all_finite(grads)
  names = {"log_weights"} if learned else set()
  assert names <= set(grads[0])
  grads = jax.device_get(grads)
  moved = [grads[0], grads[2]] + ([grads[1]] if learned else [])
  assert all(
    any(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(tree)) for tree in moved
  )
  evaluate = jax.jit(loss)
  if learned:
    for region in range(count):
      step = np.float32(1e-2) * np.eye(count, dtype=np.float32)[region]
      ends = [evaluate(params, given + sign * step, x, rest) for sign in (1, -1)]
      slope = (np.asarray(ends[0]) - np.asarray(ends[1])) / 2e-2
      np.testing.assert_allclose(
        np.asarray(grads[1])[region], slope, rtol=5e-2, atol=2e-2
      )


@pytest.mark.guarantees("layers.RegionalAggregator", "Empty regions are left out")
def test_a_function_of_jax_closes_over_a_layer():
  x = np.random.default_rng(0).standard_normal([2, 4, 3]).astype(np.float32)
  for shared in (True, False):
    layer = layers.RegionalAggregator(
      layers.Grid((2,)),
      lambda rngs: nnx.Linear(3, 5, rngs=rngs),
      "mean",
      shared=shared,
      rngs=nnx.Rngs(0),
    )
    exported = export.export(jax.jit(lambda x, layer=layer: layer(x)))(x)
    close(exported.call(x), apply(layer, x))


def test_state_of_local_layers_changes():
  local = lambda rngs: nnx.Sequential(
    nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
  )
  layer = layers.RegionalAggregator(
    layers.Grid((2,)), local, "mean", shared=False, rngs=nnx.Rngs(0)
  )
  statistics = lambda: jax.tree.map(np.array, nnx.state(layer, nnx.BatchStat))
  before = statistics()
  apply(layer, np.ones([2, 4, 3], np.float32))
  after = statistics()
  assert jax.tree.leaves(before)[0].shape == (2, 3)
  assert not jax.tree.all(jax.tree.map(np.array_equal, before, after))


def test_empty_regions_of_a_layer_count_for_nothing():
  """Nothing is near the fourth center; its 0 / 0 reaches neither value nor gradient."""
  layer = build("centers", shared=False)
  x = draw("centers")
  graphdef, params = nnx.split(layer, nnx.Param)
  loss = lambda params: nnx.merge(graphdef, params)(x).sum()
  value, grads = jax.device_get(jax.jit(jax.value_and_grad(loss))(params))
  assert np.isfinite(value)
  for leaf in jax.tree.leaves(grads):
    assert np.isfinite(leaf).all()
    assert np.abs(leaf[3]).max() == 0


@pytest.mark.parametrize("aggregator", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(6,), (5, 6)], ids=["regions", "rows"])
def test_weights_of_a_call_multiply_those_of_the_layer(shape, aggregator):
  rng, x = np.random.default_rng(2), draw("grid")
  own, given = (rng.uniform(0.5, 2, s).astype(np.float32) for s in ((6,), shape))
  layer = build("grid", aggregator, weights=own)
  rows = zip(x[:, None], np.broadcast_to(own * given, [5, 6]), strict=True)
  expected = np.concatenate([loop("grid", layer, *row) for row in rows])
  close(apply(layer, x, given), expected)


def test_learned_weights_start_as_ones_and_stay_positive():
  local = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
  layer = layers.RegionalAggregator(layers.Grid((2,)), local, "sum", weights="learned")
  x = np.random.default_rng(0).standard_normal([2, 4, 3]).astype(np.float32)
  of = lambda part: np.asarray(part @ local.kernel[...] + local.bias[...][None, None])
  halves = of(x[:, :2]), of(x[:, 2:])
  close(apply(layer, x), halves[0] + halves[1])
  layer.log_weights[...] = jnp.array([-2.0, 1.0])
  close(apply(layer, x), np.exp(-2) * halves[0] + np.exp(1) * halves[1])


@pytest.mark.guarantees("layers.RegionalAggregator", "Empty regions are left out")
@pytest.mark.parametrize("aggregator", ["mean", "sum", "max"])
@pytest.mark.parametrize("shared", [True, False])
def test_inputs_without_points_give_zeros(aggregator, shared):
  layer = build("centers", aggregator, shared=shared)
  result = apply(layer, np.zeros([3, 0, 2], np.float32))
  np.testing.assert_array_equal(result, np.zeros([3, 4]))
  assert apply(layer, draw("centers")[:0]).shape == (0, 4)


def test_an_empty_region_is_no_zero_in_a_maximum():
  class Negative(nnx.Module):
    def __call__(self, points, mask):
      return -1 - jnp.where(mask[..., None], points, 0).sum(axis=1)

  partition = layers.Centers(np.array([[0.0], [9.0]], np.float32))
  layer = layers.RegionalAggregator(partition, Negative(), "max")
  near = np.array([[[1.0], [2.0]]], np.float32)
  found = apply(layer, np.concatenate([near, near + 7], 1))
  np.testing.assert_array_equal(apply(layer, near), [[-4]])
  np.testing.assert_array_equal(found, [[-4]])


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, jnp.bfloat16, np.float16])
def test_centers_are_not_rounded_to_the_type_of_the_points(dtype):
  partition = layers.Centers(np.array([[100.2], [100.6], [100.9]]))
  rows = np.array([[[101], [100]]]).astype(dtype)
  (points, mask), _ = jax.device_get(jax.jit(partition.split)(rows))
  assert points.dtype == rows.dtype
  assert mask.sum(axis=2)[:, 0].tolist() == [1, 0, 1]
  assert (points[0, 0, 0, 0], points[2, 0, 0, 0]) == (100, 101)


def test_a_graph_in_the_type_of_the_nodes():
  partition = layers.Graph(REGIONS, EDGES)
  split = jax.jit(partition.split)
  nodes, mask, adjacency = jax.device_get(split(draw("graph").astype(np.float16)))[0]
  assert (nodes.dtype, mask.dtype, adjacency.dtype) == (np.float16, bool, np.float16)
  np.testing.assert_array_equal(mask[:, 0].sum(axis=1), [3, 4, 2])
  np.testing.assert_array_equal(nodes[2, :, 2:], np.zeros([3, 2, 3]))


@pytest.mark.parametrize(("aggregator", "expected"), [("sum", 5.0), ("mean", 2.5)])
def test_a_region_without_nodes_does_not_count(aggregator, expected):
  """The ids have a gap: no node is of region 1."""

  class OneMore(nnx.Module):
    def __call__(self, nodes, mask, adjacency):
      return 1 + mask.sum(axis=1, keepdims=True, dtype=nodes.dtype)

  partition = layers.Graph(np.array([0, 0, 2]), np.array([[0, 1]]))
  layer = layers.RegionalAggregator(partition, OneMore(), aggregator)
  assert layer(jnp.ones([1, 3, 1])).item() == expected


def test_capacity_keeps_the_first_points():
  partition = layers.Centers(CENTERS, capacity=2)
  split = jax.jit(partition.split)
  (points, mask), present = jax.device_get(split(draw("centers")))
  assert points.shape == (4, 3, 2, 2)
  split = jax.jit(layers.Centers(CENTERS).split)
  (whole, all_there), _ = jax.device_get(split(draw("centers")))
  np.testing.assert_array_equal(points, whole[:, :, :2])
  np.testing.assert_array_equal(mask, all_there[:, :, :2])
  assert not present[3].any()


@each_case
def test_a_batch_sharded_over_devices(name):
  layer = build(name)
  x = np.concatenate([draw(name, seed) for seed in range(8)])
  expected = apply(layer, x)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  graphdef, state = nnx.split(layer)
  function = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
  result = function(state, jax.device_put(x, sharding))
  close(result, expected)
  assert result.sharding.is_equivalent_to(sharding, result.ndim)


class SideBySide(nnx.Module):
  """The sources' small network: two hidden layers of five, summed, one output."""

  def __init__(self, rngs):
    self.hidden = layers.RegionalAggregator(
      layers.Grid((2,)), lambda rngs: Hidden(rngs), "sum", shared=False, rngs=rngs
    )
    self.out = nnx.Linear(5, 1, rngs=rngs)

  def __call__(self, x):
    return self.out(self.hidden(x))[:, 0]


class Hidden(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(2, 5, rngs=rngs)

  def __call__(self, x):
    return jnp.tanh(self.dense(x))


def test_the_small_network_of_the_sources():
  """Ten hidden units in all; it learns a sum of two functions of two inputs each."""
  model = SideBySide(nnx.Rngs(0))
  sizes = sorted(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  assert sizes == [1, 5, 10, 20]
  x = np.random.default_rng(0).uniform(-1, 1, [256, 4]).astype(np.float32)
  y = np.sin(2 * x[:, 0]) / 2 + x[:, 1] + x[:, 2] * x[:, 3]
  graphdef, params = nnx.split(model, nnx.Param)
  tx = optax.adam(3e-2)
  grad_fn = ranger.value_and_grad(
    lambda params, batch: (nnx.merge(graphdef, params)(batch["x"]) - batch["y"]) ** 2,
    ranger.aggregate_by_mean(),
  )

  def step(carry, _):
    params, state = carry
    losses, grads = grad_fn(params, {"x": x, "y": y})
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), losses.mean()

  with jax.numpy_dtype_promotion("standard"):  # Adam's own arithmetic needs it.
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, length=500))
    _, losses = train((params, jax.jit(tx.init)(params)))
  assert losses[-1] < 0.02 * losses[0]


@pytest.mark.slow
def test_linen_by_the_bridge():
  """The line of the docs: the same layer, with its parameters in Linen's hands."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      regional = nnx.bridge.to_linen(
        layers.RegionalAggregator, layers.Grid((2, 3)), Conv, "mean", shared=False
      )
      return nn.Dense(2)(regional(x))

  x = draw("grid")
  variables = Model().init(jax.random.key(0), x)
  value, grads = jax.value_and_grad(
    lambda params: (Model().apply({**variables, "params": params}, x) ** 2).sum()
  )(variables["params"])
  assert np.isfinite(value)
  shapes = {leaf.shape for leaf in jax.tree.leaves(grads)}
  assert (6, 3, 3, 3, 4) in shapes
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
  ("wrong", "error", "message"),
  [
    (lambda: build("grid", "median"), ValueError, "aggregator must be one of"),
    (lambda: build("grid", "max", weights="learned"), ValueError, "takes no weights"),
    (
      lambda: build("grid", weights=np.ones(5)),
      ValueError,
      r"weights must have shape \[6\], got \[5\]",
    ),
    (lambda: build("grid", weights=-np.ones(6)), ValueError, "must not be negative"),
    (lambda: build("grid", weights="fixed"), ValueError, "weights must be one of"),
    (
      lambda: build("grid", "max")(draw("grid"), jnp.ones([6])),
      ValueError,
      "aggregator='max' takes no region_weights",
    ),
    (
      lambda: layers.RegionalAggregator(
        layers.Grid((2, 3)), Conv(nnx.Rngs(0)), shared=False
      ),
      ValueError,
      "shared=False needs local to be a function of rngs",
    ),
    (
      lambda: layers.Grid((2, 2)).split(jnp.ones([4, 4])),
      ValueError,
      r"a batch axis and 2 axes to cut .* got shape \[4, 4\]",
    ),
    (
      lambda: layers.Centers(np.ones(3)),
      ValueError,
      r"centers must have shape \[num_regions, d\], got \[3\]",
    ),
    (
      lambda: layers.Centers(CENTERS, capacity=0),
      ValueError,
      "capacity must be .*got 0",
    ),
    (
      lambda: layers.Graph(np.array([-1, -1]), EDGES[:0]),
      ValueError,
      "hold an id of 0 or more",
    ),
    (
      lambda: layers.RegionalAggregator(layers.Grid((2, 2)), 3, rngs=nnx.Rngs(0)),
      TypeError,
      "local must be a module or a function",
    ),
    (
      lambda: layers.RegionalAggregator(layers.Grid((2, 2)), Conv),
      ValueError,
      "needs rngs=",
    ),
    (
      lambda: layers.RegionalAggregator((2, 2), Conv, rngs=nnx.Rngs(0)),
      TypeError,
      r"partition must be a Grid.*got \(2, 2\)",
    ),
    (
      lambda: build("grid")(jnp.ones([1, 9, 12, 3])),
      ValueError,
      r"parts = \(2, 3\) must divide the axes of the inputs, got size 9 on axis 1",
    ),
    (
      lambda: build("grid")(draw("grid"), jnp.ones([3])),
      ValueError,
      r"region_weights must have shape \[6\] or \[5, 6\], got \[3\]",
    ),
    (
      lambda: build("graph")(jnp.ones([1, 9, 3])),
      ValueError,
      r"inputs must have shape \[batch, 11, ...\]",
    ),
    (
      lambda: layers.Graph(np.array([0, 1]), np.array([[0, 2]])),
      ValueError,
      r"edges must join nodes in \[0, 2\), got 0 to 2",
    ),
    (
      lambda: layers.Graph(np.array([0, 1]), np.array([[-1, 1]])),
      ValueError,
      r"edges must join nodes in \[0, 2\), got -1 to 1",
    ),
    (
      lambda: build("centers")(jnp.ones([1, 9, 3])),
      ValueError,
      r"inputs must have shape \[batch, points, 2\], got \[1, 9, 3\]",
    ),
  ],
)
def test_wrong_use_of_layers_is_refused(wrong, error, message):
  with pytest.raises(error, match=message):
    wrong()


def test_flax_is_an_extra():
  code = (
    "import sys; sys.modules['flax'] = None; import optax_ranger\n"
    "try:\n  import optax_ranger.layers\n"
    "except ImportError as error:\n  assert 'optax-ranger[flax]' in str(error)\n"
    "else:\n  raise AssertionError('imported')"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr

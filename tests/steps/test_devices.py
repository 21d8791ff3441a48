"""Devices as members: the same result as stacked members, on every device."""

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

NUM_DEVICES = 8
AGGREGATORS = {
  "mean": ranger.aggregate_by_mean(),
  "sum": ranger.aggregate_by_sum(),
  "regions": ranger.aggregate_by_regions(2),
  "max": ranger.aggregate_by_max(),
  "median": ranger.aggregate_by_median(),
  "trimmed": ranger.aggregate_by_trimmed_mean(0.25),
  "geometric": ranger.aggregate_by_geometric_median(),
  "krum": ranger.aggregate_by_krum(2),
  "upgrad": ranger.aggregate_by_upgrad(),
  "mixed": ranger.mix_nearest(ranger.aggregate_by_median(), 2),
  "norms": optax.chain(ranger.clip_examples(1.0), ranger.aggregate_by_mean()),
  "multi-krum": ranger.aggregate_by_krum(2, 3),
  "clipped": optax.chain(ranger.aggregate_by_krum(2), optax.clip(0.5)),
}
EXTRA = {"regions": np.array([0, 1, 1, 1, 0, 1, 1, 1], np.int32)}
WEIGHTS = np.array([1.0, 2.0, 0.0, 1.0, 1.0, 3.0, 1.0, 0.5], np.float32)
# Krum with more to keep, or a step after it, is slow: the same collectives.
_SLOW = ("clipped", "multi-krum", "mixed")
each_aggregator = pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW))
    for name in sorted(AGGREGATORS)
  ],
)


def draw(dtype=np.float32, n=NUM_DEVICES):
  rng = np.random.default_rng(0)
  # Of sizes by which an array in a compiled program is known to be a leaf.
  return {
    "b": rng.standard_normal([n, 101]).astype(dtype),
    "w": rng.standard_normal([n, 7, 107]).astype(dtype),
  }


def mesh_of(*shape):
  names = ("rows", "columns")[: len(shape)]
  return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def each_device(name, names, **extra):
  """What one device does with its own row of the gradients."""
  step = ranger.across_devices(AGGREGATORS[name], names)

  def function(rows, weights):
    own = jax.tree.map(lambda leaf: leaf[0], rows)
    return step.update(own, step.init(own), weight=weights[0], **extra)

  return function


def sharded(function, mesh=None):
  mesh = mesh_of(NUM_DEVICES) if mesh is None else mesh
  split = PartitionSpec(mesh.axis_names)
  return jax.jit(
    jax.shard_map(
      function,
      mesh=mesh,
      in_specs=split,
      out_specs=PartitionSpec(),
      check_vma=True,
    )
  )


@functools.cache
def over_devices(name):
  return sharded(each_device(name, "rows", **EXTRA))


@functools.partial(jax.jit, static_argnames="name")
def stacked(name, rows, weights):
  step = AGGREGATORS[name]
  return step.update(rows, step.init(rows), member_weights=weights, **EXTRA)


@pytest.mark.guarantees(
  "across_devices", "The result is that of the aggregator on the stacked"
)
@pytest.mark.few(3)
@each_aggregator
@pytest.mark.parametrize(
  "way",
  [
    "checked",
    pytest.param("two axes", marks=pytest.mark.slow),
    pytest.param("pmap", marks=pytest.mark.slow),
  ],
)
def test_across_devices_is_the_aggregator(name, way):
  rows = draw()
  if way == "pmap":
    function = each_device(name, "rows", **EXTRA)
    add = lambda tree: jax.tree.map(lambda leaf: leaf[:, None], tree)
    result = jax.pmap(function, axis_name="rows")(add(rows), WEIGHTS[:, None])
    result = jax.tree.map(lambda leaf: leaf[3], result)
  elif way == "two axes":
    mesh = mesh_of(2, 4)
    function = each_device(name, mesh.axis_names, **EXTRA)
    result = sharded(function, mesh)(rows, WEIGHTS)
  else:
    result = over_devices(name)(rows, WEIGHTS)
  close(result, stacked(name, rows, WEIGHTS))


def test_half_precision_is_summed_in_float32():
  """A weight that bfloat16 rounds to one, and sums that cancel."""
  rows = np.zeros([NUM_DEVICES, 2], np.float32)
  rows[:2] = [[512, 1], [-512, 2]]
  weights = np.ones(NUM_DEVICES, np.float32)
  weights[0] += 2**-9
  function = sharded(each_device("sum", "rows"))
  found, _ = function({"w": rows.astype(jnp.bfloat16)}, weights)
  assert found["w"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(found["w"].astype(np.float32), [1, 3])


@pytest.mark.guarantees("across_devices", "Every device gets the same bits")
@pytest.mark.few(1)
@pytest.mark.parametrize(
  "name",
  [
    "krum",
    "mean",
    "median",
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in sorted({*AGGREGATORS} - {"krum", "mean", "median"})
    ),
  ],
)
def test_every_device_gets_the_same_bits(name):
  function = each_device(name, "rows", **EXTRA)
  result = sharded(function)(draw(jnp.bfloat16), WEIGHTS)
  for leaf in jax.tree.leaves(result):
    copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(copies) == NUM_DEVICES
    assert len({copy.tobytes() for copy in copies}) == 1
  add = lambda tree: jax.tree.map(lambda leaf: leaf[:, None], tree)
  result = jax.pmap(function, axis_name="rows")(add(draw()), WEIGHTS[:, None])
  for leaf in jax.tree.leaves(result):
    assert len({np.asarray(copy).tobytes() for copy in leaf}) == 1


@pytest.mark.guarantees(
  "across_devices", "A device with a non-finite gradient is left out"
)
@pytest.mark.few(2)
@each_aggregator
@pytest.mark.parametrize(
  "value", [np.nan, pytest.param(-np.inf, marks=pytest.mark.slow)]
)
def test_a_device_that_is_not_finite_is_absent(name, value):
  rows = draw()
  expected, _ = stacked(name, rows, (np.arange(NUM_DEVICES) != 4).astype(np.float32))
  rows["w"][4, 1, 1] = value
  result, state = over_devices(name)(rows, np.ones(NUM_DEVICES, np.float32))
  close(result, expected)
  assert max(int(leaf) for leaf in jax.tree.leaves(state)) == 1


@pytest.mark.parametrize("name", ["geometric", "krum"])
def test_a_device_beyond_all_measure_is_absent(name):
  rows = draw()
  expected, _ = stacked(name, rows, (np.arange(NUM_DEVICES) != 4).astype(np.float32))
  rows["w"][4, 1, 1] = 3e38
  result, state = over_devices(name)(rows, np.ones(NUM_DEVICES, np.float32))
  close(result, expected)
  assert int(state.num_dropped) == 1


@pytest.mark.slow
def test_nobody_is_left():
  rows = jax.tree.map(lambda leaf: leaf * np.nan, draw())
  for name in AGGREGATORS:
    result, _ = over_devices(name)(rows, np.ones(NUM_DEVICES, np.float32))
    for leaf in jax.tree.leaves(result):
      np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def collectives(name, rows):
  """How many of each kind move an array of a leaf's size."""
  text = over_devices(name).lower(rows, WEIGHTS).compile().as_text()
  sizes = [leaf[0].size for leaf in jax.tree.leaves(rows)]
  found = {}
  for types, kind in re.findall(r" = (.*?) (all-\w+|reduce-\w+)(?:-start)?\(", text):
    if "all-" not in kind and "reduce-scatter" not in kind:
      continue
    shapes = re.findall(r"f32\[([\d,]*)\]", types)
    counts = {np.prod([int(d) for d in one.split(",") if d] or [1]) for one in shapes}
    if counts & {count * size for size in sizes for count in (1, NUM_DEVICES)}:
      found[kind] = found.get(kind, 0) + 1
  return found


@pytest.mark.guarantees(
  "across_devices", "A linear aggregator needs one psum of parameter size"
)
def test_collectives_are_as_promised():
  rows = draw()
  for name in ("mean", "sum", "regions"):
    assert collectives(name, rows) == {"all-reduce": 1}, name
  for name in ("max", "median", "trimmed"):
    assert collectives(name, rows) == {"all-gather": 2}, name
  for name in ("geometric", "krum", "multi-krum"):
    assert collectives(name, rows) == {"all-gather": 2, "all-reduce": 1}, name


@pytest.mark.guarantees("across_devices", "Gradients are gathered one leaf at a time")
@pytest.mark.slow
def test_leaves_are_gathered_one_by_one():
  """Twenty leaves of 64 kB: temporaries of a few leaves' members, not of twenty's."""
  leaf = 4 * 128 * 128 * NUM_DEVICES
  for name in ("median", "trimmed", "geometric", "krum"):
    rows = {str(i): jnp.ones([NUM_DEVICES, 128, 128]) for i in range(20)}
    lowered = sharded(each_device(name, "rows")).lower(rows, WEIGHTS)
    temporaries = lowered.compile().memory_analysis().temp_size_in_bytes
    # Besides, a copy of the device's own gradient, an eighth of the members.
    assert temporaries < 6 * leaf + 20 * leaf / NUM_DEVICES, name


def test_gradients_that_are_summed_already_are_refused():
  step = ranger.across_devices(ranger.aggregate_by_median(), "rows")

  def function(x):
    params = {"w": jnp.ones([3])}
    grads = jax.grad(lambda p: (p["w"] * x[0]).sum())(params)
    return step.update(grads, step.init(params))[0]

  with pytest.raises(ValueError, match=r"updates\['w'\] is the same over .* 'rows'"):
    sharded(function)(jnp.ones([NUM_DEVICES, 3]))


def test_gradients_stay_apart_where_the_parameters_are_marked():
  """The line of the docs: pcast, then the gradient, then across_devices."""
  x = np.random.default_rng(0).standard_normal([32, 3]).astype(np.float32)
  grad_fn = ranger.value_and_grad(
    lambda params, batch: (batch @ params - 1) ** 2, ranger.aggregate_by_mean()
  )
  median = ranger.aggregate_by_median()
  tx = optax.chain(
    ranger.across_devices(median, "rows"), ranger.accumulate(optax.sgd(0.1), 2)
  )
  params = np.ones(3, np.float32)

  def two_calls(x):
    apart = jax.lax.pcast(params, "rows", to="varying")
    _, grads = grad_fn(apart, x)
    _, state = tx.update(grads, tx.init(params), params)
    return tx.update(grads, state, params)[0]

  mesh = mesh_of(NUM_DEVICES)
  placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("rows")))
  gradient = jax.jit(lambda part: grad_fn(params, part)[1])
  members = np.stack([gradient(part) for part in np.split(x, NUM_DEVICES)])
  expected, _ = jax.jit(median.update)(members, median.init(params))
  close(sharded(two_calls)(placed), -0.1 * np.asarray(expected))


def test_weights_that_are_not_one_number_are_refused():
  function = each_device("mean", "rows")
  with pytest.raises(ValueError, match=r"weight must have shape \[\], got \[1\]"):
    sharded(lambda rows, weights: function(rows, weights[None]))(draw(), WEIGHTS)

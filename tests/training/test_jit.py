"""`train_step(partition="jit")`: how often gradients are reduced, and results."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from optax_ranger._gradients import evaluated
from tests.helpers import close_to_largest

N, WIDTH, CLASSES, WORDS = 128, 16, 4, 64
_RNG = np.random.default_rng(0)
BATCH = {
  "x": _RNG.standard_normal([N, 8, 8, 1]).astype(np.float32),
  "ids": _RNG.integers(0, WORDS, [N, 5]).astype(np.int32),
  "y": _RNG.integers(0, CLASSES, N).astype(np.int32),
}
# Entries of metrics, and of the row that replaces those that are not finite.
RIDE_ALONG = 8 + sum(leaf[0].size for leaf in BATCH.values())
EXPLICIT, AUTOMATIC = AxisType.Explicit, AxisType.Auto


@pytest.fixture(autouse=True)
def _promotion_of_foreign_code():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def mesh_of(kind=EXPLICIT, shape=(8,), names=("data",)):
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def normal(*shape):
  rng = np.random.default_rng(sum(shape))
  return (rng.standard_normal(shape) / np.sqrt(shape[-2])).astype(np.float32)


def cross_entropy(logits, batch):
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def dense():
  return {
    "hidden": normal(64, WIDTH),
    "bias": np.zeros(WIDTH, np.float32),
    "out": normal(WIDTH, CLASSES),
  }


def features(params, batch):
  return batch["x"].reshape(-1, 64) @ params["hidden"]


def dense_losses(params, batch):
  hidden = jnp.tanh(features(params, batch) + params["bias"])
  return cross_entropy(hidden @ params["out"], batch)


def normed_losses(params, batch):
  """A loss of the whole micro-batch, and statistics of it."""
  hidden = features(params, batch)
  mean, var = hidden.mean(axis=0), hidden.var(axis=0)
  hidden = jnp.tanh((hidden - mean) / jnp.sqrt(var + 1e-5) + params["bias"])
  losses = cross_entropy(hidden @ params["out"], batch)
  above = losses > losses.mean()
  return losses, {"mean": mean, "var": var, "above": above, "largest": losses.max()}


def dropped_losses(params, batch, key, scale):
  """One key for all devices, another one for each micro-batch."""
  hidden = jnp.tanh(features(params, batch) + params["bias"])
  hidden *= jax.random.bernoulli(key, 0.5, hidden.shape)
  return scale * cross_entropy(hidden @ params["out"], batch)


def words():
  return {"table": normal(WORDS, WIDTH), "out": normal(WIDTH, CLASSES)}


def indexed(table, ids):
  """As a model for explicit meshes looks up: the rows lie where the ids lie."""
  sharding = jax.typeof(ids).sharding
  if AxisType.Explicit in sharding.mesh.axis_types:
    return table.at[ids].get(out_sharding=sharding)
  return table[ids]


def word_losses(params, batch):
  hidden = indexed(params["table"], batch["ids"]).mean(axis=1)
  return cross_entropy(hidden @ params["out"], batch)


def plain_word_losses(params, batch):
  """JAX has no type for this lookup on an explicit mesh."""
  hidden = params["table"][batch["ids"]].mean(axis=1)
  return cross_entropy(hidden @ params["out"], batch)


class Network(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
    self.norm = nnx.LayerNorm(4, rngs=rngs)
    self.hidden = nnx.Linear(256, WIDTH, rngs=rngs)
    self.out = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1)
    return self.out(nnx.relu(self.hidden(x)))


@functools.cache
def split_network():
  return nnx.split(nnx.jit(Network)(), nnx.Param)


def network():
  return split_network()[1]


def network_losses(params, batch):
  model = nnx.merge(split_network()[0], params)
  return cross_entropy(model(batch["x"]), batch)


@functools.cache
def build(losses, num_micro_batches, *, tx=None, **options):
  tx = optax.sgd(0.5, momentum=0.9) if tx is None else tx
  return ranger.train_step(
    losses, tx, num_micro_batches=num_micro_batches, donate=False, **options
  )


def run(update, params, batch=BATCH, **extra):
  state = update.init(params)
  for _ in range(3):
    params, state, metrics = jax.block_until_ready(
      update(params, state, batch, **extra)
    )
  return params, metrics


def reduced(update, params, batch=BATCH, **extra):
  """Entries that all-reduces of a call add up: in loops, and outside of them."""
  lowered = update.lower(params, update.init(params), batch, **extra)
  found = [
    one for one in ranger.training.collectives(lowered) if one.kind == "all-reduce"
  ]
  inside = sum(one.num_bytes * one.count for one in found if one.count > 1)
  return inside / 4, sum(one.num_bytes for one in found if one.count == 1) / 4


def size_of(params):
  return sum(leaf.size for leaf in jax.tree.leaves(params))


KEY = {"key": jax.random.key(3), "scale": np.float32(2)}
NORMED = {"has_aux": True, "statistics": ("mean", "var")}
# Losses, parameters, extra args, options, and entries reduced in each micro-batch
# because JAX has no rule that would keep them apart.
MODELS = {
  "dense": (dense_losses, dense, {}, {}, WIDTH),
  # And sums of the losses: mean and variance of the features and their cotangents.
  "normed": (normed_losses, dense, {}, NORMED, None),
  "dropout": (dropped_losses, dense, KEY, {}, WIDTH),
  "words": (word_losses, words, {}, {}, 0),
  "network": (network_losses, network, {}, {}, 40 + 8 + WIDTH + CLASSES),
}


@pytest.mark.guarantees(
  "train_step", "One reduction of gradient size for any number of"
)
@pytest.mark.few(2)
@pytest.mark.parametrize("num_micro_batches", [1, 4, 16])
def test_gradients_are_reduced_once_on_an_explicit_mesh(num_micro_batches):
  """Of parameters in products; few sums with split rows are left in the loop."""
  params = dense()
  update = build(dense_losses, num_micro_batches, mesh=mesh_of(), partition="jit")
  inside, outside = reduced(update, params)
  left = 0 if num_micro_batches == 1 else WIDTH
  assert inside <= num_micro_batches * left
  assert size_of(params) - left <= outside <= size_of(params) + RIDE_ALONG
  alone = build(dense_losses, num_micro_batches)
  close_to_largest(run(update, params), run(alone, params))


@pytest.mark.parametrize("name", MODELS)
def test_models_on_an_explicit_mesh_equal_one_device(name):
  losses, start, extra, options, left = MODELS[name]
  params = start()
  update = build(losses, 4, mesh=mesh_of(), partition="jit", **options)
  inside, outside = reduced(update, params, **extra)
  if left is not None:
    assert inside <= 4 * left
    assert size_of(params) - left <= outside <= size_of(params) + RIDE_ALONG
  else:
    assert outside >= size_of(params) - WIDTH
  alone = build(losses, 4, **options)
  close_to_largest(run(update, params, **extra), run(alone, params, **extra))


def test_rows_that_are_padded_or_bad_do_not_count():
  batch = jax.tree.map(lambda leaf: leaf[:101].copy(), BATCH)
  batch["x"][7] = np.nan
  weights = np.arange(101, dtype=np.float32)
  update = build(dense_losses, 4, mesh=mesh_of(), partition="jit")
  found = run(update, dense(), batch, member_weights=weights)
  alone = run(build(dense_losses, 4), dense(), batch, member_weights=weights)
  close_to_largest(found, alone)
  assert int(found[1]["num_dropped"]) == 1


@pytest.mark.parametrize(
  ("shape", "names", "axis_name"),
  [
    ((4, 2), ("data", "more"), ("data", "more")),
    ((8, 1), ("data", "model"), "data"),
  ],
)
def test_rows_may_be_split_over_several_axes(shape, names, axis_name):
  mesh = mesh_of(EXPLICIT, shape, names)
  update = build(dense_losses, 4, mesh=mesh, partition="jit", axis_name=axis_name)
  inside, _ = reduced(update, dense())
  assert inside <= 4 * WIDTH
  close_to_largest(run(update, dense()), run(build(dense_losses, 4), dense()))


def test_gradients_of_half_precision_are_reduced_once():
  half = {name: leaf.astype(jnp.bfloat16) for name, leaf in dense().items()}

  def losses(params, batch):
    batch = {**batch, "x": batch["x"].astype(jnp.bfloat16)}
    return dense_losses(params, batch).astype(jnp.float32)

  update = build(losses, 4, mesh=mesh_of(), partition="jit")
  _, outside = reduced(update, half)
  # XLA's CPU compiler reduces in float32.
  assert outside <= size_of(half) + RIDE_ALONG
  close_to_largest(run(update, half), run(build(losses, 4), half), rtol=0.03)


SPLIT = {"hidden": (None, "data"), "bias": ("data",), "out": ("data",)}
TENSOR = {"hidden": (None, "model"), "bias": ("model",), "out": ("model",)}
TWO = ((4, 2), ("data", "model"))
# Losses, parameters, the mesh, and the axes over which parameters are split.
LEFT_TO_THE_COMPILER = {
  "automatic": (dense_losses, dense, (AUTOMATIC,), None),
  "no type": (plain_word_losses, words, (EXPLICIT,), None),
  "FSDP": (dense_losses, dense, (EXPLICIT,), SPLIT),
  "tensor parallel": (dense_losses, dense, (EXPLICIT, *TWO), TENSOR),
  # Here XLA has reduced unreduced gradients wrongly (openxla/xla #42481).
  "split words": (
    word_losses,
    words,
    (EXPLICIT, *TWO),
    {"table": ("model",), "out": ()},
  ),
  "axis not used": (word_losses, words, (EXPLICIT, *TWO), None),
}


@pytest.mark.parametrize("way", LEFT_TO_THE_COMPILER)
def test_other_gradients_are_reduced_as_the_compiler_does(way):
  """In every micro-batch, as the docs say; the result is that of one device."""
  losses, start, mesh, specs = LEFT_TO_THE_COMPILER[way]
  mesh, params = mesh_of(*mesh), start()
  if specs is not None:
    put = lambda leaf, spec: jax.device_put(
      leaf, NamedSharding(mesh, PartitionSpec(*spec))
    )
    params = {name: put(params[name], specs[name]) for name in params}
  update = build(losses, 4, mesh=mesh, partition="jit")
  inside, _ = reduced(update, params)
  assert inside >= 4 * size_of(start()) / 2
  close_to_largest(run(update, params), run(build(losses, 4), start()))


@pytest.mark.parametrize("kind", [EXPLICIT, AUTOMATIC])
def test_the_batch_is_not_gathered(kind):
  update = build(dense_losses, 1, mesh=mesh_of(kind), partition="jit")
  x = BATCH["x"].copy()
  x[: N // 4] = np.nan  # Two devices get the row of a third.
  batch = {**BATCH, "x": x}
  params = dense()
  lowered = update.lower(params, update.init(params), batch)
  found = ranger.training.collectives(lowered)
  assert sum(one.num_bytes * one.count for one in found) < x.nbytes / 2
  close_to_largest(
    run(update, params, batch), run(build(dense_losses, 1), params, batch)
  )


DTYPES = ("float32", "bfloat16", "complex64", "bool", "int8", "uint16", "int32")


@jax.jit
def replaced(finite, batch):
  replace = functools.partial(evaluated.replace_bad_rows, finite)
  return jax.tree.map(replace, batch)


@functools.cache
def on_devices():
  """The same, of rows split by the compiler, and how many bytes it sends."""
  split = NamedSharding(mesh_of(AUTOMATIC), PartitionSpec("data"))
  shapes = {
    name: jax.ShapeDtypeStruct([N, 64], jnp.dtype(name), sharding=split)
    for name in DTYPES
  }
  finite = jax.ShapeDtypeStruct([N], bool, sharding=split)
  step = jax.jit(replaced, out_shardings=split).lower(finite, shapes).compile()
  sent = sum(one.num_bytes for one in ranger.training.collectives(step))
  return lambda *args: step(*jax.device_put(args, split)), sent


@pytest.mark.parametrize("first", [0, 1, 77, N])
def test_rows_that_are_not_finite_get_the_first_finite_one(first):
  """Of any type, split by the compiler, where one row is sent; bit for bit."""
  finite = np.arange(N) >= first
  finite[first + 3 :: 5] = False

  def leaf(dtype):
    x, dtype = 100 * _RNG.standard_normal([N, 64]), jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
      x = x.clip(jnp.iinfo(dtype).min, jnp.iinfo(dtype).max)
    x = x.astype(dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
      x = np.where(finite[:, None], x, np.asarray(np.nan, dtype))
    return x

  batch = {dtype: leaf(dtype) for dtype in DTYPES}
  step, sent = on_devices()
  assert sent < 2 * sum(leaf[0].nbytes for leaf in batch.values()) + 1000
  found, alone = step(finite, batch), replaced(finite, batch)
  for dtype, leaf in batch.items():
    row = leaf[first] if first < N else np.zeros_like(leaf[0])
    expected = np.where(finite[:, None], leaf, row)
    np.testing.assert_array_equal(found[dtype], expected)
    np.testing.assert_array_equal(alone[dtype], expected)


def test_an_error_of_the_caller_is_seen():
  mean = lambda params, batch: dense_losses(params, batch).mean()
  update = build(mean, 4, mesh=mesh_of(), partition="jit")
  with pytest.raises(ValueError, match="must return losses of shape"):
    run(update, dense())


# A table whose gradient is a scattered sum, of numbers whose sums are exact.
IDS = np.tile(_RNG.integers(0, WORDS, [N // 8, 5]), (8, 1)).astype(np.int32)
COTANGENTS = (_RNG.integers(-8, 8, [N, 5, WIDTH]) / 16).astype(np.float32)
SCATTERED = {"ids": IDS, "ct": COTANGENTS}


def scattered_losses(params, batch, look_up=lambda table, ids: table[ids]):
  return (look_up(params, batch["ids"]) * batch["ct"]).sum(axis=(1, 2))


WAYS = {
  "one device": {},
  "shard_map": {"mesh": AUTOMATIC},
  "split state": {"mesh": AUTOMATIC, "shard_state": True},
  "on emission": {"mesh": AUTOMATIC, "reduce": "on_emission"},
  "jit": {"mesh": EXPLICIT, "partition": "jit"},
  "jit, split state": {"mesh": EXPLICIT, "partition": "jit", "shard_state": True},
  "jit, automatic": {"mesh": AUTOMATIC, "partition": "jit"},
  "jit, plain lookup": {"mesh": EXPLICIT, "partition": "jit"},
  "jit, split table": {"mesh": EXPLICIT, "partition": "jit"},
}


@pytest.mark.parametrize(
  "num_micro_batches", [2, pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("way", WAYS)
def test_scattered_gradients_add_up(way, num_micro_batches):
  """XLA has lost parts when it moved their reduction out of a loop (#49143).

  On TPUs only: so we look whether there is such a reduction to be moved, too.
  """
  options = dict(WAYS[way])
  if "mesh" in options:
    options["mesh"] = mesh_of(options["mesh"])
  plain = way in ("jit, plain lookup", "jit, split table")
  losses = scattered_losses
  if not plain and options.get("partition") == "jit":
    losses = functools.partial(scattered_losses, look_up=indexed)
  tx = ranger.accumulate(optax.sgd(float(N)), every=2)
  update = build(losses, num_micro_batches, tx=tx, **options)
  params = np.zeros([WORDS, WIDTH], np.float32)
  if way == "jit, split table":
    rows = NamedSharding(options["mesh"], PartitionSpec("data"))
    params = jax.device_put(params, rows)
  inside, _ = reduced(update, params, SCATTERED)
  left_in_loop = plain or way == "jit, automatic"
  assert inside == (num_micro_batches * WORDS * WIDTH if left_in_loop else 0)
  state = update.init(params)
  for _ in range(2):
    params, state, _ = update(params, state, SCATTERED)
  expected = np.zeros([WORDS, WIDTH])
  np.subtract.at(expected, IDS, COTANGENTS)
  np.testing.assert_array_equal(params, expected)

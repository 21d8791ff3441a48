"""One update on one device and on eight: the same numbers, and what is sent."""

import functools

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
from optax_ranger.training import _collectives
from optax_ranger.training import _placement
from tests.helpers import close_to_largest
from tests.laws import registry

NUM_EXAMPLES = 160
NUM_CLASSES = registry.NUM_CLASSES
_RNG = np.random.default_rng(0)
X = _RNG.standard_normal([NUM_EXAMPLES, 6]).astype(np.float32)
Y = (X @ _RNG.standard_normal([6, NUM_CLASSES])).argmax(axis=1).astype(np.int32)
Y[::5] = _RNG.integers(0, NUM_CLASSES, len(Y[::5]))
# One step each; further forms are the laws' business. `across_devices` takes
# gradients that are not reduced: tests/steps/test_devices.py.
STEPS = {
  case.factory: case
  for case in reversed(registry.CASES)
  if case.factory != "across_devices"
}
LINEAR = (
  "aggregate_by_mean",
  "aggregate_by_regions",
  "aggregate_by_sum",
  "aggregate_by_worst_regions",
  "average_neighbors",
  "ranger_head",
)


def mesh_of(kind=AxisType.Auto, shape=(8,), names=("data",)):
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def start():
  rng = np.random.default_rng(1)
  normal = lambda i, o: (rng.standard_normal([i, o]) / np.sqrt(i)).astype(np.float32)
  return {
    "hidden": normal(6, 16),
    "hidden_bias": np.zeros(16, np.float32),
    "out": normal(16, NUM_CLASSES),
    "out_bias": np.zeros(NUM_CLASSES, np.float32),
  }


def forward(params, x):
  features = jnp.tanh(x @ params["hidden"] + params["hidden_bias"][None])
  return features, features @ params["out"] + params["out_bias"][None]


def losses(params, batch):
  features, logits = forward(params, batch["x"])
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
  return losses, {
    "features": features,
    "predictions": jax.nn.softmax(logits),
    "accuracy": logits.argmax(axis=1) == batch["y"],
  }


def regularized_losses(params, batch, smoothed):
  values, aux = losses(params, batch)
  _, logits = forward(params, batch["x"])
  return values + ranger.labels.early_learning_regularizer(logits, smoothed), aux


def find_neighbors(features, y, smoothed):
  found = ranger.neighbors.nearest(features, 4)
  return ranger.neighbors.weigh(found, kernel="gaussian", labels=y, beliefs=smoothed)


def recipe(**options):
  tx = ranger.ranger(
    0.1,
    acceleration=1.0,
    every=2,
    ema_decay=0.9,
    num_examples=NUM_EXAMPLES,
    num_classes=NUM_CLASSES,
  )
  return ranger.train_step(
    regularized_losses,
    tx,
    step=ranger.ranger_head(),
    find_neighbors=find_neighbors,
    has_aux=True,
    **options,
  )


def batches(steps=20, size=24, seed=3, ragged=True):
  rng = np.random.default_rng(seed)
  for i in range(steps):
    rows = size - (3 if i % 4 == 3 else 1) if ragged else size
    ids = rng.permutation(NUM_EXAMPLES)[:rows].astype(np.int32)
    yield {"x": X[ids], "y": Y[ids]}, ids


def one_batch(size=24):
  return next(batches(1, size, ragged=False))


def train(update, steps=20, **options):
  params, metrics = start(), {}
  state = update.init(params)
  for batch, ids in batches(steps, **options):
    params, state, metrics = jax.block_until_ready(
      update(params, state, batch, example_ids=ids)
    )
  return params, state, metrics


def replicas_agree(tree):
  for leaf in jax.tree.leaves(tree):
    if leaf.sharding.is_fully_replicated:
      for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(leaf))


@pytest.fixture(autouse=True)
def _promotion_of_foreign_code():
  """Optax's own optimizers need the default promotion."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def alone(case, **options):
  """A training step with one step of the library, and what its calls need."""
  made = case.make()
  head, tx = (made, optax.sgd(0.05)) if case.members else (None, made)
  if case.factory == "average_neighbors":
    head = optax.chain(made, ranger.aggregate_by_mean())
  if case.factory in ("scale_by_ngs", "smooth_predictions"):
    tx = optax.chain(made, optax.sgd(0.05))
  if case.factory in ("smooth_by_ema", "smooth_by_lookahead"):
    tx = optax.chain(optax.sgd(0.05), made)
  if case.factory == "scale_by_window":
    tx = ranger.accumulate(optax.chain(optax.sgd(0.05), made), 2)
  update = ranger.train_step(losses, tx, step=head, has_aux=True, **options)
  params = start()
  state = update.init(params)
  for call, (batch, ids) in enumerate(batches()):
    extra = {"graph_weight": 0.7, "example_ids": ids % registry.NUM_EXAMPLES}
    if case.members:
      found = ranger.neighbors.nearest(batch["x"], 3)
      extra["neighbors"] = ranger.neighbors.weigh(found, kernel="gaussian")
      extra["regions"] = batch["y"] % 4
    extra.update({k: v for k, v in case.extra(call).items() if k == "weight"})
    params, state, _ = jax.block_until_ready(update(params, state, batch, **extra))
  return params, state


@pytest.mark.guarantees("train_step", "Parameters equal those of one device")
@pytest.mark.slow
@pytest.mark.parametrize("factory", sorted(STEPS))
@pytest.mark.parametrize(
  "kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"]
)
def test_devices_equal_one(factory, kind):
  """Each step alone, 20 updates; what is not linear over examples is left to jit."""
  case = STEPS[factory]
  manual = not case.members or factory in LINEAR
  options = {"mesh": mesh_of(kind), "partition": "shard_map" if manual else "jit"}
  params, state = alone(case, **options)
  expected, expected_state = alone(case)
  assert not np.allclose(expected["out"], start()["out"])
  close_to_largest(params, expected)
  close_to_largest(state, expected_state, rtol=1e-4)
  replicas_agree((params, state))


@pytest.fixture(scope="module")
def one_device():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    return train(recipe())


# They share a worker, and with it what one device gives.
with_one_device = pytest.mark.xdist_group("one_device")
WAYS = {
  "explicit-in-micro-batches": {"mesh": AxisType.Explicit, "num_micro_batches": 3},
  "split-state": {"mesh": AxisType.Explicit, "shard_state": True},
  "on-emission": {"mesh": AxisType.Auto, "reduce": "on_emission"},
  "jit": {"mesh": AxisType.Explicit, "partition": "jit", "num_micro_batches": 2},
}
SLOW_WAYS = {
  "micro-batches": {"num_micro_batches": 4},
  "shard_map": {"mesh": AxisType.Auto},
  "one-size": {"mesh": AxisType.Auto, "batch_size": 32},
  "explicit": {"mesh": AxisType.Explicit},
  "split-state-automatic": {"mesh": AxisType.Auto, "shard_state": True},
  "jit-automatic": {"mesh": AxisType.Auto, "partition": "jit"},
  "jit-split-state": {"mesh": AxisType.Auto, "partition": "jit", "shard_state": True},
  "jit-explicit-split-state": {
    "mesh": AxisType.Explicit,
    "partition": "jit",
    "shard_state": True,
  },
}


@jax.jit
def read(state, params):
  return ranger.smoothed_predictions(state), ranger.eval_params(state, params)


@pytest.mark.few(1)
@with_one_device
@pytest.mark.parametrize(
  "options",
  [
    *(pytest.param(options, id=name) for name, options in WAYS.items()),
    *(
      pytest.param(options, id=name, marks=pytest.mark.slow)
      for name, options in SLOW_WAYS.items()
    ),
  ],
)
def test_every_way_equals_one_device(options, one_device):
  """The whole recipe, neighbors found across devices, ragged batches."""
  options = dict(options)
  if "mesh" in options:
    options["mesh"] = mesh_of(options["mesh"])
  params, state, metrics = train(recipe(**options))
  close_to_largest(params, one_device[0])
  close_to_largest(metrics, one_device[2])
  close_to_largest(read(state, params), read(one_device[1], params))
  replicas_agree((params, state))


@pytest.mark.guarantees("train_step", "A batch size that is no multiple of devices and")
def test_uneven_batches_are_exact():
  """Weighted means over 13 examples of which one is bad, on eight devices."""
  step = lambda **options: ranger.train_step(
    losses, ranger.accumulate(optax.sgd(0.1), 2), has_aux=True, **options
  )
  weights = np.arange(13, dtype=np.float32)
  good = np.arange(13) != 4

  def run(update, rows):
    params = start()
    state = update.init(params)
    for first in (0, 20):
      x, y = X[first : first + 13].copy(), Y[first : first + 13]
      x[4] = np.nan if rows.all() else x[4]
      batch = {"x": x[rows], "y": y[rows]}
      params, state, metrics = update(
        params, state, batch, member_weights=weights[rows]
      )
    return params, metrics

  expected, _ = run(step(), good)
  mesh = mesh_of()
  for update in (step(mesh=mesh), step(mesh=mesh, num_micro_batches=2), step()):
    params, metrics = run(update, np.ones(13, bool))
    close_to_largest(params, expected)
    assert int(metrics["num_dropped"]) == 1
    assert float(metrics["weight"]) == weights[good].sum()


def test_one_size_of_batch_compiles_once():
  @chex.assert_max_traces(1)
  def counted(params, batch):
    return losses(params, batch)[0]

  update = ranger.train_step(counted, optax.sgd(0.1), mesh=mesh_of(), batch_size=24)
  params = start()
  state = update.init(params)
  for batch, _ in batches(5):
    params, state, _ = update(params, state, batch)


def lowered(update, size=48):
  params = start()
  batch, ids = one_batch(size)
  return update.lower(params, update.init(params), batch, example_ids=ids)


def num_bytes(found, least=0, **fields):
  return sum(
    one.num_bytes * one.count
    for one in found
    if one.num_bytes >= least
    and all(getattr(one, name) == value for name, value in fields.items())
  )


GRADIENT = sum(leaf.size for leaf in start().values()) * 4


@functools.cache
def plain(optimizer=None, **options):
  optimizer = optax.sgd(0.1) if optimizer is None else optimizer
  return ranger.train_step(losses, optimizer, has_aux=True, mesh=mesh_of(), **options)


@pytest.mark.guarantees(
  "train_step", "One reduction of gradient size for any number of"
)
@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_gradients_are_reduced_once(kind):
  """The same bytes for 1, 4 and 16 micro-batches, and one operation."""
  for num_micro_batches in (1, 4, 16):
    update = ranger.train_step(
      losses,
      optax.sgd(0.1),
      has_aux=True,
      mesh=mesh_of(kind),
      num_micro_batches=num_micro_batches,
    )
    found = ranger.training.collectives(lowered(update, size=128))
    large = [one for one in found if one.num_bytes >= GRADIENT // 2]
    assert [(one.kind, one.count) for one in large] == [("all-reduce", 1)]
    # Metrics and the loss may ride along.
    assert GRADIENT <= large[0].num_bytes <= GRADIENT + 32


def test_jit_reduces_in_every_micro_batch():
  """What the docs say of automatic meshes, and that loops are counted."""
  found = ranger.training.collectives(
    lowered(plain(partition="jit", num_micro_batches=4))
  )
  assert num_bytes(found, least=GRADIENT // 2, kind="all-reduce") >= 4 * GRADIENT


def test_a_split_state_is_scattered_and_gathered_once():
  tx = optax.sgd(0.1, momentum=0.9)
  update = plain(tx, shard_state=True)
  found = ranger.training.collectives(lowered(update))
  whole = GRADIENT - start()["out_bias"].nbytes  # four entries on eight devices
  assert num_bytes(found, kind="reduce-scatter") == whole
  sizes = [one.num_bytes for one in found]
  assert sizes == sorted(sizes, reverse=True)
  gathered = num_bytes(found, kind="all-gather")
  assert whole <= gathered <= whole + 48 * 8  # and weights, finiteness
  assert num_bytes(found, kind="all-reduce") < 100
  momentum = update.init(start()).optimizer[0].trace["hidden"]
  assert momentum.addressable_shards[0].data.size == momentum.size // 8


@pytest.mark.parametrize(
  ("shape", "spec", "dim"),
  [
    ((8, 16), (), 1),
    ((16, 8), (), 0),
    ((16, 16), (), 0),
    ((24, 30), (), 0),
    ((8, 0), (), 0),
    ((6,), (), None),
    ((), (), None),
    ((8, 16), (None, "model"), 0),
    ((8, 16), ("data",), None),
  ],
)
def test_a_leaf_of_a_split_state_is_split_along_its_longest_axis(shape, spec, dim):
  """Of those that the devices divide, and that are whole."""
  mesh = mesh_of(AxisType.Auto, (4, 2), ("data", "model"))
  places = _placement.Placement(mesh, "data", shard_state=True)
  whole = jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
  )
  assert places.split_dim(whole) == dim


@pytest.mark.parametrize("every", [1, 2])
def test_the_whole_ranger_with_a_split_state_sends_no_more(every):
  """It chooses between old and new parameters, and looks at parts of the kernel.

  The devices have equal shares of these parts, of 128 rows.
  """
  tx = ranger.ranger(0.1, every=every, ema_decay=0.9, skip_spikes=6.0)
  losses = lambda params, x: (x @ params["kernel"] + params["bias"][None]).sum(axis=1)
  update = ranger.train_step(losses, tx, mesh=mesh_of(), shard_state=True)
  params = {"kernel": jnp.zeros([1024, 96]), "bias": jnp.zeros([96])}
  state, x = update.init(params), np.ones([16, 1024], np.float32)
  found = ranger.training.collectives(update.lower(params, state, x))
  whole = 4 * (1024 * 96 + 96)
  assert num_bytes(found, kind="reduce-scatter") == whole
  assert whole <= num_bytes(found, kind="all-gather") < whole + 1000
  assert num_bytes(found, kind="all-reduce") < 1000
  assert {one.kind for one in found} == {"reduce-scatter", "all-gather", "all-reduce"}
  for leaf in jax.tree.leaves(state):
    assert leaf.size < 8 or leaf.addressable_shards[0].data.size == leaf.size // 8


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("{{0,1,2,3},{4,5,6,7}}", 4),
    ("[2,4]<=[8]", 4),
    ("mesh['data'=8] {'data'}", 8),
    ("mesh['data'=4,'model'=2] {'model','data'}", 8),
    ("mesh['data'=4,'model'=2] {'data'}", 4),
    ("mesh['data'=8] {'data':(1)2}", 2),
  ],
)
def test_groups_of_devices_are_read(groups, size):
  """As XLA has printed them in several releases."""
  line = f"%a = f32[2] reduce-scatter(%b), replica_groups={groups}, dimensions={{0}}"
  found = _collectives._num_bytes("f32[2]", line, "reduce-scatter", False)
  assert found == 2 * 4 * size


@pytest.mark.parametrize(
  ("result", "kind", "started", "size"),
  [
    ("bf16[3]{0}", "all-reduce", False, 6),
    ("(f32[2,3]{1,0}, pred[5]{0}, f8e4m3fn[4])", "all-reduce", False, 24 + 5 + 4),
    ("(f32[2], f64[])", "all-reduce", True, 16),
    ("(f32[2]{0}, f32[16]{0})", "all-gather", True, 64),
    ("((f32[2], s8[4]), (f32[16], s8[32]))", "all-gather", True, 64 + 32),
    ("(f32[9], f32[9], u32[], u32[])", "collective-permute", True, 36),
    ("(u32[], u32[], u32[], u32[])", "collective-permute", True, 4),
    ("(u32[], u32[])", "collective-permute", True, 4),
  ],
)
def test_bytes_are_read(result, kind, started, size):
  """Those of the result, where an asynchronous operation names its operands too."""
  assert _collectives._num_bytes(result, "", kind, started) == size


@pytest.mark.guarantees(
  "accumulate", "If each device of a jax.shard_map holds its own part of"
)
@pytest.mark.guarantees(
  "train_step", "One reduction of gradient size for any number of"
)
def test_a_call_that_emits_nothing_sends_scalars():
  tx = ranger.accumulate(optax.sgd(0.1), every=4)
  update = plain(tx, reduce="on_emission")
  found = ranger.training.collectives(lowered(update))
  assert num_bytes(found, conditional=1) == GRADIENT
  rest = [one for one in found if not one.conditional]
  assert max(one.num_bytes for one in rest if one.kind == "all-reduce") <= 64
  # Weights and finiteness of the examples are gathered, numbers of theirs.
  assert max(one.num_bytes for one in rest) <= 4 * 48


@pytest.mark.guarantees(
  "train_step", "All devices skip an update that is non-finite on one"
)
def test_a_device_that_fails_is_skipped_by_all():
  """An overflow inside the model on one device; the inputs are finite."""
  for options in ({}, {"reduce": "on_emission"}):
    one = lambda step: 1  # a function, so that there is an accumulator
    tx = ranger.accumulate(optax.sgd(0.1, momentum=0.9), one)

    def fails(params, batch):
      sane, aux = losses(params, batch)
      # Finite in value, with a gradient that is not.
      wild = jnp.sqrt(batch["wild"] * params["out"].sum() ** 2)
      return sane + jnp.where(batch["wild"] > 0, 0 * sane, wild), aux

    update = ranger.train_step(fails, tx, has_aux=True, mesh=mesh_of(), **options)
    params = start()
    state = update.init(params)
    for call, (batch, _) in enumerate(batches(3, ragged=False)):
      batch["wild"] = np.ones(24, np.float32)
      if call == 1:
        batch["wild"][7] = 0  # a row of the third device
      before = jax.tree.map(np.asarray, params)
      params, state, _ = update(params, state, batch)
      moved = not np.array_equal(before["out"], params["out"])
      assert moved == (call != 1)
    assert int(state.optimizer.num_left_out) == 1
    replicas_agree((params, state))


@pytest.mark.slow
@with_one_device
def test_pmap_equals_shard_map(one_device):
  """The whole recipe inside of the caller's own pmap; tables are whole there."""
  update = recipe(partition=None)
  reference = recipe(mesh=mesh_of())
  params, state = start(), recipe().init(start())
  spread = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), tree)
  split = lambda tree: jax.tree.map(lambda a: a.reshape(8, -1, *a.shape[1:]), tree)
  mapped = jax.pmap(
    lambda params, state, batch, ids: update(params, state, batch, example_ids=ids),
    axis_name="data",
  )
  params, state = spread((params, state))
  for batch, ids in batches(6, ragged=False):
    params, state, metrics = jax.block_until_ready(
      mapped(params, state, split(batch), split(ids))
    )
  expected, expected_state, expected_metrics = train(reference, 6, ragged=False)
  for device in (0, 7):
    own = lambda tree, device=device: jax.tree.map(lambda leaf: leaf[device], tree)
    close_to_largest(own(params), expected)
    close_to_largest(own(metrics), expected_metrics)
    close_to_largest(
      ranger.smoothed_predictions(own(state)),
      ranger.smoothed_predictions(expected_state),
    )


@pytest.mark.parametrize(
  ("kind", "partition"),
  [
    (AxisType.Auto, "shard_map"),
    pytest.param(AxisType.Auto, "jit", marks=pytest.mark.slow),
    pytest.param(AxisType.Explicit, "jit", marks=pytest.mark.slow),
  ],
)
def test_parameters_that_are_split_stay_split(kind, partition):
  """By the caller, over an axis of the mesh that examples are not split over."""
  mesh = mesh_of(kind, (4, 2), ("data", "model"))
  columns = NamedSharding(mesh, PartitionSpec(None, "model"))
  update = ranger.train_step(
    losses,
    ranger.ranger(0.1, acceleration=1.0, ema_decay=0.9),
    has_aux=True,
    mesh=mesh,
    partition=partition,
  )
  params = start()
  params["hidden"] = jax.device_put(params["hidden"], columns)
  state = update.init(params)
  for batch, _ in batches(5):
    params, state, _ = jax.block_until_ready(update(params, state, batch))
  single = ranger.train_step(
    losses,
    ranger.ranger(0.1, acceleration=1.0, ema_decay=0.9),
    has_aux=True,
    batch_size=24,
  )
  expected, expected_state = start(), single.init(start())
  for batch, _ in batches(5):
    expected, expected_state, _ = single(expected, expected_state, batch)
  close_to_largest(params, expected)
  close_to_largest(state, expected_state, rtol=1e-4)
  assert params["hidden"].sharding.is_equivalent_to(columns, 2)
  ema = ranger.eval_params(state, params)["hidden"]
  assert ema.addressable_shards[0].data.shape == (6, 8)


def test_batches_may_lie_anywhere():
  """NumPy, one device's, split already: the same update, and nothing is eaten."""
  update = plain()
  batch, _ = one_batch()
  rows = NamedSharding(mesh_of(), PartitionSpec("data"))
  results = []
  for place in (
    lambda leaf: leaf,
    jnp.asarray,
    lambda leaf: jax.device_put(leaf, jax.devices()[3]),
    lambda leaf: jax.device_put(leaf, rows),
  ):
    params = jax.tree.map(jnp.asarray, start())
    placed = jax.tree.map(place, batch)
    results.append(update(params, update.init(params), placed)[0])
    jax.tree.map(np.asarray, (params, placed))  # still there
  for result in results[1:]:
    close_to_largest(result, results[0], rtol=1e-7)


def test_parameters_and_state_are_donated():
  update = plain()
  batch, _ = one_batch()
  params, state, _ = update(start(), update.init(start()), batch)
  update(params, state, batch)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
  kept = plain(donate=False)
  params, state, _ = kept(start(), kept.init(start()), batch)
  kept(params, state, batch)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@with_one_device
def test_neighbors_on_other_devices_count(one_device):
  """Given as positions in the whole batch; each one lies on another device."""
  n = 24
  across = (np.arange(n) + n // 2)[:, None] % n
  # Another weight for each, so that no device has another's.
  weights = np.linspace(0.2, 1.0, n, dtype=np.float32)[:, None]
  neighbors = ranger.Neighbors(
    across.astype(np.int32), np.ones([n, 1], np.float32), weights
  )
  batch, _ = one_batch()
  run = lambda update: update(
    start(), update.init(start()), batch, neighbors=neighbors
  )[0]
  head = ranger.ranger_head(include_self=False)
  one = ranger.train_step(losses, optax.sgd(0.1), step=head, has_aux=True)
  close_to_largest(run(plain(step=head)), run(one))
  close_to_largest(run(plain(step=head, num_micro_batches=3)), run(one))


@pytest.mark.slow
def test_mapped_value_and_grad_in_micro_batches_needs_no_second_forward_pass():
  """Only neighbors that are found by what the model says need the model first."""
  cost = lambda update: lowered(update).compile().cost_analysis()["flops"]
  head = ranger.ranger_head()
  by_input = lambda x: ranger.neighbors.nearest(x, 4)
  by_features = lambda features: ranger.neighbors.nearest(features, 4)
  options = {"step": head, "num_micro_batches": 2}
  assert cost(plain(find_neighbors=by_input, **options)) < cost(
    plain(find_neighbors=by_features, **options)
  )


def test_refusals_of_train_step():
  mesh = mesh_of()
  build = lambda **options: ranger.train_step(losses, optax.sgd(0.1), **options)
  with pytest.raises(ValueError, match="partition must be one of"):
    build(partition="gspmd")
  with pytest.raises(ValueError, match="reduce must be one of"):
    build(reduce="late")
  with pytest.raises(TypeError, match="num_micro_batches"):
    build(num_micro_batches=2.0)
  with pytest.raises(ValueError, match="axis_name must be among"):
    build(mesh=mesh, axis_name="batch")
  with pytest.raises(ValueError, match="on_emission"):
    build(reduce="on_emission")
  with pytest.raises(ValueError, match="shard_state"):
    build(shard_state=True)
  with pytest.raises(ValueError, match="partition=None leaves"):
    build(partition=None, mesh=mesh)
  batch, ids = one_batch()
  update = plain()
  args = start(), update.init(start())
  with pytest.raises(ValueError, match="example_ids must have one row"):
    update(*args, batch, example_ids=ids[:3])
  with pytest.raises(ValueError, match="at least one array"):
    update(*args, {})
  with pytest.raises(ValueError, match="at least one example"):
    update(*args, jax.tree.map(lambda leaf: leaf[:0], batch))
  with pytest.raises(ValueError, match="needs accumulate"):
    plain(reduce="on_emission").init(start())
  lost = plain(step=ranger.ranger_head(), find_neighbors=lambda image: image)
  with pytest.raises(ValueError, match="asks for 'image'"):
    lost(start(), lost.init(start()), batch)
  seen = []

  def optional(x, image=None, **others):
    seen.append((image, others))
    return ranger.neighbors.nearest(x, 2)

  found = plain(step=ranger.ranger_head(), find_neighbors=optional)
  found.lower(start(), found.init(start()), batch)
  assert seen
  assert all(image is None and "y" in others for image, others in seen)
  small = plain(batch_size=16)
  with pytest.raises(ValueError, match="batch_size must hold the batch"):
    small(*args, batch)
  with pytest.raises(ValueError, match=r"a multiple of 8 rows .* got 28"):
    plain(batch_size=28)(*args, batch)
  with pytest.raises(TypeError, match="batch_size"):
    build(batch_size=24.0)
  wanting = ranger.train_step(regularized_losses, optax.sgd(0.1), has_aux=True)
  with pytest.raises(ValueError, match="takes smoothed="):
    wanting(start(), wanting.init(start()), batch)
  robust = plain(step=ranger.aggregate_by_median())
  with pytest.raises(ValueError, match="never leave their device"):
    robust(start(), robust.init(start()), batch)


def test_collectives_reads_loops_and_branches():
  step = jax.jit(
    jax.shard_map(
      _loop_and_branch,
      mesh=mesh_of(),
      in_specs=(PartitionSpec("data"), PartitionSpec()),
      out_specs=PartitionSpec(),
    )
  ).lower(jnp.zeros([8, 4]), True)
  found = ranger.training.collectives(step)
  assert ranger.training.Collective("all-reduce", 16, 5, False) in found
  assert ranger.training.Collective("all-reduce", 16, 1, True) in found
  assert ranger.training.Collective("all-reduce", 12, 1, 2) in found
  with pytest.raises(TypeError, match="got function"):
    ranger.training.collectives(_loop_and_branch)


def test_collectives_of_nested_loops_are_multiplied():
  def nested(x):
    add = lambda i, total: total + jax.lax.psum(x[0] * (1 + i), "data")
    inner = lambda _, total: jax.lax.fori_loop(0, 7, add, total)
    return jax.lax.fori_loop(0, 5, inner, jnp.zeros([4]))

  step = jax.jit(
    jax.shard_map(
      nested, mesh=mesh_of(), in_specs=PartitionSpec("data"), out_specs=PartitionSpec()
    )
  ).lower(jnp.zeros([8, 4]))
  found = ranger.training.collectives(step)
  assert ranger.training.Collective("all-reduce", 16, 35, False) in found


def _loop_and_branch(x, flag):
  own = x[0]
  add = lambda i, total: total + jax.lax.psum(own * (1 + i), "data")
  total = jax.lax.fori_loop(0, 5, add, jnp.zeros([4]))

  def inner():
    return total.at[:3].add(jax.lax.psum(own[:3], "data"))

  def outer():
    more = total + jax.lax.psum(own * 9, "data")
    return more + jax.lax.cond(more.sum() > 0, inner, lambda: total)

  return jax.lax.cond(flag, outer, lambda: total)


NORMAL = _RNG.standard_normal([16, 3]).astype(np.float32)


def dead_batch_update(tx):
  losses = lambda p, b: (b @ p["w"] - 1) ** 2
  update = ranger.train_step(losses, tx, donate=False)
  params = {"w": np.ones(3, np.float32)}
  return update, params, update.init(params)


@functools.cache
def after_a_dead_batch():
  """Parameters before and after, and metrics."""
  tx = optax.chain(ranger.scale_by_ngs(acceleration=1.0), optax.scale(-0.1))
  update, params, state = dead_batch_update(tx)
  for _ in range(3):
    params, state, _ = update(params, state, NORMAL)
  after, _, metrics = update(params, state, NORMAL * np.nan)
  return params, after, metrics


@pytest.mark.guarantees(
  "train_step", "A batch without a usable example changes only counters"
)
@pytest.mark.parametrize("what", ["params", "loss"])
def test_a_batch_without_a_finite_example_changes_nothing(what):
  params, after, metrics = after_a_dead_batch()
  if what == "params":
    np.testing.assert_array_equal(after["w"], params["w"])
  else:
    assert np.isnan(metrics["loss"])
    assert metrics["weight"] == 0


def test_a_batch_without_a_finite_example_leaves_a_plateau_alone():
  plateau = optax.contrib.reduce_on_plateau(patience=3, factor=0.1)
  with jax.numpy_dtype_promotion("standard"):
    update, params, state = dead_batch_update(optax.chain(optax.sgd(0.01), plateau))
    for i in range(40):
      batch = NORMAL * np.nan if i == 3 else NORMAL
      params, state, _ = update(params, state, batch)
  assert optax.tree.get(state, "scale") == 1


def test_complex_parameters_descend():
  losses = lambda p, b: jnp.abs(p["z"] - (1 + 2j)) ** 2 * b
  update = ranger.train_step(losses, optax.sgd(0.1))
  params = {"z": np.zeros((), np.complex64)}
  state = update.init(params)
  for _ in range(25):
    params, state, metrics = update(params, state, np.ones(2, np.float32))
  assert metrics["loss"] < 1e-3


def test_one_device_inside_the_caller_s_jit():
  update = ranger.train_step(lambda p, b: (b @ p["w"]) ** 2, optax.sgd(0.1))
  params = {"w": np.ones(3, np.float32)}
  batch = np.ones((4, 3), np.float32)
  inside, _, _ = jax.jit(update)(params, update.init(params), batch)
  outside, _, _ = update(params, update.init(params), batch)
  np.testing.assert_allclose(inside["w"], outside["w"], rtol=1e-6)


def test_a_table_of_predictions_is_split_over_devices():
  tx = optax.chain(ranger.smooth_predictions(16, 3), optax.sgd(0.1))
  update = ranger.train_step(
    lambda params, batch: (batch @ params) ** 2,
    tx,
    mesh=mesh_of(),
    row_args=("predictions",),
  )
  params, batch = np.ones(5, np.float32), np.ones([8, 5], np.float32)
  ids, predictions = np.arange(8, dtype=np.int32), np.full([8, 3], 1 / 3, np.float32)
  state = update.init(params)
  _, state, _ = update(params, state, batch, example_ids=ids, predictions=predictions)
  table = state.optimizer[0].smoothed
  assert {part.data.shape for part in table.addressable_shards} == {(2, 3)}

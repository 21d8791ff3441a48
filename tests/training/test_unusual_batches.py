"""`train_step`: batches without a usable example, statistics, keys, jit around it."""

import functools

import equinox as eqx
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
from tests.helpers import close
from tests.helpers import same

X = np.random.default_rng(0).standard_normal([16, 3]).astype(np.float32)
# Of NumPy, since arrays of JAX are gone once they were donated.
W = {"w": np.array([1, 2, 3], np.float32)}
WAYS = {
  "one device": {},
  "micro-batches": {"num_micro_batches": 4},
  "mesh": {"mesh": 8},
  "explicit mesh": {"mesh": 8, "kind": AxisType.Explicit},
  "compiler": {"mesh": 8, "partition": "jit"},
  "split state": {"mesh": 8, "shard_state": True},
  "on emission": {"mesh": 8, "reduce": "on_emission"},
}
each_way = pytest.mark.parametrize("way", WAYS)
OPTIMIZERS = {
  "sgd": lambda: optax.sgd(0.1, momentum=0.9),
  "ngs": lambda: optax.chain(ranger.scale_by_ngs(acceleration=1.0), optax.scale(-0.1)),
  "accumulate": lambda: ranger.accumulate(optax.sgd(0.1, momentum=0.9), 3),
  "ranger": lambda: ranger.ranger(0.1, acceleration=1.0, every=2, ema_decay=0.9),
  "radam": lambda: ranger.ranger_radam(0.1),
}


def losses(params, batch):
  return (batch @ params["w"] - 1) ** 2


@functools.cache
def optimizer_of(name):
  return OPTIMIZERS[name]()


@functools.cache
def build(way, optimizer, loss=losses, **options):
  """One of each kind, since each compiles programs of its own."""
  options = {**WAYS[way], **options}
  devices, kind = options.pop("mesh", 0), options.pop("kind", AxisType.Auto)
  if devices:
    options["mesh"] = jax.make_mesh((devices,), ("data",), axis_types=(kind,))
  return ranger.train_step(loss, optimizer, donate=False, **options)


def bad_batches():
  half = X.copy()
  half[::2], half[1::2] = np.nan, np.inf
  yield "NaN", X * np.nan, {}
  yield "NaN and inf", half, {}
  yield "weights of zero", X, {"member_weights": np.zeros(16, np.float32)}
  yield "losses overflow", X * np.float32(1e30), {}


@each_way
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_moves_without_a_usable_example(way, name):
  if way == "on emission" and name != "accumulate":
    pytest.skip("reduce='on_emission' needs accumulate(...)")
  update = build(way, optimizer_of(name))
  # With weights always, each optimizer is compiled once; one also goes without.
  given = {} if name == "sgd" else {"member_weights": np.ones(16, np.float32)}
  params, state = W, update.init(W)
  for _ in range(5):  # One more micro-batch would close the windows.
    params, state, _ = update(params, state, X, **given)
  for kind, batch, extra in bad_batches():
    after, new_state, metrics = update(params, state, batch, **{**given, **extra})
    same(after, params)
    same(new_state.optimizer, state.optimizer)
    metrics = jax.device_get(metrics)
    assert np.isnan(metrics["loss"]), kind
    assert metrics["weight"] == 0
    assert metrics["num_dropped"] == (0 if extra else 16)
  # One usable example is enough.
  batch = X.copy()
  batch[1:] = np.nan
  after, _, metrics = jax.device_get(update(params, state, batch, **given))
  assert metrics["weight"] == 1
  assert np.isfinite(metrics["loss"])
  assert np.isfinite(after["w"]).all()


def test_weight_decay_outside_of_a_window_moves_nothing_either():
  tx = optax.chain(
    ranger.accumulate(optax.sgd(1.0), every=2), optax.add_decayed_weights(-0.1)
  )
  update = ranger.train_step(lambda params, batch: params * batch, tx)
  for x, moves in ((1, True), (np.nan, False)):
    params = np.ones(1, np.float32)
    new, _, _ = update(params, update.init(params), np.full(4, x, np.float32))
    assert (np.asarray(new) != params) == moves


def test_an_optimizer_whose_state_changes_its_type():
  def count(updates, state, params=None):
    del params
    return updates, state + 0.5

  tx = optax.GradientTransformation(lambda params: jnp.int32(1), count)
  update = ranger.train_step(losses, tx, donate=False)
  with jax.numpy_dtype_promotion("standard"):
    for batch, expected in ((X, 1.5), (X * np.nan, 1)):
      params, state, _ = update(W, update.init(W), batch)
      assert state.optimizer == expected
      assert np.array_equal(params["w"], W["w"]) == (expected == 1)


FEW = X[:4]  # The median of more takes long to trace.


def test_a_step_that_is_not_linear_moves_nothing_either():
  update = ranger.train_step(
    losses, optax.adam(0.1), step=ranger.aggregate_by_median(), donate=False
  )
  with jax.numpy_dtype_promotion("standard"):
    state = update.init(W)
    params, state, _ = update(W, state, FEW)
    after, new_state, metrics = update(params, state, FEW * np.nan)
  same((after, new_state.optimizer), (params, state.optimizer))
  assert int(new_state.step.num_dropped) == 4
  assert np.isnan(metrics["loss"])


def test_examples_with_bad_gradients_are_not_usable_where_they_are_apart():
  """Finite losses whose gradients are not: a root at zero."""
  loss = lambda params, batch: jnp.sqrt(jnp.abs(batch @ params["w"]))
  update = ranger.train_step(
    loss, optax.sgd(0.1, momentum=0.9), step=ranger.aggregate_by_median(), donate=False
  )
  params, state, _ = update(W, update.init(W), FEW)
  after, new_state, metrics = update(params, state, 0 * FEW)
  same((after, new_state.optimizer), (params, state.optimizer))
  assert np.isnan(metrics["loss"])
  assert metrics["weight"] == 0
  assert metrics["num_dropped"] == 4


@pytest.mark.parametrize("step", [None, ranger.aggregate_by_mean()])
@pytest.mark.parametrize("way", ["one device", "micro-batches", "mesh", "compiler"])
def test_a_loss_that_ruins_the_gradient_moves_nothing(way, step):
  """Its derivative isn't finite either: the rows of its device are not usable."""
  loss = lambda params, batch: jnp.log(batch[:, 0]) * params["w"].sum()
  update = build(way, optax.sgd(0.1, momentum=0.9), loss, step=step)
  good = np.abs(X) + 1
  bad = np.concatenate([-good[:1], good[1:]])
  params, state, _ = update(W, update.init(W), good)
  after, new_state, metrics = update(params, state, bad)
  assert np.isfinite(after["w"]).all()
  assert metrics["num_dropped"] == (2 if way == "mesh" else 16)
  assert metrics["weight"] == (14 if way == "mesh" else 0)
  if way != "mesh":
    same((after, new_state.optimizer), (params, state.optimizer))
  elif step is None:
    expected, _, _ = update(
      params, state, good, member_weights=(np.arange(16) > 1) * np.float32(1)
    )
    close(after, expected)


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("step", [None, ranger.aggregate_by_mean()])
def test_a_loss_that_is_infinite_by_itself_has_weight_zero(step, num_micro_batches):
  """Its gradient, which is finite, does not count."""
  x = np.array([[1, 2], [6, 1], [3, 4], [1, 1]], np.float32)

  def losses(params, batch):
    return (params[None] * batch).sum(axis=1) + jnp.where(batch[:, 0] > 5, jnp.inf, 0)

  update = ranger.train_step(
    losses, optax.sgd(1.0), step=step, num_micro_batches=num_micro_batches
  )
  params = np.zeros(2, np.float32)
  params, _, metrics = update(params, update.init(params), x)
  # With a step, micro-batches are weighed before all losses are known.
  count = 4 if step and num_micro_batches > 1 else 3
  np.testing.assert_allclose(params, [-5 / count, -7 / count], rtol=1e-6)
  assert metrics["weight"] == 3
  assert metrics["num_dropped"] == 1


@pytest.mark.few(2)
@pytest.mark.parametrize(
  "step",
  [
    ranger.aggregate_by_mean(),
    ranger.aggregate_by_sum(),
    ranger.aggregate_by_median(),
    ranger.aggregate_by_geometric_median(),
  ],
  ids=["mean", "sum", "median", "geometric median"],
)
def test_value_and_grad_gives_zero_and_counts(step):
  """The caller compares the counter with the number of examples."""
  grad_fn = jax.jit(ranger.value_and_grad(losses, step))
  _, grads, state = grad_fn(W, X * np.nan, state=step.init(W))
  np.testing.assert_array_equal(grads["w"], 0)
  assert int(state.num_dropped) == len(X)


def test_micro_batches_without_a_usable_example_are_a_window_of_weight_zero():
  grad_fn = jax.value_and_grad(lambda params, batch: losses(params, batch).mean())
  _, grads, report = jax.jit(ranger.micro_batched(grad_fn, 4))(W, X * np.nan)
  np.testing.assert_array_equal(grads["w"], 0)
  assert float(report.weight) == 0
  tx = ranger.ranger(0.1, acceleration=1.0, ema_decay=0.9)
  state = tx.init(W)
  updates, _ = jax.jit(tx.update)(grads, state, W, weight=report.weight)
  np.testing.assert_array_equal(updates["w"], 0)


def test_scalars_beside_a_window_advance_with_usable_batches():
  """A counter of calls stays where it is if nothing of a batch is usable."""
  optimizer = optax.chain(
    ranger.accumulate(optax.sgd(0.1), 2), optax.scale_by_schedule(lambda count: 1.0)
  )
  update = build("one device", optimizer)
  params, state = W, update.init(W)
  for batch, count in ((X, 1), (X * np.nan, 1), (X, 2)):
    params, state, _ = update(params, state, batch)
    assert optax.tree.get(state, "count") == count


# Statistics


def with_statistics(params, batch, stats=None):
  values = losses(params, batch)
  mean = {"mean": batch.mean(axis=0), "seen": jnp.int32(batch.shape[0])}
  return values, {"stats": mean, "right": values < 1, "largest": jnp.abs(batch).max()}


@pytest.mark.parametrize("way", ["one device", "micro-batches", "mesh", "split state"])
def test_statistics_come_back(way):
  update = build(
    way, optax.sgd(0.1), with_statistics, has_aux=True, statistics=("stats",)
  )
  _, _, metrics = update(W, update.init(W), X)
  np.testing.assert_allclose(metrics["stats"]["mean"], X.mean(axis=0), atol=1e-6)
  assert metrics["stats"]["mean"].shape == (3,)
  assert metrics["stats"]["seen"] == 16  # added up, not averaged
  assert metrics["stats"]["seen"].dtype == jnp.int32
  right = (losses(W, X) < 1).mean()
  np.testing.assert_allclose(metrics["right"], right, rtol=1e-6)
  assert metrics["largest"].shape == ()


@pytest.mark.parametrize("rows", [8, pytest.param(12, marks=pytest.mark.slow), 16])
def test_statistics_are_told_from_rows_by_their_name(rows):
  """Whatever their length: four features, micro-batches of two, three and four rows."""
  batch = np.random.default_rng(1).standard_normal([rows, 4]).astype(np.float32)
  first = batch[0, 0]
  loss = lambda params, batch: (
    (batch @ params["w"]) ** 2,
    {
      "mean": batch.mean(axis=0),
      "half": jnp.bfloat16(batch.mean(axis=0)),
      "has_first": (batch == first).any(),
    },
  )
  update = ranger.train_step(
    loss,
    optax.sgd(0.1),
    has_aux=True,
    statistics=("mean", "half"),
    num_micro_batches=4,
    donate=False,
  )
  params = {"w": np.ones(4, np.float32)}
  _, _, metrics = update(params, update.init(params), batch)
  np.testing.assert_allclose(metrics["mean"], batch.mean(axis=0), atol=1e-6)
  assert metrics["has_first"] == 0.25  # true and false become a share
  assert metrics["half"].dtype == jnp.bfloat16
  half = np.asarray(metrics["half"]).astype(np.float32)
  close(half, metrics["mean"], rtol=0.02, atol=0.01)


def test_statistics_weigh_as_their_examples_do():
  update = build(
    "micro-batches",
    optax.sgd(0.1),
    with_statistics,
    has_aux=True,
    statistics=("stats",),
  )
  weights = np.where(np.arange(16) % 4 == 0, 3, 0).astype(np.float32)
  weights[4] = 1
  _, _, metrics = update(W, update.init(W), X, member_weights=weights)
  # Every fourth row is one micro-batch.
  np.testing.assert_allclose(metrics["stats"]["mean"], X[::4].mean(axis=0), atol=1e-6)
  assert metrics["stats"]["seen"] == 4
  own = (X @ W["w"] - 1) ** 2
  np.testing.assert_allclose(
    metrics["loss"], np.average(own, weights=weights), rtol=1e-5
  )
  right = np.average(own < 1, weights=weights)
  np.testing.assert_allclose(metrics["right"], right, rtol=1e-5)


def test_statistics_stay_without_a_usable_example():
  update = build(
    "mesh", optax.sgd(0.1), with_statistics, has_aux=True, statistics=("stats",)
  )
  before = {"mean": jnp.asarray([7.0, 8.0, 9.0]), "seen": jnp.int32(5)}
  _, _, metrics = update(W, update.init(W), X * np.nan, stats=before)
  same(metrics["stats"], before)


# Keys


@pytest.mark.few(2)
@pytest.mark.parametrize("num_micro_batches", [1, 2, 4])
def test_micro_batches_draw_their_own_noise(num_micro_batches):
  """An array of keys is the user's own affair."""

  def loss(params, batch, key, keys):
    draw = lambda key: jax.random.uniform(key, [])
    return losses(params, batch) + draw(key) + draw(keys[1]), {}

  options = {"has_aux": True, "num_micro_batches": num_micro_batches}
  update = ranger.train_step(loss, optax.sgd(0.1), **options)
  key, both = jax.random.key(3), jax.random.split(jax.random.key(4))
  _, _, metrics = update(W, update.init(W), X, key=key, keys=both)
  keys = [jax.random.fold_in(key, i) for i in range(num_micro_batches)]
  keys = [key] if num_micro_batches == 1 else keys
  expected = losses(W, X).mean() + np.mean(
    [jax.random.uniform(one, []) for one in keys]
  )
  expected = expected + jax.random.uniform(both[1], [])
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("devices", [2, 8])
def test_devices_draw_their_own_noise(devices):
  def loss(params, batch, key):
    return losses(params, batch) + jax.random.uniform(key, []), {}

  mesh = jax.make_mesh((devices,), ("data",))
  update = ranger.train_step(loss, optax.sgd(0.1), has_aux=True, mesh=mesh)
  key = jax.random.key(3)
  _, _, metrics = update({**W}, update.init(W), X, key=key)
  draws = [jax.random.uniform(jax.random.fold_in(key, i), []) for i in range(devices)]
  expected = np.mean(losses(W, X)) + np.mean(draws)
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


# Compiled by others


def test_inside_of_jit_scan_and_vmap():
  update = build("one device", optimizer_of("accumulate"))
  params, state = W, update.init(W)
  for _ in range(4):
    params, state, metrics = update(params, state, X)
  compiled = jax.jit(lambda params, state: update(params, state, X)[:2])
  here = (W, update.init(W))
  for _ in range(4):
    here = compiled(*here)
  np.testing.assert_allclose(here[0]["w"], params["w"], rtol=1e-6)

  def body(carry, batch):
    params, state, metrics = update(*carry, batch)
    return (params, state), metrics["loss"]

  start = (W, update.init(W))
  (scanned, _), found = jax.lax.scan(body, start, np.stack([X] * 4))
  np.testing.assert_allclose(scanned["w"], params["w"], rtol=1e-6)
  np.testing.assert_allclose(found[-1], metrics["loss"], rtol=1e-5)
  many = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf, -leaf]), W)
  states = jax.vmap(update.init)(many)
  for _ in range(4):
    many, states, _ = jax.vmap(update, (0, 0, None))(many, states, X)
  np.testing.assert_allclose(many["w"][0], params["w"], rtol=1e-5)


def test_smoothed_parameters_of_many_models():
  tx = optax.chain(optax.sgd(0.1), ranger.smooth_by_ema(0.5))
  many = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
  many["b"] = np.arange(2, dtype=np.float32)
  states = jax.jit(jax.vmap(tx.init))(many)
  _, states = jax.jit(jax.vmap(tx.update))(many, states, many)
  expected = jax.jit(jax.vmap(ranger.eval_params))(states, many)
  found = jax.jit(ranger.eval_params)(states, many)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected
  )
  with pytest.raises(ValueError, match="pass the parameters that it was made for"):
    ranger.eval_params(states, jax.tree.map(lambda leaf: leaf[0], many))


@functools.cache
def register_optax():
  """Optax leaves that to its users; our states are registered."""
  for kind in (optax.EmptyState, optax.TraceState, optax.MaskedState):
    name = f"optax.{kind.__name__}"
    export.register_namedtuple_serialization(kind, serialized_name=name)


@pytest.mark.few(1)
@pytest.mark.parametrize(
  "step", [None, ranger.aggregate_by_mean()], ids=["mean", "step"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exported_for_any_number_of_examples(name, step):
  register_optax()
  update = ranger.train_step(losses, OPTIMIZERS[name](), step=step)
  state = update.init(W)
  rows = jax.ShapeDtypeStruct(export.symbolic_shape("rows, 3"), jnp.float32)
  exported = export.export(jax.jit(lambda *args: update(*args)))(W, state, rows)
  for n in (2, 16):
    close(
      exported.call(W, state, X[:n]),
      update(W, update.init(W), X[:n]),
      rtol=1e-6,
      atol=0,
    )


@pytest.mark.few(2)
@pytest.mark.parametrize("name", [*OPTIMIZERS, "predictions", "guard"])
def test_exported(name):
  """State and step go through ``jax.export``, bytes and back."""
  more = {
    "predictions": lambda: optax.chain(
      ranger.smooth_predictions(20, 2), optax.sgd(0.1)
    ),
    "guard": lambda: ranger.skip_nonfinite(ranger.skip_anomalies(optax.sgd(0.1))),
  }
  register_optax()
  tx = {**OPTIMIZERS, **more}[name]()
  update = ranger.train_step(losses, tx, step=ranger.aggregate_by_mean())
  step = jax.jit(lambda params, state, batch: update(params, state, batch))
  extra = {}
  if name == "predictions":
    loss = lambda params, batch: (
      losses(params, batch),
      {"predictions": jnp.full([batch.shape[0], 2], 0.5)},
    )
    update = ranger.train_step(loss, tx, has_aux=True)
    step = jax.jit(
      lambda params, state, batch: update(
        params, state, batch, example_ids=jnp.arange(16)
      )
    )
  state = update.init(W)
  blob = export.export(step)(W, state, X).serialize()
  again = export.deserialize(bytearray(blob))
  found = again.call(W, state, X)
  expected = step(W, state, X, **extra)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  close(found, expected, rtol=1e-6, atol=0)


def test_lowered_for_abstract_arrays():
  """Without values; the program is the same."""
  update = build("on emission", ranger.accumulate(optax.sgd(0.1), 2))
  args, ids = (W, update.init(W), X[:13]), np.arange(13)
  shapes = lambda tree: jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))
  found = update.lower(*shapes(args), example_ids=shapes(ids))
  expected = update.lower(*args, example_ids=ids).as_text()
  assert found.as_text() == expected
  alone = build("one device", ranger.accumulate(optax.sgd(0.1), 2)).init(W)
  found = update.lower(W, shapes(alone), X[:13], example_ids=ids)
  assert found.as_text() == expected


# Extra args of the optimizer


@pytest.mark.parametrize("over", ["examples", "tasks"])
def test_weight_and_value_are_those_that_are_passed(over):
  """Where they are not, the sum of weights and the loss."""

  def tell(updates, state, params=None, *, weight, value, **extra_args):
    del state, params, extra_args
    return updates, jax.tree.map(jnp.float32, {"weight": weight, "value": value})

  zeros = {"weight": jnp.float32(0), "value": jnp.float32(0)}
  told = optax.GradientTransformationExtraArgs(lambda params: zeros, tell)
  loss, options = losses, {}
  if over == "tasks":
    loss = lambda params, batch: jnp.stack([losses(params, batch).mean()] * 2)
    options = {"over": "tasks", "step": ranger.aggregate_by_mean()}
  update = build("one device", told, loss, **options)
  for given in ({}, {"weight": 5.0, "value": 0.5}):
    _, state, metrics = update(W, update.init(W), X, **given)
    found = {"weight": metrics["weight"], "value": metrics["loss"]}
    close(state.optimizer, jax.tree.map(jnp.float32, {**found, **given}))


def test_items_of_aux_and_the_key_reach_the_optimizer():
  """Rows in their order, the mean of a statistic, the key as it was given."""

  def tell(updates, state, params=None, *, rows, mean, key, **extra_args):
    del state, params, extra_args
    return updates, {"rows": rows, "mean": mean, "key": jax.random.key_data(key)}

  key = jax.random.key(5)
  zeros = {"rows": np.zeros(16, np.float32), "mean": np.zeros(3, np.float32)}
  zeros["key"] = jax.random.key_data(key)
  told = optax.GradientTransformationExtraArgs(lambda params: zeros, tell)
  loss = lambda params, batch, key: (
    losses(params, batch),
    {"rows": batch[:, 0], "mean": batch.mean(axis=0)},
  )
  update = build("micro-batches", told, loss, has_aux=True, statistics=("mean",))
  _, state, _ = update(W, update.init(W), X, key=key)
  expected = {"rows": X[:, 0], "mean": X.mean(axis=0), "key": zeros["key"]}
  close(state.optimizer, expected)


def test_in_a_mapping_of_the_caller():
  """Two devices, uneven weights, one bad row: as on one device."""
  loss = lambda params, batch, scale: scale * losses(params, batch)
  options = {"row_args": ("scale",), "donate": False}
  weights, scale = np.arange(32, dtype=np.float32).reshape(2, 16)
  batch = X.copy()
  batch[2] = np.nan
  one = ranger.train_step(loss, optax.sgd(0.01), **options)
  expected = one(W, one.init(W), batch, member_weights=weights, scale=scale)
  update = ranger.train_step(
    loss, optax.sgd(0.01), partition=None, axis_name="rows", **options
  )
  mapped = jax.pmap(
    lambda batch, weights, scale: update(
      W, update.init(W), batch, member_weights=weights, scale=scale
    ),
    axis_name="rows",
    devices=jax.devices()[:2],
  )
  cut = lambda leaf: leaf.reshape(2, 8, *leaf.shape[1:])
  found = mapped(cut(batch), cut(weights), cut(scale))
  for device in (0, 1):
    close(jax.tree.map(lambda leaf, i=device: leaf[i], found), expected)
  assert expected[2]["num_dropped"] == 1


# Refusals


def test_refusals_name_what_to_do():
  update = ranger.train_step(losses, optax.sgd(0.1))
  state = update.init(W)
  with pytest.raises(ValueError, match=r"value_fn= is a function.*line search"):
    update(W, state, X, value_fn=lambda params: 0.0)
  with pytest.raises(TypeError, match=r"params\['w'\] must be an array, got 1.0"):
    update.init({"w": 1.0})
  model = eqx.filter_eval_shape(eqx.nn.MLP, 3, 1, 4, 1, key=jax.random.key(0))
  with pytest.raises(TypeError, match=r"is a function.*equinox.filter"):
    update.init(model)
  with pytest.raises(
    TypeError, match=r"member_weight=; did you mean member_weights=\?"
  ):
    update(W, state, X, member_weight=np.ones(16))
  with pytest.raises(TypeError, match=r"weights=; did you mean weight=\?"):
    update(W, state, X, weights=1.0)
  update.lower(W, update.init(W), X, something_of_the_optimizer=1.0)
  tables = optax.chain(*[ranger.smooth_predictions(16, 2)] * 2, optax.sgd(0.1))
  update = ranger.train_step(
    lambda params, batch, smoothed: losses(params, batch), tables
  )
  with pytest.raises(ValueError, match="two states that keep smoothed="):
    update(W, update.init(W), X, example_ids=np.arange(16))


def test_models_and_states_from_elsewhere_are_refused():
  update = ranger.train_step(losses, optax.sgd(0.1, momentum=0.9))
  with pytest.raises(TypeError, match=r"an NNX model: pass nnx.state\("):
    update.init(nnx.Linear(3, 1, rngs=nnx.Rngs(0)))
  state = update.init(W)
  for other in (state._asdict(), list(state), state.optimizer):
    with pytest.raises(TypeError, match="train_step needs a TrainStepState"):
      update(W, other, X)


# Complex parameters and double precision


@pytest.mark.few(3)
@pytest.mark.parametrize("way", ["one device", "micro-batches", "mesh", "split state"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 8)])
def test_complex_parameters_descend_as_their_parts_do(way, shape):
  """As real and imaginary parts of their own would, whatever the optimizer."""
  rng = np.random.default_rng(0)
  goal = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
  goal = goal.astype(np.complex64)
  batch = np.linspace(0.5, 1.5, 16).astype(np.float32)
  square = lambda z: (z.real**2 + z.imag**2).sum()
  loss = lambda params, batch: square(params["z"] - goal) * batch
  join = lambda params: {"z": jax.lax.complex(params["x"], params["y"])}
  parts = lambda params, batch: loss(join(params), batch)
  tx = optax.sgd(0.1, momentum=0.5)
  params = {"z": np.zeros(shape, np.complex64)}
  split = {"x": np.zeros(shape, np.float32), "y": np.zeros(shape, np.float32)}
  update, by_parts = build(way, tx, loss), build(way, tx, parts)
  state, split_state = update.init(params), by_parts.init(split)
  for _ in range(10):
    params, state, metrics = update(params, state, batch)
    split, split_state, _ = by_parts(split, split_state, batch)
  expected = np.asarray(split["x"]) + 1j * np.asarray(split["y"])
  np.testing.assert_allclose(params["z"], expected, rtol=1e-4, atol=1e-5)
  assert metrics["loss"] < square(goal) / 10


@pytest.mark.few(1)
@pytest.mark.parametrize("step", [ranger.aggregate_by_mean(), ranger.ranger_head()])
def test_value_and_grad_of_complex_parameters_is_that_of_jax(step):
  loss = lambda params, batch: jnp.abs(params * batch - 1) ** 2
  batch = np.array([1, 2, 3], np.complex64)
  nearest = np.array([[1, 2], [0, 2], [1, 0]], np.int32)
  distances = np.array([[1, 2], [1, 1], [1, 2]], np.float32)
  halves = np.full([3, 2], 0.5, np.float32)
  extra = {"neighbors": ranger.Neighbors(nearest, distances, halves)}
  params = np.array([0.3 + 0.4j], np.complex64)

  @jax.jit
  def both(params, batch, extra):
    _, found = ranger.value_and_grad(loss, step)(params, batch, **extra)
    weights = ranger.example_weights(step, 3, **extra)
    total = lambda params: (weights * loss(params, batch)).sum()
    return found, jax.grad(total)(params)

  found, expected = both(params, batch, extra)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.few(3)
@pytest.mark.parametrize("way", ["one device", "micro-batches", "mesh", "split state"])
@pytest.mark.parametrize("head", [None, "mean", "neighbors", "regions"])
def test_float64_keeps_its_digits(way, head):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(16, 3)), rng.normal(size=3)
  extra, step, weights = {}, None, np.full(16, 1 / 16)
  with jax.enable_x64(True):
    if head == "mean":
      given = rng.uniform(size=16)
      extra, step = {"member_weights": given}, ranger.aggregate_by_mean()
      weights = given / given.sum()
    if head == "regions":
      regions = np.arange(16) % 3
      extra, step = {"regions": regions}, ranger.aggregate_by_regions(3)
      weights = 1 / (3 * np.bincount(regions)[regions])
    if head == "neighbors":
      indices = (np.arange(16)[:, None] + np.arange(1, 4)) % 16
      own = rng.uniform(size=(16, 3))
      extra = {"neighbors": ranger.Neighbors(indices, np.ones([16, 3]), own)}
      step = ranger.ranger_head()
      weights = own.sum(axis=1)
      np.add.at(weights, indices, own)
      weights /= weights.sum()
    tx = optax.sgd(1.0)
    update = build(way, tx, lambda w, batch: (batch @ w - 1) ** 2, step=step)
    params = jnp.asarray(w)
    found, _, metrics = update(params, update.init(params), x, **extra)
  gradient = 2 * x.T @ (weights * (x @ w - 1))
  np.testing.assert_allclose(w - np.asarray(found), gradient, rtol=2e-14, atol=1e-15)
  assert metrics["loss"].dtype == np.float64


@pytest.mark.parametrize("way", ["one device", "mesh", "compiler"])
def test_wide_ids_and_labels_never_wrap(way):
  loss = lambda params, batch: (
    losses(params, batch),
    {"predictions": jnp.full([batch.shape[0], 2], 0.5)},
  )
  tx = optax.chain(ranger.smooth_predictions(16, 2), optax.sgd(0.1))
  update = build(way, tx, loss, has_aux=True)
  ids = np.arange(16) + np.where(np.arange(16) % 2, 2**32, 0)
  for given in (ids, ids.tolist()):
    _, state, _ = update(W, update.init(W), X, example_ids=given)
    table = state.optimizer[0]
    np.testing.assert_array_equal(np.asarray(table.smoothed)[1::2], 0)
    assert (np.asarray(table.smoothed)[::2] > 0).all()
    assert int(table.num_dropped) == 8
  with pytest.raises(ValueError, match="labels must fit 32 bits"):
    update(W, update.init(W), X, example_ids=np.arange(16), labels=ids)
  neighbors = ranger.Neighbors(ids[:, None], np.ones([16, 1]), np.ones([16, 1]))
  rows = {
    "neighbors": neighbors,
    "regions": ids.astype(np.uint64),
    "labels": ["b", "a"] * 8,
  }
  given = update._prepare(W, update.init(W), X, rows)[2].rows
  narrow = np.where(np.arange(16) % 2, -2, np.arange(16))
  np.testing.assert_array_equal(given["neighbors"].indices[:, 0], narrow)
  np.testing.assert_array_equal(given["regions"], narrow)
  np.testing.assert_array_equal(given["labels"], [1, 0] * 8)


@pytest.mark.parametrize("rows", [3, 0])
def test_rows_of_padding(rows):
  """Those of the last example, or ones; of no example, of weight zero."""
  update = build("mesh", optax.sgd(0.1), row_args=("mine",), batch_size=16)
  batch, ids = np.exp(X[:rows]), np.arange(rows)
  args = W, update.init(W)
  _, _, given = update._prepare(*args, batch, {"example_ids": ids, "mine": batch})
  last = batch[-1] if rows else np.ones(3)
  expected = np.concatenate([batch, np.tile(last, [16 - rows, 1])])
  np.testing.assert_array_equal(given.batch, expected)
  np.testing.assert_array_equal(given.rows["mine"], expected)
  there = np.arange(16) < rows
  np.testing.assert_array_equal(given.rows["member_weights"], there)
  np.testing.assert_array_equal(
    given.rows["example_ids"], np.where(there, np.arange(16), -1)
  )
  weights = np.full(rows, 2, np.float32)
  _, _, given = update._prepare(*args, batch, {"member_weights": weights})
  np.testing.assert_array_equal(given.rows["member_weights"], 2 * there)


@pytest.mark.parametrize("item", ["loss", "weight", "num_dropped"])
def test_items_of_aux_must_not_be_named_like_metrics(item):
  loss = lambda params, batch: (losses(params, batch), {item: losses(params, batch)})
  update = ranger.train_step(loss, optax.sgd(0.1), has_aux=True)
  with pytest.raises(ValueError, match=f"aux must not have an item named '{item}'"):
    update(W, update.init(W), X)


@pytest.mark.parametrize("bad", [np.inf, np.nan, -1.0])
def test_weights_that_are_none_are_left_out_of_metrics(bad):
  seen = optax.GradientTransformationExtraArgs(
    lambda params: {"weight": jnp.zeros([]), "value": jnp.zeros([])},
    lambda updates, state, params=None, *, weight, value, **extra_args: (
      updates,
      {"weight": weight, "value": value},
    ),
  )
  update = build("one device", seen)
  weights = np.ones(16, np.float32)
  weights[3] = bad
  _, state, metrics = update(W, update.init(W), X, member_weights=weights)
  loss = losses(W, X)[weights == 1].mean()
  assert (metrics["weight"], metrics["num_dropped"]) == (15, 1)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
  assert state.optimizer == {"weight": metrics["weight"], "value": metrics["loss"]}
  assert state.step.num_dropped == 1


def test_aux_must_hold_rows_or_be_declared():
  loss = lambda params, batch: (losses(params, batch), {"mean": batch.mean(axis=0)})
  update = ranger.train_step(loss, optax.sgd(0.1), has_aux=True)
  with pytest.raises(ValueError, match=r"aux\['mean'\].*shape \[3\].*statistics="):
    update(W, update.init(W), X)
  loss = lambda params, batch: (losses(params, batch), batch.mean())
  update = ranger.train_step(loss, optax.sgd(0.1), has_aux=True)
  with pytest.raises(ValueError, match="with a dictionary as aux, got"):
    update(W, update.init(W), X)


@pytest.mark.parametrize("way", ["one device", "micro-batches", "mesh"])
def test_losses_must_be_one_a_row(way):
  update = build(
    way, optax.sgd(0.1), lambda params, batch: losses(params, batch).mean()
  )
  with pytest.raises(ValueError, match=r"one for each row.*leave out the mean"):
    update(W, update.init(W), X)


def test_split_parameters_need_the_compiler():
  mesh = jax.make_mesh((8,), ("data",))
  split = NamedSharding(mesh, PartitionSpec("data"))
  params = {"w": jax.device_put(jnp.ones(8), split)}
  batch = np.ones([16, 8], np.float32)
  update = ranger.train_step(losses, optax.sgd(0.1), mesh=mesh)
  with pytest.raises(ValueError, match=r"params\['w'\] is split.*partition=\"jit\""):
    update(params, update.init(params), batch)
  update = ranger.train_step(losses, optax.sgd(0.1), mesh=mesh, partition="jit")
  after, _, _ = update(params, update.init(params), batch)
  assert after["w"].sharding == split


def test_one_buffer_twice_is_refused():
  update = ranger.train_step(losses, optax.sgd(0.1, momentum=0.9))
  params = {"w": jnp.ones(3)}
  state = update.init(params)
  alias = lambda leaf: params["w"] if leaf.ndim else leaf
  shared = state._replace(optimizer=jax.tree.map(alias, state.optimizer))
  with pytest.raises(ValueError, match=r"are one buffer.*jnp.copy"):
    update(params, shared, X)
  update = ranger.train_step(losses, optax.sgd(0.1, momentum=0.9), donate=False)
  update.lower(params, shared, X)


def test_an_nnx_model_keeps_its_arrays():
  model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
  graph, params = nnx.split(model, nnx.Param)
  loss = lambda params, batch: nnx.merge(graph, params)(batch)[:, 0] ** 2
  update = ranger.train_step(loss, optax.sgd(0.1))
  state = update.init(params)
  for _ in range(2):
    params, state, _ = update(params, state, X)
  assert np.isfinite(model(X)).all()
  nnx.update(model, params)
  assert np.isfinite(model(X)).all()


def test_missing_arguments_name_the_call_that_was_made():
  grad_fn = ranger.value_and_grad(losses, ranger.ranger_head())
  with pytest.raises(ValueError, match=r"call grad_fn\(params, batch, neighbors=...\)"):
    jax.eval_shape(grad_fn, W, X)
  update = ranger.train_step(losses, optax.sgd(0.1), step=ranger.ranger_head())
  with pytest.raises(ValueError, match=r"call update\(params, state, batch, neigh"):
    update(W, update.init(W), X)
  step = ranger.average_neighbors()
  with pytest.raises(ValueError, match=r"update\(updates, state, params, neighbors="):
    step.update(W, step.init(W))


@functools.cache
def with_table(way):
  table = ranger.smooth_predictions(16, 2)
  tx = optax.chain(table, optax.sgd(0.1))
  if way == "on emission":
    tx = optax.chain(table, ranger.accumulate(optax.sgd(0.1), 2))
  return build(way, tx, predicting_losses, has_aux=True)


def predicting_losses(params, batch):
  predictions = jax.nn.softmax(batch @ params["w"][:, None] * jnp.array([[1.0, -1.0]]))
  return -jnp.log(predictions[:, 0]), {"predictions": predictions}


@each_way
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_replaced_example_has_no_prediction(way, bad):
  """Its row of the table stays; that of the example in its place is not written."""
  update = with_table(way)
  batch = X.copy()
  batch[[3, 12], 1] = bad
  state = update.init(W)
  _, state, metrics = update(W, state, batch, example_ids=np.arange(16))
  read = jax.jit(ranger.smoothed_predictions)
  rows = np.asarray(read(state, np.arange(16)))
  clean = update(W, update.init(W), X, example_ids=np.arange(16))[1]
  expected = np.asarray(read(clean, np.arange(16)))
  good = np.setdiff1d(np.arange(16), [3, 12])
  np.testing.assert_allclose(rows[good], expected[good], rtol=1e-6)
  np.testing.assert_array_equal(rows[[3, 12]], 0)
  assert int(metrics["num_dropped"]) == 2
  assert int(optax.tree.get(state.optimizer, "PredictionState").num_dropped) == 2


def finding_neighbors(num_micro_batches):
  return ranger.train_step(
    predicting_losses,
    optax.chain(ranger.smooth_predictions(16, 2), optax.sgd(0.1)),
    step=ranger.ranger_head(),
    find_neighbors=lambda predictions: ranger.neighbors.nearest(predictions, 2),
    has_aux=True,
    num_micro_batches=num_micro_batches,
    donate=False,
  )


@functools.cache
def without_examples(*left_out):
  update, kept = finding_neighbors(1), np.delete(np.arange(16), left_out)
  params, state, _ = update(W, update.init(W), X[kept], example_ids=kept)
  return params, ranger.smoothed_predictions(state)


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_a_replaced_example_is_nobodys_neighbor(num_micro_batches):
  """Nor has it a prediction where neighbors are found by predictions."""
  update = finding_neighbors(num_micro_batches)
  batch = X.copy()
  batch[[3, 12], 1] = np.nan
  params, state, _ = update(W, update.init(W), batch, example_ids=np.arange(16))
  close((params, ranger.smoothed_predictions(state)), without_examples(3, 12))


def test_a_derivative_that_is_not_finite_takes_all_leaves_of_its_device():
  """The other device's examples count, and nothing of the ruined gradient does."""
  mesh = jax.make_mesh((2,), ("data",))
  losses = lambda params, x: jnp.log(params["w"] * x) + params["b"] * x
  update = ranger.train_step(losses, optax.sgd(0.1), mesh=mesh, donate=False)
  params = {"w": jnp.float32(2), "b": jnp.float32(0)}
  x = np.array([1, 2, 0, 3], np.float32)
  params, _, metrics = update(params, update.init(params), x)
  np.testing.assert_allclose(params["w"], 2 - 0.1 / 2, rtol=1e-6)
  np.testing.assert_allclose(params["b"], -0.1 * 1.5, rtol=1e-6)
  assert metrics["weight"] == 2


def test_a_split_state_has_the_gradient_of_leaves_that_devices_do_not_divide():
  mesh = jax.make_mesh((2,), ("data",))
  losses = lambda params, x: x @ params["w"] + params["b"].sum()
  update = ranger.train_step(losses, optax.sgd(1.0), mesh=mesh, shard_state=True)
  params = {"w": jnp.zeros([4]), "b": jnp.zeros([3])}
  params, _, _ = update(params, update.init(params), np.ones([4, 4], np.float32))
  close(params, {"w": np.full([4], -1.0), "b": np.full([3], -1.0)})


def test_a_scalar_beside_rows_of_another_number_is_refused():
  def losses(w, x):
    return (w - x) ** 2, {"info": {"scale": w, "rows": jnp.ones([5])}}

  update = ranger.train_step(losses, optax.sgd(0.1), has_aux=True)
  w = jnp.float32(2)
  with pytest.raises(ValueError, match="info"):
    update(w, update.init(w), np.arange(4, dtype=np.float32))

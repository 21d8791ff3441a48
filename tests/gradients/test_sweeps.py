"""Steps that are not linear, in sweeps: the same result, in less memory."""

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

N = 11


def compiled(step):
  """One program where steps are tried on parts: else it is one for each operation."""
  return step._replace(update=jax.jit(step.update))


STEPS = {
  "max": ranger.aggregate_by_max(),
  "median": compiled(ranger.aggregate_by_median()),
  "trimmed": compiled(ranger.aggregate_by_trimmed_mean(0.2)),
  "geometric": ranger.aggregate_by_geometric_median(),
  "krum": ranger.aggregate_by_krum(2, 3),
  "upgrad": ranger.aggregate_by_upgrad(),
  "mgda": ranger.aggregate_by_mgda(),
  "mixed-median": ranger.mix_nearest(ranger.aggregate_by_median(), 2),
  "mixed-krum": ranger.mix_nearest(ranger.aggregate_by_krum(2), 2),
  "regions-max": ranger.aggregate_by_regions(3, within="max"),
  "neighbors-median": optax.chain(
    ranger.average_neighbors(), ranger.aggregate_by_median()
  ),
  "clipped-krum": optax.chain(ranger.aggregate_by_krum(2), optax.clip(0.05)),
}


def inputs():
  rng = np.random.default_rng(0)
  normal = lambda *shape: np.asarray(rng.standard_normal(shape), np.float32)
  params = {"w": normal(7, 3), "b": normal(3), "s": normal()}
  batch = {"x": normal(N, 7), "y": rng.integers(0, 3, N).astype(np.int32)}
  extra = {
    "regions": rng.integers(0, 3, N).astype(np.int32),
    "neighbors": ranger.neighbors.nearest(batch["x"], 3),
    "member_weights": rng.integers(0, 4, N).astype(np.float32),
    "scale": rng.uniform(1, 2, N).astype(np.float32),
  }
  extra["member_weights"][0] = 1
  return params, batch, extra


def losses(params, batch, scale):
  logits = params["s"] * jnp.tanh(batch["x"] @ params["w"]) + params["b"][None]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
  return scale * losses


@pytest.mark.guarantees(
  "value_and_grad", "Sweeps change only time and memory; memory is proportional"
)
@pytest.mark.parametrize("name", sorted(STEPS))
@pytest.mark.parametrize(("num_sweeps", "micro_batch_size"), [(3, 4), (50, 1)])
@pytest.mark.slow
def test_sweeps_change_nothing(name, num_sweeps, micro_batch_size):
  params, batch, extra = inputs()
  step = STEPS[name]
  state = step.init(params)
  at_once = ranger.value_and_grad(losses, step, row_args=("scale",))
  expected = at_once(params, batch, state=state, **extra)
  in_sweeps = ranger.value_and_grad(
    losses,
    step,
    num_sweeps=num_sweeps,
    micro_batch_size=micro_batch_size,
    row_args=("scale",),
  )
  close(jax.jit(in_sweeps)(params, batch, state=state, **extra), expected)


@pytest.mark.parametrize(
  "name", ["krum", "geometric", pytest.param("mgda", marks=pytest.mark.slow)]
)
def test_every_entry_of_a_part_counts_once(name):
  """Gradients that differ in the first and last entries of the parts only.

  Beside a leaf that has fewer entries than there are sweeps.
  """
  rng = np.random.default_rng(0)
  # Of parts of three entries, the last from 7 on: 8 is in two of them.
  places = np.array([0, 2, 3, 8, 9])
  x = rng.standard_normal([N, 5]) * [1, 1, 1, 3, 1]
  batch = {"x": x.astype(np.float32)}
  losses = lambda p, batch: batch["x"] @ p["w"][places] + batch["x"][:, 0] ** 2 * p["b"]
  params = {"w": np.zeros(10, np.float32), "b": np.zeros((), np.float32)}
  step = {**STEPS, "krum": ranger.aggregate_by_krum(1)}[name]
  found = [
    jax.jit(ranger.value_and_grad(losses, step, num_sweeps=num))(params, batch)[1]
    for num in (1, 4)
  ]
  close(*found, atol=1e-5)


@pytest.mark.parametrize("told", ["norms", "directions"])
def test_what_a_step_is_told_in_sweeps(told):
  """A maximum of directions; a sum by norms and cosines."""

  def update(updates, state, params=None, *, norms=None, directions=None, **others):
    del params, others
    if told == "norms":
      inverse = 1.0 if norms is None else 1 / norms[:, None]
      reduce = lambda rows: (rows.reshape(len(rows), -1) * inverse).max(axis=0)
    else:
      largest = jnp.abs(jax.tree.leaves(updates)[0].reshape(len(x), -1)).max(axis=1)
      weights = largest  # Not linear, if it isn't told.
      if directions is not None:
        weights = directions.norms * directions.cosines.sum(axis=1)
      reduce = lambda rows: weights @ rows.reshape(len(x), -1)
    result = lambda rows: reduce(rows).reshape(rows.shape[1:])
    return jax.tree.map(result, updates), state

  step = optax.GradientTransformationExtraArgs(lambda params: (), update)
  x = np.random.default_rng(0).standard_normal([N, 5]).astype(np.float32)
  losses = lambda p, x: x @ p["w"] + x[:, 0] ** 2 * p["b"]
  params = {"b": np.zeros((), np.float32), "w": np.zeros(5, np.float32)}
  found = jax.jit(ranger.value_and_grad(losses, step, num_sweeps=3))(params, x)[1]
  rows = np.concatenate([x[:, :1] ** 2, x], axis=1)
  norms = np.linalg.norm(rows, axis=1)
  unit = rows / norms[:, None]
  weights = norms * (unit @ unit.T).sum(axis=1)
  expected = unit.max(axis=0) if told == "norms" else weights @ rows
  close(found, {"b": expected[0], "w": expected[1:]})


@pytest.mark.few(2)  # entry by entry, and by a matrix of inner products
@pytest.mark.parametrize("name", ["median", "krum", "geometric", "upgrad"])
def test_bad_gradients_are_left_out_in_sweeps(name):
  """Finite losses with gradients that are not finite, or beyond all measure."""
  params = np.ones(4, np.float32)
  bad = np.random.default_rng(0).uniform(1, 2, [N, 4]).astype(np.float32)
  bad[3, 0], bad[5, 2] = 0.0, 1e38

  def function(params, batch):
    # The root has no gradient at zero; the product's is as large as the row.
    return jnp.sqrt(batch[:, 0] * params[0]) + (batch[:, 1:] @ params[1:])

  step = STEPS[name]
  results = []
  for num_sweeps in (1, 3):
    grad_fn = ranger.value_and_grad(function, step, num_sweeps=num_sweeps)
    results.append(jax.jit(grad_fn)(params, bad, state=step.init(params))[1:])
  close(results[1], results[0])
  assert np.isfinite(results[1][0]).all()
  # Krum and the geometric median leave out what is far too large.
  far = name in ("krum", "geometric")
  assert int(results[1][1].num_dropped) == 1 + far


def test_steps_that_mix_entries_are_refused_in_sweeps():
  params, batch, extra = inputs()
  for rest in (optax.clip_by_global_norm(0.1), optax.centralize()):
    step = compiled(optax.chain(STEPS["max"], rest))
    grad_fn = ranger.value_and_grad(losses, step, num_sweeps=2, row_args=("scale",))
    with pytest.raises(ValueError, match="treats every entry of the gradients alike"):
      jax.jit(grad_fn)(params, batch, **extra)


def model(width=512):
  params = np.ones([width, width], np.float32)
  batch = np.random.default_rng(0).standard_normal([64, width]).astype(np.float32)
  square = lambda params, batch: ((batch @ params) ** 2).sum(axis=1)
  return params, batch, square


def temporaries(step, micro_batch_size, num_sweeps, **extra):
  params, batch, square = model()
  grad_fn = ranger.value_and_grad(
    square, step, micro_batch_size=micro_batch_size, num_sweeps=num_sweeps
  )
  compiled = jax.jit(grad_fn).lower(params, batch, **extra).compile()
  return compiled.memory_analysis().temp_size_in_bytes / params.nbytes


@pytest.mark.guarantees(
  "value_and_grad", "Sweeps change only time and memory; memory is proportional"
)
@pytest.mark.few(2)
@pytest.mark.parametrize("micro_batch_size", [4, 16])
@pytest.mark.parametrize("name", ["trimmed", "median", "geometric", "krum"])
def test_memory_follows_the_micro_batch(name, micro_batch_size):
  """64 examples, 1 MB of parameters: (micro-batch + 3) MB, not 64 or more."""
  num_sweeps = {4: 32, 16: 16}[micro_batch_size]
  used = temporaries(STEPS[name], micro_batch_size, num_sweeps)
  print(name, micro_batch_size, used)
  # Where sizes are looked at too, XLA holds two of a micro-batch's gradients.
  copies = 2 if name in ("geometric", "krum") else 1
  assert used <= copies * micro_batch_size + 3


@pytest.mark.slow
def test_linear_steps_hold_no_more_than_the_plain_mean():
  """64 examples, 1 MB of parameters: at most 1.5 MB of temporaries, fused."""
  _, batch, _ = model()
  extra = {
    "regions": jnp.arange(64) % 3,
    "neighbors": ranger.neighbors.nearest(batch, 5),
  }
  for step in (
    ranger.aggregate_by_mean(),
    ranger.aggregate_by_regions(3),
    ranger.ranger_head(),
    optax.chain(ranger.average_neighbors(), ranger.aggregate_by_regions(3)),
  ):
    used = temporaries(step, 32, 1, **extra)
    print(used)
    assert used <= 1.5


@pytest.mark.slow
def test_sweeps_under_shard_map():
  """Each device aggregates its own examples; across_devices, the devices."""
  params, batch, _ = inputs()
  batch = jax.tree.map(lambda leaf: leaf[:8], batch)
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
  local = lambda params, batch: losses(params, batch, jnp.float32(1))
  for name in ("median", "geometric"):
    step = STEPS[name]
    grad_fn = ranger.value_and_grad(local, step, num_sweeps=3, micro_batch_size=2)
    mean = ranger.across_devices(ranger.aggregate_by_mean(), "data")

    def function(batch, grad_fn=grad_fn, mean=mean):
      apart = jax.lax.pcast(params, "data", to="varying")
      _, grads = grad_fn(apart, batch)
      return mean.update(grads, mean.init(params))[0]

    split = PartitionSpec("data")
    over = jax.jit(
      jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=PartitionSpec())
    )
    result = over(jax.device_put(batch, NamedSharding(mesh, split)))
    halves = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(4), slice(4, 8))]
    each = [ranger.value_and_grad(local, step)(params, half)[1] for half in halves]
    close(result, jax.tree.map(lambda a, b: (a + b) / 2, *each))

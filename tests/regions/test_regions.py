"""Regions: partitions, weights that follow the worst region, and small clusters."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger


def test_kmeans_finds_clusters():
  rng = np.random.default_rng(0)
  truth = np.repeat([0, 1, 2], [90, 9, 3])
  points = 5 * np.eye(3)[truth] + 0.1 * rng.standard_normal([102, 3])
  points[7, 1] = np.nan
  regions, centers = ranger.regions.by_kmeans(points, 3)
  regions = np.asarray(regions)
  assert regions[7] == -1
  keep = np.arange(102) != 7
  assert len(set(zip(regions[keep], truth[keep], strict=True))) == 3
  nearest = np.linalg.norm(points[:, None] - np.asarray(centers), axis=-1)
  np.testing.assert_array_equal(regions[keep], nearest[keep].argmin(axis=1))
  again, _ = ranger.regions.by_kmeans(points, 3)
  np.testing.assert_array_equal(regions, again)


@pytest.mark.parametrize("parts", [(3,), (2, 3), (2, 3, 4)])
def test_grid_regions_are_equal_cells(parts):
  axes = np.meshgrid(*(np.arange(4 * count) + 0.5 for count in parts), indexing="ij")
  positions = np.stack([axis.ravel() for axis in axes], axis=1)
  high = np.array([4.0 * count for count in parts], np.float32)
  regions = jax.jit(
    lambda positions: ranger.regions.by_grid(positions, parts, low=0, high=high)
  )(positions)
  expected = np.ravel_multi_index((positions // 4).astype(int).T, parts)
  np.testing.assert_array_equal(regions, expected)
  assert set(np.bincount(regions)) == {4 ** len(parts)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_position_does_not_move_the_corners(bad):
  """Of a grid, and of spans of time, that are found in the positions."""
  places = np.linspace(0, 1, 12, dtype=np.float32)
  with_bad = np.where(np.arange(12) == 5, np.float32(bad), places)
  for find in (
    lambda t: ranger.regions.by_grid(t[:, None], [4]),
    # The other entry of a bad row is finite, and far away.
    lambda t: ranger.regions.by_grid(
      np.stack([t, np.where(np.isfinite(t), np.arange(len(t)) % 2, 9)], axis=1), [2, 2]
    ),
    lambda t: ranger.regions.by_time(t, num_regions=4),
  ):
    found, wanted = np.asarray(find(with_bad)), np.asarray(find(places))
    np.testing.assert_array_equal(np.delete(found, 5), np.delete(wanted, 5))
    assert found[5] == -1
    assert len(np.unique(wanted)) == 4


def test_grid_regions_keep_what_is_outside_and_leave_out_nan():
  positions = np.array([[-5.0, 0.1], [np.nan, 0.1], [0.9, 7.0], [1.0, 1.0]])
  regions = ranger.regions.by_grid(positions, (2, 2), low=0.0, high=1.0)
  np.testing.assert_array_equal(regions, [0, -1, 3, 3])
  assert ranger.regions.by_grid(np.zeros([3, 2]), (2, 2)).tolist() == [0, 0, 0]
  assert ranger.regions.by_grid(np.zeros([0, 2]), (2, 2)).shape == (0,)


def test_time_regions_are_equal_windows():
  times = np.array([3.0, 0.0, 9.9, 5.0, np.inf])
  regions = ranger.regions.by_time(times, 2, low=0, high=10)
  np.testing.assert_array_equal(regions, [0, 0, 1, 1, -1])


@pytest.mark.parametrize("num_regions", [1, 4, 7])
def test_graph_regions_are_balanced_and_cut_few_edges(num_regions):
  grid = np.arange(400).reshape(20, 20)
  down = np.stack([grid[:-1].ravel(), grid[1:].ravel()], axis=1)
  right = np.stack([grid[:, :-1].ravel(), grid[:, 1:].ravel()], axis=1)
  edges = np.concatenate([down, right, right[:, ::-1], grid[:1, [0, 0]]])
  regions = np.asarray(ranger.regions.by_graph(edges, 400, num_regions))
  sizes = np.bincount(regions, minlength=num_regions)
  assert sizes.max() <= 1.1 * 400 / num_regions
  assert sizes.min() >= 0.9 * 400 / num_regions
  cut = (regions[down[:, 0]] != regions[down[:, 1]]).sum()
  cut += (regions[right[:, 0]] != regions[right[:, 1]]).sum()
  assert cut <= 20 * (num_regions - 1)


@pytest.mark.parametrize(
  ("module", "call"),
  [
    ("sklearn", lambda: ranger.regions.by_kmeans(np.ones([3, 2]), 2)),
    ("pymetis", lambda: ranger.regions.by_graph(np.zeros([1, 2], int), 3, 2)),
  ],
)
def test_a_missing_library_names_its_extra(module, call, monkeypatch):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ImportError, match=r"optax-ranger\[regions\]"):
    call()


def draw(n=12, seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.standard_normal([n, 5]).astype(np.float32),
    rng.integers(0, 3, n).astype(np.int32),
    rng.uniform(0, 2, n).astype(np.float32),
  )


@pytest.mark.guarantees(
  "aggregate_by_worst_regions", "The weights follow the losses as the formula says"
)
@pytest.mark.parametrize("given", [{"rate": 0.7}, {}], ids=["rate", "default"])
def test_worst_regions_equal_numpy(given):
  rate, member = given.get("rate", 0.01), np.array([1, 2, 0] * 4, np.float64)
  region_weights = np.array([1.0, 0.5, 2.0, 1.0])
  step = ranger.aggregate_by_worst_regions(4, **given)  # the fourth is always empty
  state, weights = step.init({}), np.full(4, 0.25)
  for call in range(5):
    rows, regions, losses = draw(seed=call)
    # A loss that is not finite tells nothing; that of an absent member neither.
    losses[[0, 2]] = np.inf, np.nan
    result, state = jax.jit(step.update)(
      rows,
      state,
      losses=losses,
      regions=regions,
      member_weights=jnp.asarray(member),
      region_weights=region_weights,
    )
    told = np.isfinite(losses)
    grown, gradients = weights.copy(), np.zeros([4, 5])
    alive = np.zeros(4, bool)
    for region in range(4):
      share = member * (np.asarray(regions) == region)
      if share.sum():
        alive[region] = True
        if (share * told).sum():
          loss = np.average(np.where(told, losses, 0), weights=share * told)
          grown[region] *= np.exp(rate * loss)
        gradients[region] = np.average(rows, axis=0, weights=share)
    weights = grown / grown.sum()
    np.testing.assert_allclose(jnp.exp(state.log_weights), weights, rtol=1e-5)
    shares = (weights * region_weights)[alive]
    expected = np.average(gradients[alive], axis=0, weights=shares)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.guarantees("aggregate_by_worst_regions", "rate=0 is aggregate_by_regions")
def test_worst_regions_at_rate_zero_are_regions():
  rows, regions, losses = draw()
  worst, plain = ranger.aggregate_by_worst_regions(3, 0), ranger.aggregate_by_regions(3)
  result, _ = jax.jit(worst.update)(
    rows, worst.init({}), losses=losses, regions=regions
  )
  expected, _ = jax.jit(plain.update)(rows, plain.init({}), regions=regions)
  np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_a_region_comes_back_from_nearly_no_weight():
  rows, regions, losses = draw()
  step = ranger.aggregate_by_worst_regions(4, 1e3)
  state = step.init({})
  update = jax.jit(
    lambda rows, state, regions: step.update(
      rows, state, losses=losses, regions=regions
    )
  )
  for _ in range(50):
    _, state = update(rows, state, regions)
  alone, state = update(rows, state, np.full_like(regions, 3))
  np.testing.assert_allclose(alone, rows.mean(axis=0), rtol=1e-5)
  assert np.isfinite(state.log_weights).all()


def clusters(seed, part, n=20_000):
  """Three clusters of 90, 9 and 1 % of the examples, each with a rule of its own."""
  rules = np.random.default_rng([seed, 0]).standard_normal([3, 5])
  rng = np.random.default_rng([seed, part])
  region = rng.choice(3, n, p=[0.9, 0.09, 0.01])
  x = rng.standard_normal([n, 8])
  y = ((x[:, 3:] * rules[region]).sum(axis=1) > 0).astype(int)
  x[:, :3] = 4 * np.eye(3)[region] + 0.3 * x[:, :3]
  return jnp.asarray(x, jnp.float32), jnp.asarray(y), region


def accuracies(way, seed, steps=150):
  """Accuracy of each cluster, and over all test examples, after training."""
  x, y, _ = clusters(seed, 1)
  regions, _ = ranger.regions.by_kmeans(x, 3)
  step = {
    "mean": ranger.aggregate_by_mean(),
    "regions": ranger.aggregate_by_regions(3),
    "worst": ranger.aggregate_by_worst_regions(3, 0.01),
  }[way]
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(
    rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32
  )
  params = {"hidden": normal(8, 64), "bias": jnp.zeros([64]), "out": normal(64, 2)}

  def logits(params, x):
    return jax.nn.relu(x @ params["hidden"] + params["bias"][None]) @ params["out"]

  def losses(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
      logits(params, batch["x"]), batch["y"]
    )

  grad_fn = ranger.value_and_grad(losses, step)
  tx = optax.sgd(0.1, momentum=0.9)

  def train(carry, ids):
    params, state, regional = carry
    batch = {"x": x[ids], "y": y[ids]}
    _, grads, regional = grad_fn(params, batch, state=regional, regions=regions[ids])
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state, regional), None

  ids = jnp.asarray(rng.integers(0, len(y), [steps, 256]))
  carry = params, tx.init(params), step.init(params)
  (params, _, _), _ = jax.jit(lambda c: jax.lax.scan(train, c, ids))(carry)
  x, y, region = clusters(seed, 2)
  right = np.asarray(logits(params, x).argmax(axis=1) == y)
  return [right[region == r].mean() for r in range(3)], right.mean()


@pytest.mark.parametrize("way", ["regions", "worst"])
@pytest.mark.slow
def test_balanced_regions_raise_the_smallest_cluster(way):
  """Clusters of 90, 9 and 1 %, found by k-means; means over five seeds."""
  ways = ("mean", way)
  smallest, overall = {}, {}
  for one in ways:
    results = [accuracies(one, seed) for seed in range(5)]
    smallest[one] = np.mean([each[2] for each, _ in results])
    overall[one] = np.mean([total for _, total in results])
  print(smallest, overall)
  assert smallest[way] >= smallest["mean"] + 0.05
  assert overall[way] >= overall["mean"] - 0.01


def test_worst_regions_refuse_losses_that_differ_over_devices():
  step = ranger.aggregate_by_worst_regions(2)
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.sharding.PartitionSpec("data")
  over = jax.shard_map(
    lambda losses: step.update(
      jnp.ones([2, 3]), step.init({}), losses=losses, regions=jnp.array([0, 1])
    )[0],
    mesh=mesh,
    in_specs=split,
    out_specs=split,
  )
  with pytest.raises(ValueError, match="losses differs over the mesh axis 'data'"):
    jax.jit(over)(jnp.ones([4]))


def test_windows_of_unix_seconds():
  times = 1_700_000_000 + np.arange(0, 3600, 60)
  np.testing.assert_array_equal(ranger.regions.by_time(times, 60), np.arange(60))


def test_cells_of_map_coordinates():
  along = np.linspace(0, 10, 400, endpoint=False)[:, None]
  positions = np.array([500_000.0, 4_649_776.0]) + along
  assert len(np.unique(ranger.regions.by_grid(positions, (20, 20)))) == 20


TIMES = {
  "seconds": 1_700_000_000 + 60 * np.arange(60),
  "nanoseconds": 1_700_000_000_000_000_000 + 60_000_000_000 * np.arange(60),
  "uint64": np.uint64(2**63) + np.arange(60, dtype=np.uint64),
  "float": 1_700_000_000.0 + 60 * np.arange(60),
  "before zero": -1_700_000_000_000 + 60 * np.arange(60),
  "int32": (2**30 + np.arange(60)).astype(np.int32),
  "jax": jnp.asarray(2**30 + np.arange(60), jnp.int32),
}


@pytest.mark.parametrize("kind", TIMES)
def test_windows_of_large_numbers(kind):
  times = TIMES[kind]
  by_time = ranger.regions.by_time
  np.testing.assert_array_equal(by_time(times, 60), np.arange(60))
  order = np.random.default_rng(0).permutation(60)
  np.testing.assert_array_equal(by_time(times[order], 60), order)
  first, step = np.asarray(times)[0], np.asarray(times)[1] - np.asarray(times)[0]
  with_edges = by_time(times, 6, low=first, high=first + step * 60)
  np.testing.assert_array_equal(with_edges, np.arange(60) // 10)
  ahead = by_time(times, 6, low=int(first), high=float(first) + 1e15)
  np.testing.assert_array_equal(ahead, np.zeros(60))
  if kind in ("int32", "uint64"):  # A corner that the type of the times can't hold.
    np.testing.assert_array_equal(by_time(times, 6, low=-(2**40)), np.full(60, 5))


@pytest.mark.parametrize("corner", [(5e5, 4_649_776.0), (-7e6, 1e9), (0.25, 2.0**30)])
def test_cells_of_large_coordinates(corner):
  side = (np.arange(12) + 0.5) / 12 * 3
  positions = np.stack(np.meshgrid(side, side, indexing="ij"), axis=2).reshape(-1, 2)
  wanted = np.ravel_multi_index((positions // 0.25).astype(int).T, (12, 12))
  positions = positions + np.array(corner)
  positions[7, 0] = np.nan
  wanted[7] = -1
  low = np.array(corner)
  found = ranger.regions.by_grid(positions, (12, 12), low=low, high=low + 3)
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
  ("dtype", "low", "high"),
  [(np.uint8, 0, 256), (np.uint8, -56, 200), (np.int8, -128, 128), (np.int8, -129, 0)],
)
def test_edges_may_lie_beyond_the_type_of_the_positions(dtype, low, high):
  info = np.iinfo(dtype)
  values = np.array([max(low, info.min), 3, 100, min(high - 1, info.max)], dtype)
  values = values[(values.astype(int) >= low) & (values.astype(int) < high)]
  found = ranger.regions.by_grid(values[:, None], (4,), low=low, high=high)
  wanted = (values.astype(int) - low) * 4 // (high - low)
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("offset", [0.0, 4_649_776.0, -1e9])
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_kmeans_of_large_coordinates(offset, dtype):
  truth = np.repeat([0, 1, 2], 20)
  spread = np.random.default_rng(0).integers(-2, 3, [60, 2])
  points = (offset + 10 * np.eye(3)[truth][:, :2] + spread).astype(dtype)
  regions, centers = ranger.regions.by_kmeans(points, 3)
  assert len(set(zip(np.asarray(regions).tolist(), truth.tolist(), strict=True))) == 3
  means = [points[np.asarray(regions) == i].mean(axis=0) for i in range(3)]
  np.testing.assert_allclose(centers, means, rtol=1e-6, atol=1e-5)


def test_grid_in_float64():
  with jax.enable_x64(True):
    times = jnp.asarray(1_700_000_000 + 0.25 * np.arange(60))
    found = jax.jit(lambda times: ranger.regions.by_time(times, 60))(times)
  np.testing.assert_array_equal(found, np.arange(60))


def test_direction_and_number_of_equal_edges_do_not_matter():
  pytest.importorskip("pymetis")
  ring = np.array([[i, (i + 1) % 12] for i in range(12)])
  regions = ranger.regions.by_graph(ring, 12, 3)
  more = np.concatenate([ring, ring[:, ::-1]])
  for edges in (ring[:, ::-1], more, np.concatenate([ring, *([ring[1:9:2]] * 9)])):
    np.testing.assert_array_equal(ranger.regions.by_graph(edges, 12, 3), regions)


def test_the_same_seed_gives_the_same_clusters():
  points = np.random.default_rng(0).uniform(size=[200, 2])
  find = lambda seed: np.asarray(ranger.regions.by_kmeans(points, 8, seed=seed)[0])
  np.testing.assert_array_equal(find(0), find(0))
  assert (find(0) != find(1)).any()

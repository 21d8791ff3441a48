"""What graphs are used for: audits, files, three ways to pay, refreshing, pipelines."""

import functools
import pathlib
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from optax_ranger import graph


@functools.cache
def small(k: int = 4) -> ranger.Neighbors:
  points = np.random.default_rng(0).standard_normal([60, 2]).astype(np.float32)
  return graph.build(points, k, backend="jax")


@pytest.mark.guarantees(
  "graph.audit", "It equals counting by hand, with groups too; so do margin"
)
def test_audit_equals_counting():
  neighbors = jax.device_get(ranger.neighbors.weigh(small(), kernel="gaussian"))
  rng = np.random.default_rng(1)
  labels, beliefs = rng.integers(0, 3, 60), rng.dirichlet(np.ones(3), 60)
  beliefs[5], beliefs[6, 1], beliefs[7, 0] = np.nan, np.inf, np.nan
  for given in (None, beliefs):
    for balance in (False, True):
      found = graph.audit(neighbors, labels, beliefs=given, balance=balance)
      votes = np.zeros([60, 3])
      for i in range(60):
        for j, weight in zip(neighbors.indices[i], neighbors.weights[i], strict=True):
          vote = np.eye(3)[labels[j]] if given is None else given[j]
          votes[i] += float(weight) * (vote if np.isfinite(vote).all() else 0)
      if balance:
        votes /= votes.sum(axis=0) / votes.sum()
      votes /= votes.sum(axis=1, keepdims=True)
      own = votes[np.arange(60), labels]
      others = np.where(np.eye(3)[labels] > 0, -1, votes).max(axis=1)
      np.testing.assert_allclose(found.support, own, rtol=1e-5)
      np.testing.assert_allclose(found.margin, own - others, atol=1e-6)
      strongest = np.where(own >= others, labels, votes.argmax(axis=1))
      np.testing.assert_array_equal(found.suggested, strongest)
      assert (np.diff(found.margin[found.order]) >= 0).all()
  support = ranger.labels.label_support(neighbors, labels)
  np.testing.assert_allclose(graph.audit(neighbors, labels).support, support, rtol=1e-5)
  # Of classes with equal votes, the given one is suggested.
  neighbors = small()
  votes = np.eye(3)[labels][np.asarray(neighbors.indices)].sum(axis=1)
  strongest = votes[np.arange(60), labels] == votes.max(axis=1)
  found = graph.audit(neighbors, labels)
  wanted = np.where(strongest, labels, votes.argmax(axis=1))
  np.testing.assert_array_equal(found.suggested, wanted)
  assert (strongest & (votes.argmax(axis=1) != labels)).any()


@pytest.mark.parametrize("score", ["votes", "posterior"])
def test_weights_of_an_audit(score):
  """Their unit does not matter; bad ones, and places out of range, are empty."""
  neighbors, labels = small(), np.random.default_rng(1).integers(0, 3, 60)
  found = graph.audit(neighbors, labels, score=score)
  again = graph.audit(
    neighbors._replace(weights=7 * np.asarray(neighbors.weights)), labels, score=score
  )
  np.testing.assert_allclose(again.support, found.support, rtol=1e-5)
  weights, indices = np.array(neighbors.weights), np.array(neighbors.indices)
  weights[:4, 1] = 0
  empty = graph.audit(neighbors._replace(weights=weights), labels, score=score)
  weights[:4, 1] = np.nan, np.inf, -1, 1
  indices[3, 1] = 60
  bad = ranger.Neighbors(indices, neighbors.distances, weights / 8)
  found = graph.audit(bad, labels, score=score)
  np.testing.assert_allclose(found.support, empty.support, rtol=1e-5)
  np.testing.assert_array_equal(found.suggested, empty.suggested)


@pytest.mark.guarantees(
  "graph.audit", "Working in blocks of rows does not change the result"
)
def test_audit_in_blocks(monkeypatch):
  from optax_ranger.graph import _audit

  neighbors, labels = small(), np.random.default_rng(1).integers(0, 3, 60)
  whole = graph.audit(neighbors, labels, balance=True)
  monkeypatch.setattr(_audit, "_CELLS", 28)
  for one, other in zip(
    graph.audit(neighbors, labels, balance=True)[:-1], whole[:-1], strict=True
  ):
    np.testing.assert_array_equal(one, other)
  again = graph.audit(neighbors, labels, balance=True)
  assert again.num_wrong == pytest.approx(whole.num_wrong, rel=1e-5)


@pytest.mark.guarantees(
  "graph.audit", "Examples without neighbors or predictions come last and"
)
def test_audit_without_neighbors():
  neighbors = small()
  empty = np.asarray(neighbors.indices).copy()
  empty[3], empty[8] = -1, 60
  found = graph.audit(neighbors._replace(indices=empty), np.arange(60) % 2)
  assert set(found.order[-2:]) == {3, 8}
  assert np.isnan(found.support[[3, 8]]).all()
  np.testing.assert_array_equal(found.suggested[[3, 8]], [1, 0])


def test_audit_of_rare_classes_needs_balance():
  """One of ten is of the rare class; alone among mixed votes it is outvoted."""
  rng = np.random.default_rng(0)
  labels = (rng.random(2000) < 0.1).astype(np.int32)
  points = rng.standard_normal([2000, 2]) + 1.5 * labels[:, None]
  neighbors = graph.build(points.astype(np.float32), 20, backend="jax")
  right = lambda balance: (
    graph.audit(neighbors, labels, balance=balance).suggested[labels == 1] == 1
  ).mean()
  assert right(False) < 0.6 < 0.75 < right(True)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"labels": np.full(60, 0.5)}, "labels must hold integers, got float64 with"),
    ({"labels": np.zeros(9, int)}, r"labels must have shape \[60\]"),
    ({"labels": np.full(60, 3), "num_classes": 3}, r"must lie in \[0, 3\), got 3"),
    (
      {"labels": np.zeros(60, int), "beliefs": np.zeros(60)},
      r"must have shape \[60, C",
    ),
  ],
)
def test_audit_refusals(arguments, message):
  with pytest.raises((TypeError, ValueError), match=message):
    graph.audit(small(), **arguments)


@pytest.mark.guarantees(
  "graph.balance_classes", "The mean total weight is the same for all classes"
)
def test_balanced_classes_weigh_alike():
  neighbors = small()
  labels = np.zeros(60, np.int32)
  labels[neighbors.indices[7]] = 1
  labels[neighbors.indices[9]] = 3
  labels[[7, 9]] = 1, 3
  weighed = ranger.neighbors.weigh(neighbors, labels=labels)
  balanced = jax.jit(lambda found: graph.balance_classes(found, labels, 4))(weighed)
  totals = np.asarray(balanced.weights).sum(axis=1)
  means = [totals[labels == c].mean() for c in (0, 1, 3)]
  np.testing.assert_allclose(means, [totals.mean()] * 3, rtol=1e-5)
  before = np.asarray(weighed.weights).sum(axis=1)
  assert totals.mean() == pytest.approx(before.mean())
  assert np.ptp([before[labels == c].mean() for c in (0, 1, 3)]) > 0.2


@pytest.mark.guarantees(
  "neighbors.weight_report",
  "Uniform weights have n effective examples, and one example",
)
def test_weight_report_limits():
  report = jax.jit(ranger.neighbors.weight_report)
  even = report(np.full(500, 1e25, np.float32))
  assert even.effective_sample_size == pytest.approx(500)
  assert even.top_share == pytest.approx(0.01)
  hub = report(np.where(np.arange(500) == 7, np.float32(1e-30), np.float32(0)))
  assert hub.effective_sample_size == pytest.approx(1)
  assert hub.top_share == pytest.approx(1)
  assert hub.zero_share == pytest.approx(0.998)
  # One per cent of 150, rounded up, are two.
  some = report(np.arange(150, dtype=np.float32))
  assert some.top_share == pytest.approx((149 + 148) / np.arange(150).sum())
  nothing = report(np.zeros(3, np.float16))
  assert [float(number) for number in nothing] == [0, 0, 1]
  with pytest.raises(ValueError, match=r"must have shape \[n\]"):
    ranger.neighbors.weight_report(np.ones([2, 2]))


@pytest.mark.guarantees("graph.save", "What is loaded is what was saved")
def test_files_keep_every_bit(tmp_path):
  neighbors = ranger.neighbors.weigh(small(), kernel="gaussian")
  features = np.random.default_rng(0).standard_normal([60, 2])
  graph.save(tmp_path / "some.graph", neighbors, features=features)
  loaded = graph.load(tmp_path / "some.graph", features=features)
  for one, other in zip(loaded, neighbors, strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)
  assert [path.name for path in tmp_path.iterdir()] == ["some.graph"]


class Program:
  """Makes a file where it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (pathlib.Path.touch, (self.path,))


@pytest.mark.guarantees(
  "graph.load", "A damaged file, a foreign one, one of a later version, and"
)
def test_bad_files_are_refused(tmp_path):
  path = tmp_path / "some.graph"
  features = np.arange(120.0).reshape(60, 2)
  graph.save(path, small(), features=features)
  good = path.read_bytes()

  def refused(message, **arguments):
    with pytest.raises(ValueError, match=message) as caught:
      graph.load(path, **arguments)
    assert "some.graph" in str(caught.value)

  refused("other features", features=features + 1e-9)
  refused("other features", features=features.astype(np.float32))
  # One bit of the array of weights: of the file's own checksum, or of ours.
  path.write_bytes(good[:600] + bytes([good[600] ^ 1]) + good[601:])
  refused("damaged")
  path.write_bytes(good[: len(good) // 2])
  refused("not a graph|damaged")
  path.write_bytes(b"")
  refused("not a graph")
  with path.open("wb") as file:
    np.save(file, np.zeros(3))
  refused("not a graph")
  with path.open("wb") as file:
    np.savez(file, indices=np.zeros([2, 1]))
  refused("not a graph")
  with path.open("wb") as file:
    np.savez(file, format=np.array([Program(tmp_path / "ran"), None], object))
  refused("damaged")
  assert not (tmp_path / "ran").exists()
  with path.open("wb") as file:
    np.savez(file, format=np.array("optax_ranger.graph"), version=np.array(2))
  refused("has version 2")
  path.write_bytes(good)
  with np.load(path) as content:
    other = {**content, "weights": content["weights"] + 1}
  with path.open("wb") as file:
    np.savez(file, **other)
  refused("damaged: its checksum")


weights_of = jax.jit(graph.graph_weights)


@functools.cache
def weighed() -> ranger.Neighbors:
  labels = np.random.default_rng(2).integers(0, 2, 60)
  return ranger.neighbors.weigh(small(), kernel="gaussian", labels=labels)


@pytest.mark.guarantees(
  "graph.graph_weights", "The table is what example_weights gives for the whole"
)
def test_plan_equals_example_weights():
  neighbors = weighed()
  step = optax.chain(
    ranger.average_neighbors(normalize="graph"), ranger.aggregate_by_mean()
  )
  mean = np.asarray(neighbors.weights).sum(axis=1).mean()
  weights = jax.jit(
    lambda neighbors, mean: ranger.example_weights(
      step, 60, neighbors=neighbors, graph_weight=mean
    )
  )(neighbors, mean)
  table = np.asarray(weights_of(neighbors).table)
  np.testing.assert_allclose(table / 60, weights, rtol=1e-5)
  assert float(table.mean()) == pytest.approx(1, rel=1e-5)


@jax.jit
def averaged(values, neighbors):
  """Whole rows of the graph."""
  step = ranger.average_neighbors(normalize="graph")
  mean = neighbors.weights.sum(axis=1).mean()
  given = {"neighbors": neighbors, "graph_weight": mean}
  return step.update(values, step.init(values), **given)[0]


@pytest.mark.guarantees(
  "graph.batch_weights", "The three have the same expectation, and another scaling"
)
@pytest.mark.parametrize(
  ("way", "k"),
  [("fetched", None), ("fetched", 2), ("in_batch", None), ("amortized", None)],
)
def test_expectations_agree(way, k):
  """Over 4,000 batches the mean is that of the graph; other scalings are not."""
  n, size, count = 60, 16, 4000
  values = 1 + np.random.default_rng(0).standard_normal(n).astype(np.float32)
  expected = np.asarray(averaged(values, weighed())).mean()
  whole = weights_of(weighed())

  @jax.jit
  @jax.vmap
  def one(key):
    order, draw = jax.random.split(key)
    ids = jax.random.choice(order, n, [size], replace=False)
    found = graph.batch_weights(whole, ids, way, key=draw, k=k)
    picked = jnp.asarray(values)[found.ids]
    return (found.weights * picked).sum(), found.weights.sum()

  sums, totals = map(np.asarray, one(jax.random.split(jax.random.key(0), count)))
  error = sums.std() / np.sqrt(count)
  assert abs(sums.mean() - expected) < 4 * error
  assert abs(totals.mean() - 1) < 4 * totals.std() / np.sqrt(count) + 1e-5
  wrong = {"in_batch": (size - 1) / (n - 1), "fetched": (1 + 2 / 4) / 2}
  assert abs(wrong.get(way, 0.9) * sums.mean() - expected) > 8 * error
  # The batch drawn with replacement, or n / B: five per cent off at these sizes.
  if way == "in_batch":
    assert abs((n / size) / ((n - 1) / (size - 1)) * sums.mean() - expected) > 4 * error


def test_pay_refuses():
  whole = weights_of(small())
  with pytest.raises(ValueError, match="way must be one of"):
    graph.batch_weights(whole, np.arange(4), "borrowed")
  with pytest.raises(ValueError, match="needs key="):
    graph.batch_weights(whole, np.arange(4), "fetched", k=2)
  with pytest.raises(ValueError, match="at least 2 examples"):
    graph.batch_weights(whole, np.arange(1), "in_batch")


def test_empty_places_cost_nothing():
  neighbors = small()
  indices = np.asarray(neighbors.indices).copy()
  indices[4] = -1, 60, -1, -1
  weights = np.asarray(neighbors.weights).copy()
  weights[5, 0], weights[6, 2] = np.nan, np.inf
  found = ranger.Neighbors(indices, neighbors.distances, weights)
  whole = graph.graph_weights(found)
  ids = np.array([4, 9])
  fetched = jax.jit(lambda whole: graph.batch_weights(whole, ids, "fetched"))(whole)
  weights = np.asarray(fetched.weights)
  assert weights[0] == 0
  assert not weights[2:6].any()
  np.testing.assert_allclose(weights[6:].sum(), weights[1], rtol=1e-5)
  assert weights[1] > 0
  assert np.asarray(whole.table).sum() == pytest.approx(60, rel=1e-5)


def test_refresh_keeps_types_and_shardings():
  data = np.random.default_rng(0).standard_normal([60, 3]).astype(np.float32)
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
  split = jax.NamedSharding(mesh, jax.P("data"))
  previous = small()
  previous = previous._replace(weights=previous.weights.astype(jnp.bfloat16))
  previous = jax.device_put(previous, split)
  same = lambda params, batch: params * batch
  found = graph.refresh(same, np.float32(1), data, previous, metric="cosine")
  for new, old in zip(found, previous, strict=True):
    assert new.dtype == old.dtype
    assert new.sharding.is_equivalent_to(old.sharding, 2)
  expected = graph.build(data, 4, metric="cosine")
  np.testing.assert_array_equal(found.indices, expected.indices)


@pytest.mark.guarantees(
  "graph.refresh", "A step that takes neighbors as an argument is traced once"
)
def test_refresh_compiles_nothing_again():
  rng = np.random.default_rng(0)
  data = {"x": rng.standard_normal([60, 2]).astype(np.float32)}
  labels = jnp.asarray(rng.integers(0, 2, 60))
  traces = {"features": 0, "step": 0}

  def features_of(params, batch):
    traces["features"] += 1
    return jnp.tanh(batch["x"] @ params)

  def losses(params, batch):
    logits = jnp.tanh(batch["x"] @ params)[:, :2]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

  @jax.jit
  def step(params, batch, neighbors):
    traces["step"] += 1
    weights = graph.graph_weights(neighbors).table
    loss = lambda params: (weights * losses(params, batch)).mean()
    return params - 0.5 * jax.grad(loss)(params)

  params = jnp.asarray(rng.standard_normal([2, 3]).astype(np.float32))
  weigh = lambda found: ranger.neighbors.weigh(found, labels=labels)
  neighbors = weigh(graph.build(data["x"], 4, backend="jax"))
  first, batch = neighbors, {**data, "label": labels}
  for _ in range(3):
    params = step(params, batch, neighbors)
    neighbors = graph.refresh(
      features_of, params, data, neighbors, weigh=weigh, batch_size=32, backend="faiss"
    )
    features = np.tanh(data["x"] @ np.asarray(params))
    expected = weigh(graph.build(features, 4, backend="jax"))
    agree = (np.asarray(neighbors.indices) == np.asarray(expected.indices)).mean()
    assert agree > 0.99
  step(params, batch, neighbors)
  assert traces == {"features": 1, "step": 1}
  assert (np.asarray(first.indices) != np.asarray(neighbors.indices)).any()
  with pytest.raises(ValueError, match="data has 59 examples"):
    graph.refresh(features_of, params, {"x": data["x"][:59]}, neighbors)


@pytest.mark.guarantees("graph.NeighborBatches", "Every id comes once in an epoch")
def test_batches_visit_every_example():
  batches = graph.NeighborBatches(small(), 16, k=2, seed=3)
  epochs = [[next(batches) for _ in range(3)] for _ in range(2)]
  orders = [np.concatenate([batch["id"] for batch in epoch]) for epoch in epochs]
  assert all(len(set(order)) == 48 for order in orders)
  assert (orders[0] != orders[1]).any()
  neighbors = small()
  for batch in epochs[0]:
    assert batch["neighbor_weight"].dtype == np.float32
    np.testing.assert_allclose(batch["neighbor_weight"], np.full([16, 2], 0.5))
    for i, drawn in zip(batch["id"], batch["neighbor_id"], strict=True):
      assert len(set(drawn)) == 2
      assert set(drawn) <= set(np.asarray(neighbors.indices[i]))
  # Batches, and epochs, draw other places.
  places = [
    np.argwhere(np.asarray(neighbors.indices)[b["id"]] == b["neighbor_id"][:, :1])[:, 1]
    for b in (*epochs[0], *epochs[1])
  ]
  assert len({tuple(of_batch) for of_batch in places}) == 6


def test_all_neighbors_come_where_none_are_drawn():
  neighbors = jax.device_get(small())
  batch = next(graph.NeighborBatches(neighbors, 16))
  add = graph.add_neighbors(neighbors, id_key="row")
  element = add.random_map({"row": 7}, np.random.default_rng(0))
  assert element["row"] == 7
  for ids, found in ((batch["id"], batch), (7, element)):
    np.testing.assert_array_equal(found["neighbor_id"], neighbors.indices[ids])
    np.testing.assert_array_equal(found["neighbor_weight"], neighbors.weights[ids])


@pytest.mark.guarantees(
  "graph.NeighborBatches", "A pipeline that is restored from a checkpoint continues"
)
@pytest.mark.guarantees(
  "graph.add_neighbors", "A pipeline that is restored from a checkpoint continues"
)
@pytest.mark.parametrize("kind", ["numpy", "grain", "grain, batches"])
def test_pipelines_restore_the_same_tail(kind):
  """From the state after every batch on."""
  neighbors = small()
  if kind == "numpy":
    make = lambda: graph.NeighborBatches(neighbors, 16, k=2, seed=3)
  else:
    add = graph.add_neighbors(neighbors, k=2)
    ids = grain.MapDataset.range(60).seed(3).shuffle().repeat(3)
    ids = ids.map(lambda i: {"id": i})
    if kind == "grain":
      data = ids.random_map(add).to_iter_dataset().batch(16)
    else:
      data = ids.batch(16).random_map(add).to_iter_dataset()
    make = lambda: iter(data)
  iterator, states, outputs = make(), [], []
  for _ in range(8):
    states.append(iterator.get_state())
    outputs.append(next(iterator))
  for start, state in enumerate(states):
    again = make()
    again.set_state(state)
    for expected in outputs[start:]:
      actual = next(again)
      for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value)
  assert outputs[0]["neighbor_id"].shape == (16, 2)
  draws = [np.sort(output["id"]) for output in outputs[:2]]
  assert (draws[0] != draws[1]).any()
  # Draws differ from epoch to epoch: not always the same two of four.
  seen = {}
  for output in outputs:
    for i, drawn in zip(output["id"], output["neighbor_id"], strict=True):
      seen.setdefault(int(i), set()).add(tuple(drawn.tolist()))
      assert set(drawn.tolist()) <= set(np.asarray(neighbors.indices[int(i)]).tolist())
  assert max(len(drawn) for drawn in seen.values()) > 1


def test_pipelines_refuse(monkeypatch):
  with pytest.raises(ValueError, match="k must be at most the 4"):
    graph.NeighborBatches(small(), 8, k=5)
  with pytest.raises(ValueError, match="batch_size must be at most n = 60"):
    graph.NeighborBatches(small(), 61)
  batches = graph.NeighborBatches(small(), 8)
  with pytest.raises(ValueError, match=r"state\['seed'\] must be 0, got 1"):
    batches.set_state({"epoch": 0, "batch": 0, "seed": 1})
  monkeypatch.setitem(sys.modules, "grain", None)
  with pytest.raises(ImportError, match=r"optax-ranger\[grain\]"):
    graph.add_neighbors(small())


def test_balance_refuses_classes_beyond_their_number():
  with pytest.raises(ValueError, match="num_classes"):
    graph.balance_classes(small(), np.repeat([0, 1, 7], 20), 3)


BITS = np.random.default_rng(0).integers(0, 2, 60)


@pytest.mark.parametrize(
  "labels", [BITS.tolist(), np.array(["a", "b"])[BITS]], ids=["list", "strings"]
)
def test_labels_as_people_have_them(labels):
  as_people = graph.audit(small(), labels)
  as_integers = graph.audit(small(), BITS)
  np.testing.assert_array_equal(as_people.order, as_integers.order)


@pytest.mark.guarantees(
  "graph.audit", "Examples without a label come last and have no vote"
)
@pytest.mark.parametrize("beliefs", [None, "given"])
@pytest.mark.parametrize("balance", [False, True])
def test_audit_of_unlabeled_examples(beliefs, balance):
  """The same as a graph without them where labels vote; never suspicious."""
  rng = np.random.default_rng(0)
  neighbors, labels = small(), rng.integers(0, 3, 60)
  labels[::4] = -1
  beliefs = rng.dirichlet(np.ones(3), 60) if beliefs else None
  found = graph.audit(
    neighbors, labels, beliefs=beliefs, balance=balance, num_classes=3
  )
  last = found.order[-np.isnan(found.margin).sum() :]
  assert set(last) >= set(range(0, 60, 4))
  assert np.isnan(found.support[::4]).all()
  assert np.isnan(found.margin[::4]).all()
  indices = np.array(neighbors.indices)
  if beliefs is None:
    indices[labels[indices] < 0] = -1
  alone = graph.audit(
    neighbors._replace(indices=indices),
    np.maximum(labels, 0),
    beliefs=beliefs,
    balance=balance,
    num_classes=3,
  )
  np.testing.assert_array_equal(found.support[labels >= 0], alone.support[labels >= 0])
  voted = (indices[::4] >= 0).any(axis=1)
  assert voted.sum() > 10
  assert (found.suggested[::4][voted] >= 0).all()


def test_audit_of_nothing_labeled():
  found = graph.audit(small(), np.full(60, -1))
  np.testing.assert_array_equal(found.suggested, np.full(60, -1))
  np.testing.assert_array_equal(found.order, np.arange(60))


@pytest.mark.guarantees(
  "graph.audit", "It equals counting by hand, with groups too; so do margin"
)
@pytest.mark.parametrize("kind", ["integers", "names", "hashes"])
def test_audit_leaves_out_the_same_group(kind):
  neighbors, rng = small(k=9), np.random.default_rng(0)
  labels, source = rng.integers(0, 3, 60), rng.integers(0, 12, 60)
  source[:5] = -1
  groups = {
    "integers": source,
    "names": [None if i < 0 else f"patient {i}" for i in source],
    "hashes": np.where(source < 0, -1, source * 2**33),
  }[kind]
  found = graph.audit(neighbors, labels, groups=groups)
  for i in range(60):
    others = [j for j in np.asarray(neighbors.indices[i]) if j != i]
    voters = [labels[j] for j in others if source[i] < 0 or source[j] != source[i]]
    wanted = np.mean(np.array(voters) == labels[i])
    assert found.support[i] == pytest.approx(wanted, rel=1e-6)
  whole = graph.audit(neighbors, labels, groups=np.zeros(60, int))
  assert np.isnan(whole.support).all()
  with pytest.raises(ValueError, match=r"groups must have shape \[60\], got \[3\]"):
    graph.audit(neighbors, labels, groups=[1, 2, 3])


@pytest.mark.guarantees(
  "graph.balance_classes", "Examples without a label change nothing"
)
def test_balance_ignores_unlabeled():
  weighed = ranger.neighbors.weigh(small(), kernel="gaussian")
  labels = np.random.default_rng(0).integers(0, 3, 60)
  labels[::5] = -1
  for given in (
    labels,
    jnp.asarray(labels),
    [f"{i}" if i >= 0 else None for i in labels],
  ):
    balanced = graph.balance_classes(weighed, given, 3)
    before, after = (np.asarray(x.weights.sum(axis=1)) for x in (weighed, balanced))
    np.testing.assert_array_equal(after[labels < 0], before[labels < 0])
    mean = before[labels >= 0].mean()
    for one in range(3):
      assert after[labels == one].mean() == pytest.approx(mean, rel=1e-5)
  traced = jax.jit(lambda labels: graph.balance_classes(weighed, labels, 3))(labels)
  np.testing.assert_allclose(traced.weights, balanced.weights, rtol=1e-6)


@pytest.mark.parametrize(
  "labels", [np.full(60, 3), np.arange(60), [f"{i % 4}" for i in range(60)]]
)
def test_gaps_are_refused(labels):
  for call in (
    lambda: graph.balance_classes(small(), labels, 3),
    lambda: graph.audit(small(), labels, num_classes=3),
  ):
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got"):
      call()


@pytest.mark.parametrize("way", ["fetched", "in_batch", "amortized"])
def test_wide_ids_pay_for_nobody(way):
  whole = weights_of(small())
  weights = lambda ids, way: np.asarray(
    jax.jit(lambda: graph.batch_weights(whole, ids, way).weights)()
  )
  found = weights(np.array([2**32 + 5, 4, -3, 60]), way)
  assert found[0] == found[2] == 0
  alone = weights(np.array([4]), "amortized")
  if way == "amortized":
    np.testing.assert_allclose(found, [0, alone[0] / 4, 0, 0])


def test_who_stands_for_no_example_is_nobodys_neighbor():
  points = np.array([[0.0], [1.0], [3.0]])
  whole = weights_of(graph.build(points, 1, backend="jax"))
  of = jax.jit(lambda ids: graph.batch_weights(whole, ids, "in_batch").weights)
  np.testing.assert_array_equal(of(np.array([1, 7])), [0, 0])
  found, expected = of(np.array([1, -1, 0])), np.asarray(of(np.array([1, 0])))
  np.testing.assert_allclose(found, [expected[0] / 3, 0, expected[1] / 3], rtol=1e-6)

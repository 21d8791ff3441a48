"""Audits by held-out predictions, by what training has seen, and by all of these."""

import functools

import jax
import numpy as np
import pytest
from scipy import optimize
from scipy import sparse

from optax_ranger import graph
from optax_ranger.graph import _audit
from optax_ranger.graph import _held_out
from optax_ranger.graph import _posterior


def blobs(n: int = 2000, classes: int = 5, apart: float = 2.5, seed: int = 0):
  """Points around a few centers, as far apart as some of them overlap."""
  rng = np.random.default_rng(seed)
  true = rng.integers(0, classes, n)
  centers = apart * np.eye(classes, 6)
  return (centers[true] + rng.standard_normal([n, 6])).astype(np.float32), true


@functools.cache
def graph_of_blobs(n: int = 2000, apart: float = 2.5):
  """One for all tests of the same points; they do not change it."""
  return graph.build(blobs(n, apart=apart)[0], 20, progress=False)


def flip(true, noise: str, share: float, classes: int = 5, seed: int = 1):
  rng = np.random.default_rng(seed)
  by = rng.integers(1, classes, len(true)) if noise == "symmetric" else 1
  return np.where(rng.random(len(true)) < share, (true + by) % classes, true)


def missed(found, given, true) -> float:
  """The share of wrong labels that are not among as many flagged."""
  wrong = given != true
  return 1 - wrong[found.order[: wrong.sum()]].mean()


@pytest.mark.guarantees(
  "graph.audit", "It equals counting by hand, with groups too; so do margin"
)
def test_audit_of_what_training_has_seen():
  rng = np.random.default_rng(0)
  points = rng.standard_normal([30, 2])
  neighbors = graph.build(points, 4, backend="jax")
  labels, predictions = rng.integers(0, 3, 30), rng.random([30, 3])
  counts, visits = rng.integers(0, 5, 30), rng.integers(1, 9, 30)
  shares = predictions / predictions.sum(axis=1, keepdims=True)
  votes = np.eye(3)[labels][np.asarray(neighbors.indices)].mean(axis=1)
  for score, rows in (("margin", shares), ("mean", (shares + votes) / 2)):
    found = graph.audit(neighbors, labels, predictions=predictions, score=score)
    for i, label in enumerate(labels):
      others = max(rows[i, c] for c in range(3) if c != label)
      assert found.support[i] == pytest.approx(rows[i, label], rel=1e-6)
      assert found.margin[i] == pytest.approx(rows[i, label] - others, abs=1e-6)
      best = label if rows[i, label] >= others else rows[i].argmax()
      assert found.suggested[i] == best
    np.testing.assert_array_equal(found.order, np.argsort(found.margin, kind="stable"))
  past = {"contradicted": counts, "visits": visits, "score": "contradicted"}
  # How many are wrong does not depend on the score.
  with_both = graph.audit(neighbors, labels, predictions=predictions, **past)
  assert with_both.num_wrong == pytest.approx(found.num_wrong, rel=1e-5)
  found = graph.audit(None, labels, **past)
  agreed = np.maximum(visits - counts, 0)
  np.testing.assert_allclose(found.support, (agreed + 0.5) / (visits + 1), rtol=1e-6)
  np.testing.assert_allclose(found.margin, 2 * found.support - 1, atol=1e-6)
  np.testing.assert_array_equal(found.order, np.argsort(found.support, kind="stable"))
  np.testing.assert_array_equal(found.suggested, labels)
  assert np.isnan(found.num_wrong)
  bad = np.array([np.nan, np.inf, -1, 2, *counts[4:]], np.float32)
  none = np.where(np.arange(30) == 4, np.inf, visits)
  none[3], labels[5] = 0, -1
  found = graph.audit(None, labels, contradicted=bad, visits=none, score="contradicted")
  assert set(found.order[-5:]) == {0, 1, 3, 4, 5}
  assert np.isnan(found.support[[0, 1, 3, 4, 5]]).all()
  assert found.support[2] == pytest.approx((visits[2] + 0.5) / (visits[2] + 1))
  found = graph.audit(None, labels, contradicted=counts, visits=9, score="contradicted")
  np.testing.assert_allclose(found.support[6:], (9.5 - counts[6:]) / 10, rtol=1e-6)


@pytest.mark.guarantees(
  "graph.audit", "With the true chances of the labels, the posterior is that"
)
def test_posterior_is_that_of_bayes():
  """Chances of labels of known classes and known noise: the label's own chance."""
  rng = np.random.default_rng(0)
  confusion = np.array([[0.7, 0.3, 0.0], [0.0, 0.8, 0.2], [0.1, 0.1, 0.8]])
  beliefs = np.concatenate(
    [np.repeat(np.eye(3), 3000, axis=0), rng.dirichlet(np.ones(3), 3000)]
  )
  chances = beliefs @ confusion
  labels = (rng.random([len(chances), 1]) > chances.cumsum(axis=1)).sum(axis=1)
  found = graph.audit(None, labels, predictions=chances, score="posterior")
  rows = np.arange(len(labels))
  wanted = beliefs * confusion[:, labels].T
  wanted = wanted / wanted.sum(axis=1, keepdims=True)
  right = wanted[rows, labels]
  assert np.abs(found.support - right).mean() < 0.03
  assert found.num_wrong == pytest.approx((1 - right).sum(), rel=0.1)
  agree = found.suggested == np.where(right > 0.5, labels, wanted.argmax(axis=1))
  assert agree.mean() > 0.95
  # What is suggested for examples without a label is their likeliest class.
  unlabeled = np.where(np.arange(len(labels)) % 9, labels, -1)
  found = graph.audit(None, unlabeled, predictions=chances, score="posterior")
  agree = found.suggested[::9] == beliefs[::9].argmax(axis=1)
  assert agree.mean() > 0.95
  # The votes of neighbors, or a prediction's margin, are not that.
  margin = graph.audit(None, labels, predictions=chances, score="margin")
  assert np.abs(margin.support - right).mean() > 0.1


@pytest.mark.guarantees(
  "graph.audit", 'score="posterior" estimates the share of wrong labels'
)
@pytest.mark.parametrize(
  ("noise", "share"),
  [
    ("symmetric", 0.0),
    ("symmetric", 0.2),
    ("symmetric", 0.4),
    ("symmetric", 0.6),
    ("pairs", 0.2),
    ("pairs", 0.35),
  ],
)
def test_audit_tells_how_many_are_wrong(noise, share):
  points, true = blobs(4000, apart=4.0)
  given = flip(true, noise, share)
  predictions = graph.held_out_predictions(points, given, width=100)
  neighbors = graph_of_blobs(4000, apart=4.0)
  wrong = (given != true).mean()
  for witnesses in (neighbors, None):
    found = graph.audit(witnesses, given, predictions=predictions, score="posterior")
    assert found.num_wrong / 4000 == pytest.approx(wrong, abs=0.04)
    # It is the sum of the chances that labels are wrong.
    assert found.num_wrong == pytest.approx((1 - found.support).sum(), rel=1e-4)
  votes = graph.audit(neighbors, given)
  assert votes.num_wrong / 4000 == pytest.approx(wrong, abs=0.08)


def test_posterior_finds_wrong_labels_of_look_alikes():
  _, true = blobs()
  given = flip(true, "pairs", 0.4)
  neighbors = graph_of_blobs()
  votes = missed(graph.audit(neighbors, given), given, true)
  posterior = missed(graph.audit(neighbors, given, score="posterior"), given, true)
  assert posterior < votes - 0.05


def test_the_better_witness_counts_more():
  points, true = blobs()
  given = flip(true, "symmetric", 0.3)
  blind = graph.build(np.random.default_rng(0).standard_normal([2000, 6]), 20)
  good = graph.held_out_predictions(points, given, width=100)
  alone = graph.audit(None, given, predictions=good, score="posterior")
  both = graph.audit(blind, given, predictions=good, score="posterior")
  useless = missed(graph.audit(blind, given, score="posterior"), given, true)
  assert useless > 0.5
  together = missed(both, given, true)
  assert together < missed(alone, given, true) + 0.01
  assert missed(alone, given, true) < 0.2


def test_weights_make_the_labels_the_likeliest():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, 500)
  good = (np.eye(4)[labels] + rng.standard_normal([500, 4])).astype(np.float32)
  poor = rng.standard_normal([500, 4]).astype(np.float32)
  against = -good + 0.3 * poor

  def loss(weights, scores):
    total = sum(w * s for w, s in zip(weights, scores, strict=True))
    chosen = total[np.arange(500), labels]
    return (np.log(np.exp(total).sum(axis=1)) - chosen).mean(dtype=np.float64)

  for scores in ([good], [good, poor], [poor, against], [good, against, poor]):
    found = _posterior.weigh(scores, labels)
    best = optimize.minimize(
      loss, np.ones(len(scores)), (scores,), bounds=[(0, 10)] * len(scores)
    )
    assert loss(found, scores) == pytest.approx(best.fun, abs=1e-4)
    assert (found >= 0).all()
  # Predictions that agree with every label have no finite weight.
  certain = np.eye(4, dtype=np.float32)[labels]
  assert np.isfinite(_posterior.weigh([certain], labels)).all()


def test_few_anchors_draw_wrong_labels_to_an_even_share():
  rng = np.random.default_rng(0)
  draw = lambda row, size: rng.multinomial(size, row).astype(float)
  even = np.full([10, 10], 0.4 / 9)
  np.fill_diagonal(even, 0.6)
  pairs = 0.6 * np.eye(10) + 0.4 * np.roll(np.eye(10), 1, axis=1)
  off = ~np.eye(10, dtype=bool)
  for matrix, near in ((even, 0.02), (pairs, 0.02)):
    counts = np.stack([draw(row, 50) for row in matrix])
    found = _posterior._shrunken(counts, counts.sum(axis=1))
    np.testing.assert_allclose(found.sum(axis=1), 1)
    shares = found / found.sum(axis=1, where=off, keepdims=True)
    wanted = matrix / matrix.sum(axis=1, where=off, keepdims=True)
    assert np.abs((shares - wanted)[off]).mean() < near
    # Twice as many anchors of half the weight are as many.
    again = _posterior._shrunken(counts / 2, counts.sum(axis=1) / 4)
    np.testing.assert_allclose(again, found)
  nothing = _posterior._shrunken(np.zeros([4, 4]), np.zeros(4))
  np.testing.assert_array_equal(nothing, np.eye(4))


@pytest.mark.guarantees(
  "graph.audit", "Examples without neighbors or predictions come last and"
)
def test_bad_predictions_poison_nobody():
  points, true = blobs(600)
  given = flip(true, "symmetric", 0.3)
  predictions = graph.held_out_predictions(points, given, width=50)
  bad = predictions.copy()
  bad[0], bad[1], bad[2, 0], bad[3] = np.nan, np.inf, -1.0, 0.0
  given[5] = -1
  neighbors = graph.build(points, 10, progress=False)
  for score in ("posterior", "margin"):
    found = graph.audit(None, given, predictions=bad, score=score)
    kept = np.r_[4:600]
    alone = graph.audit(
      None, given[kept], predictions=predictions[kept], score=score, num_classes=5
    )
    np.testing.assert_allclose(found.support[kept], alone.support, atol=1e-4)
    assert found.num_wrong == pytest.approx(alone.num_wrong, rel=1e-4)
    assert np.isnan(found.support[[0, 1, 2, 3, 5]]).all()
    assert set(found.order[-5:]) == {0, 1, 2, 3, 5}
    np.testing.assert_array_equal(found.suggested[:4], given[:4])
    assert found.suggested[5] >= 0
  for score in ("posterior", "mean"):
    found = graph.audit(neighbors, given, predictions=bad, score=score)
    assert np.isfinite(found.support[:4]).all()
  votes = graph.audit(neighbors, given)
  np.testing.assert_allclose(
    graph.audit(neighbors, given, predictions=bad, score="mean").support[:4],
    votes.support[:4],
  )
  # Without neighbors, the mean is that of the predictions alone.
  indices = np.array(neighbors.indices)
  indices[7] = -1
  lonely = neighbors._replace(indices=indices)
  mean = graph.audit(lonely, given, predictions=bad, score="mean")
  margin = graph.audit(None, given, predictions=bad, score="margin")
  assert mean.support[7] == pytest.approx(margin.support[7])
  nothing = graph.audit(None, given, predictions=np.zeros([600, 5]), score="posterior")
  np.testing.assert_array_equal(nothing.order, np.arange(600))
  assert nothing.num_wrong == 0


def test_posterior_in_blocks(monkeypatch):
  points, true = blobs(600)
  given = flip(true, "symmetric", 0.3)
  neighbors = graph.build(points, 10, progress=False)
  predictions = graph.held_out_predictions(points, given, width=50)
  arguments = {"predictions": predictions, "score": "posterior"}
  whole = graph.audit(neighbors, given, **arguments)
  monkeypatch.setattr(_audit, "_CELLS", 700)
  parts = graph.audit(neighbors, given, **arguments)
  np.testing.assert_allclose(parts.support, whole.support, atol=1e-5)
  assert parts.num_wrong == pytest.approx(whole.num_wrong, rel=1e-5)
  monkeypatch.setattr(_held_out, "_CELLS", 700)
  again = graph.held_out_predictions(points, given, width=50)
  np.testing.assert_allclose(again, predictions, atol=1e-4)


def test_unlabeled_examples_teach_the_posterior_nothing(monkeypatch):
  """All labeled ones weigh the witnesses, or a sample of them."""
  points, true = blobs(600)
  given = flip(true, "symmetric", 0.3)
  given[:200] = -1
  predictions = graph.held_out_predictions(points, given, width=50)
  ask = lambda rows: graph.audit(
    None, given[rows], predictions=predictions[rows], score="posterior"
  )
  found = ask(np.s_[:])
  alone = ask(np.s_[200:])
  np.testing.assert_allclose(found.support[200:], alone.support, atol=1e-6)
  assert found.num_wrong == pytest.approx(alone.num_wrong, rel=1e-6)
  monkeypatch.setattr(_posterior, "_SAMPLE", 300)
  some = ask(np.s_[:])
  assert np.abs(some.support[200:] - alone.support).mean() < 0.05


@pytest.mark.parametrize("classes", [1, 2])
def test_posterior_of_few_classes(classes):
  points, true = blobs(300, 2, 4.0)
  given = np.zeros(300, int) if classes == 1 else flip(true, "symmetric", 0.2, 2)
  predictions = graph.held_out_predictions(points, given, width=50)
  assert predictions.shape == (300, classes)
  found = graph.audit(None, given, predictions=predictions, score="posterior")
  if classes == 1:
    np.testing.assert_array_equal(found.support, np.ones(300))
    assert found.num_wrong == 0
  else:
    assert missed(found, given, true) < 0.1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"score": "best"}, "score must be one of 'votes', .*got 'best'"),
    ({}, "score='votes' needs neighbors, got None"),
    ({"score": "posterior"}, "needs neighbors or predictions, both are None"),
    ({"score": "margin"}, "score='margin' needs predictions, got None"),
    ({"score": "contradicted"}, "score='contradicted' needs contradicted, got None"),
    ({"contradicted": np.zeros(9)}, "belong together, but visits is None"),
    ({"contradicted": np.zeros(8), "visits": 3}, r"must have shape \[9\], got \[8\]"),
    ({"predictions": np.zeros(9)}, r"predictions must have shape \[9, C\], got \[9\]"),
    ({"predictions": np.zeros([8, 2])}, r"labels must have shape \[8\]"),
    (
      {"predictions": np.ones([9, 2]), "score": "margin", "balance": True},
      "balance=True divides votes: it needs score='votes', got 'margin'",
    ),
    (
      {"predictions": np.ones([9, 2]), "score": "margin", "groups": np.zeros(9, int)},
      "groups leave out votes of neighbors, but neighbors are None",
    ),
  ],
)
def test_scores_without_witnesses_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    graph.audit(None, np.zeros(9, int), **arguments)


@pytest.mark.guarantees(
  "graph.held_out_predictions",
  "Each row is the prediction of a fit without its example",
)
@pytest.mark.parametrize("n", [40, 300])
def test_held_out_predictions_equal_refitting(n):
  """By the columns' Gramian and, of fewer examples, by their inner products."""
  points, true = blobs(n)
  given = flip(true, "symmetric", 0.3)
  everyone = np.arange(n)
  columns = _held_out._columns(_held_out._Rows(points, False), everyone, 100, 1.0, 0)
  fit = _held_out._fit(columns, everyone, given, 5, lambda parts: parts)
  found = _held_out._held_out(fit, columns(everyone) @ fit.directions, given, 2.0)
  table = columns(everyone).astype(np.float64)
  for i in range(0, n, 7):
    others = everyone != i
    gramian = table[others].T @ table[others] + 2.0 * np.eye(columns.number)
    slopes = np.linalg.solve(gramian, table[others].T @ np.eye(5)[given[others]])
    np.testing.assert_allclose(found[i], table[i] @ slopes, atol=2e-4)
  # The last one, had it no label: the fit has not seen it.
  fit = _held_out._fit(columns, everyone[others], given, 5, lambda parts: parts)
  along = columns(everyone[i : i + 1]) @ fit.directions
  unlabeled = _held_out._held_out(fit, along, np.array([-1]), 2.0)
  np.testing.assert_allclose(unlabeled[0], table[i] @ slopes, atol=2e-4)


def test_few_features_are_columns_too():
  points, true = blobs(300)
  number = lambda rows, width: (
    _held_out._columns(
      _held_out._Rows(rows, sparse.issparse(rows)), np.arange(300), width, 1.0, 0
    ).number
  )
  assert number(points, 12) == 12 + 1 + 6
  assert number(points, 11) == 11 + 1
  assert number(sparse.csr_array(points), 12) == 12 + 1
  seeds = [graph.held_out_predictions(points, true, width=9, seed=s) for s in (0, 1)]
  assert (seeds[0] != seeds[1]).any()


def test_predictions_are_as_sharp_as_the_labels_allow():
  points, true = blobs(300)
  given = flip(true, "symmetric", 0.3)
  predictions = graph.held_out_predictions(points, given, width=50)

  def loss(power):
    rows = predictions.astype(np.float64) ** power
    return -np.log(rows[np.arange(300), given] / rows.sum(axis=1)).mean()

  assert loss(1) < min(loss(0.9), loss(1.1))


@pytest.mark.guarantees(
  "graph.held_out_predictions",
  "An example's row does not depend on its own label, when",
)
def test_own_labels_are_not_seen():
  points, true = blobs(300)
  columns = _held_out._columns(
    _held_out._Rows(points, False), np.arange(300), 50, 1.0, 0
  )

  def row(given):
    fit = _held_out._fit(columns, np.arange(300), given, 5, lambda parts: parts)
    along = columns(np.arange(300)) @ fit.directions
    return _held_out._held_out(fit, along, given, 1.0)[7]

  other = true.copy()
  other[7] = (true[7] + 1) % 5
  np.testing.assert_allclose(row(true), row(other), atol=1e-4)
  other[8] = (true[8] + 1) % 5
  assert np.abs(row(true) - row(other)).max() > 1e-4


@pytest.mark.guarantees(
  "graph.held_out_predictions",
  "Non-finite rows and examples without a label do not change",
)
def test_bad_rows_teach_nothing():
  points, true = blobs(300)
  names = np.array([f"class {label}" for label in true], object)
  predictions = graph.held_out_predictions(points, names, width=50)
  more = np.concatenate([points, points[:4]]).astype(np.float64)
  more[300], more[301, 2], more[302, 0] = np.nan, np.inf, 1e300
  longer = graph.held_out_predictions(more, [*names, *names[:3], None], width=50)
  np.testing.assert_allclose(longer[:300], predictions, atol=1e-5)
  np.testing.assert_array_equal(longer[300:303], 0)
  assert longer[303].argmax() == true[3]
  # Of sparse rows too, where zeros are not stored.
  points, more = (sparse.csr_array(np.maximum(rows, 0)) for rows in (points, more))
  predictions = graph.held_out_predictions(points, names, width=50)
  of_sparse = graph.held_out_predictions(more, [*names, *names[:3], None], width=50)
  np.testing.assert_allclose(of_sparse[:300], predictions, atol=1e-5)
  np.testing.assert_array_equal(of_sparse[300:303], 0)
  np.testing.assert_allclose(longer[303].sum(), 1, rtol=1e-5)
  nobody = graph.held_out_predictions(np.full([3, 2], np.nan), [0, 1, 1])
  np.testing.assert_array_equal(nobody, np.zeros([3, 2]))


@pytest.mark.parametrize(
  ("what", "good", "bad"), [("_RIDGES", 3.0, 1e9), ("_SCALES", 1.0, 1e-6)]
)
def test_the_better_ridge_and_kernel_are_chosen(what, good, bad, monkeypatch):
  points, true = blobs(300)
  found = {}
  for among in ((good,), (good, bad), (bad, good), (bad,)):
    monkeypatch.setattr(_held_out, what, among)
    found[among] = graph.held_out_predictions(points, true, width=50)
  np.testing.assert_array_equal(found[good, bad], found[(good,)])
  np.testing.assert_array_equal(found[bad, good], found[(good,)])
  assert np.abs(found[(bad,)] - found[(good,)]).max() > 0.1


@pytest.mark.parametrize(
  "change",
  [
    lambda points: points.astype(np.float64) * 1e9,
    lambda points: np.round(points * 100).astype(np.int64),
    jax.numpy.asarray,
    lambda points: sparse.csr_matrix(np.maximum(points, 0)),
    lambda points: np.concatenate([points, np.ones([2000, 40])], axis=1),
  ],
  ids=["float64", "int64", "jax", "sparse", "wide"],
)
def test_held_out_predictions_of_any_features(change):
  points, true = blobs(apart=4.0)
  given = flip(true, "symmetric", 0.3)
  found = graph.held_out_predictions(change(points), given, width=60)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
  assert (found.argmax(axis=1) == true).mean() > 0.9


@pytest.mark.parametrize(
  ("features", "arguments", "message"),
  [
    (np.zeros(4), {}, r"features must have shape \[n, d\].*got \[4\]"),
    (np.zeros([4, 2], complex), {}, "features must be real, got complex128"),
    (np.zeros([4, 2]), {"width": 0}, "width must be .*got 0"),
    (np.zeros([4, 2]), {"width": 2.0}, "width .*Python integer, got 2.0"),
    (np.zeros([4, 2]), {"num_classes": 1}, r"labels must lie in \[0, 1\), got 1"),
    (np.zeros([3, 2]), {}, r"labels must have shape \[3\]"),
  ],
)
def test_held_out_refusals(features, arguments, message):
  with pytest.raises((TypeError, ValueError), match=message):
    graph.held_out_predictions(features, [0, 1, 1, 0], **arguments)


def test_labels_flipped_with_our_seed_are_no_sample_of_ours():
  rng = np.random.default_rng(0)
  n = 12_000  # More than the examples that choose.
  wrong = rng.choice(n, round(0.4 * n), replace=False)
  true = np.arange(n) % 3
  points = 4 * np.eye(3)[true] + np.random.default_rng(1).normal(size=[n, 3])
  given = true.copy()
  given[wrong] = (given[wrong] + rng.integers(1, 3, len(wrong))) % 3
  predictions = graph.held_out_predictions(points, given, width=100)
  assert (predictions.argmax(axis=1) == true).mean() > 0.95
  found = graph.audit(None, given, predictions=predictions, score="posterior")
  assert abs(found.num_wrong / n - 0.4) < 0.05

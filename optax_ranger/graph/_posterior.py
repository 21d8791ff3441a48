"""The chance that each label is right, given what others say of its example."""

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any
from typing import NamedTuple

import numpy as np

from optax_ranger._core import draws

_SAMPLE = 20_000  # examples that weigh the witnesses
_SHARPNESS = 8  # of anchors, that of `labels.label_confusion`
_ROUNDS = 20  # from labels to classes
_HEAVIEST = 10.0

# Of some examples, the scores of each witness: a list of float32 [count, C], on a
# scale of logarithms. A row of NaN says nothing.
Scores = Callable[[Any], list[np.ndarray]]


class Model(NamedTuple):
  """How witnesses are weighed, and how classes get their labels.

  Attributes:
    weights: ``float64 [witnesses]``, what the scores are multiplied by.
    confusion: ``float32 [C, C]``, the chance of each label, given the class.
  """

  weights: np.ndarray
  confusion: np.ndarray


def fit(
  scores: Scores, given: np.ndarray, num_classes: int, blocks: Callable[[str], Iterable]
) -> Model:
  """Weighs the witnesses by how well they predict the labels, then finds anchors."""
  usable = np.flatnonzero(given >= 0)
  if len(usable) > _SAMPLE:
    chosen = draws.generator(0).choice(len(usable), _SAMPLE, replace=False)
    usable = usable[np.sort(chosen)]
  weights = weigh([_known(one)[0] for one in scores(usable)], given[usable])

  def rows(part: slice) -> tuple[np.ndarray, np.ndarray]:
    labels = _labels(weights, scores(part))
    kept = (given[part] >= 0) & ~np.isnan(labels[:, 0])
    return labels[kept], given[part][kept]

  peak = np.zeros([num_classes], np.float32)
  for part in blocks("anchors"):
    labels, _ = rows(part)
    peak = np.maximum(peak, labels.max(axis=0, initial=0))
  counts = np.zeros([num_classes, num_classes])
  squares = np.zeros([num_classes])
  for part in blocks("confusion"):
    labels, own = rows(part)
    anchors = (labels / np.where(peak > 0, peak, 1)) ** _SHARPNESS
    counts += (anchors.T @ np.eye(num_classes, dtype=np.float32)[own]).astype(float)
    squares += (anchors.astype(np.float64) ** 2).sum(axis=0)
  return Model(weights, _shrunken(counts, squares).astype(np.float32))


def judge(model: Model, scores: list[np.ndarray], own: np.ndarray) -> np.ndarray:
  """The chance of each class, given scores and label; NaN where there are none."""
  confusion = model.confusion
  labels = _labels(model.weights, scores)
  beliefs = labels.copy()
  tiny = np.finfo(np.float32).tiny
  for _ in range(_ROUNDS):
    expected = np.maximum(beliefs @ confusion, tiny)
    beliefs *= (labels / expected) @ confusion.T
    beliefs /= np.maximum(beliefs.sum(axis=1, keepdims=True), tiny)
  chances = np.where((own >= 0)[:, None], confusion.T[np.maximum(own, 0)], 1)
  posterior = beliefs * chances
  total = posterior.sum(axis=1, keepdims=True)
  posterior = np.where(total > 0, posterior / np.maximum(total, tiny), beliefs)
  return np.where(np.isnan(labels), np.nan, posterior)


def weigh(scores: list[np.ndarray], given: np.ndarray) -> np.ndarray:
  """The weights, not negative, under which the given labels are the likeliest.

  Newton's method with halved steps on a convex loss.
  """
  weights = np.ones([len(scores)])
  rows = np.arange(len(given))
  if not len(given):
    return weights

  def loss(weights: np.ndarray) -> float:
    total = _weighted(weights, scores)
    peak = total.max(axis=1)
    spread = np.log(np.exp(total - peak[:, None]).sum(axis=1))
    return float((peak + spread - total[rows, given]).mean(dtype=np.float64))

  value = loss(weights)
  for _ in range(30):
    chances = _softmax(_weighted(weights, scores))
    means = [(chances * one).sum(axis=1) for one in scores]
    slope = np.array(
      [
        (mean - one[rows, given]).mean(dtype=np.float64)
        for mean, one in zip(means, scores, strict=True)
      ]
    )
    curve = np.array(
      [
        [
          ((chances * one * other).sum(axis=1) - a * b).mean(dtype=np.float64)
          for a, one in zip(means, scores, strict=True)
        ]
        for b, other in zip(means, scores, strict=True)
      ]
    )
    free = np.flatnonzero((weights > 0) | (slope < 0))
    curve = curve[np.ix_(free, free)] + 1e-9 * np.eye(len(free))
    step = np.zeros_like(weights)
    step[free] = np.linalg.solve(curve, slope[free])
    for halvings in range(12):
      tried = np.clip(weights - step / 2**halvings, 0, _HEAVIEST)
      new = loss(tried)
      if new <= value:
        break
    else:
      return weights
    done = value - new <= 1e-7
    weights, value = tried, new
    if done:
      break
  return weights


def _weighted(weights: np.ndarray, scores: list[np.ndarray]) -> np.ndarray:
  total = np.zeros_like(scores[0])
  for weight, one in zip(weights, scores, strict=True):
    total += np.float32(weight) * one
  return total


def _softmax(total: np.ndarray) -> np.ndarray:
  total = np.exp(total - total.max(axis=1, keepdims=True))
  return total / total.sum(axis=1, keepdims=True)


def _labels(weights: np.ndarray, scores: list[np.ndarray]) -> np.ndarray:
  """The chance of each label; a row of NaN where no witness says anything."""
  filled, known = zip(*map(_known, scores), strict=True)
  labels = _softmax(_weighted(weights, list(filled)))
  labels[~np.any(known, axis=0)] = np.nan
  return labels


def _known(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Scores with zeros for rows of NaN, and which rows are none."""
  known = ~np.isnan(scores[:, 0])
  return np.where(known[:, None], scores, np.float32(0)), known


def _shrunken(counts: np.ndarray, squares: np.ndarray) -> np.ndarray:
  """Rows of a confusion matrix, wrong labels drawn to an even share.

  By as much as they don't differ by more than their few anchors explain: the
  moments of a Dirichlet-multinomial, pooled over rows. `counts` are sums of the
  anchors' weights by class and label, `squares` sums of their squares by class.
  """
  classes = len(counts)
  total = counts.sum(axis=1)
  known = total > 0
  rows = np.where(known[:, None], counts, np.eye(classes))
  rows = rows / rows.sum(axis=1, keepdims=True)
  if classes <= 2:
    return rows
  off = ~np.eye(classes, dtype=bool)
  wrong = np.where(off, rows, 0).sum(axis=1)
  size = wrong * total**2 / np.where(known, squares, 1)  # effective wrong anchors
  share = np.where(off, rows, 0) / np.where(wrong > 0, wrong, 1)[:, None]
  even = np.where(off, 1 / (classes - 1), 0)
  some = size > 0
  spread = (size * ((share - even) ** 2).sum(axis=1))[some].sum()
  least = (1 - 1 / (classes - 1)) * some.sum()
  if spread <= least:
    mixed = even
  else:
    most = (1 - 1 / (classes - 1)) * size[some].sum()
    prior = max(0.0, (most - spread) / (spread - least))
    mixed = size[:, None] * share + prior * even
    mixed = mixed / np.where(some, size + prior, 1)[:, None]
  return np.where(off, np.where(some, wrong, 0)[:, None] * mixed, rows)

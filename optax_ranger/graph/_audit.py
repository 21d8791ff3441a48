"""Wrong labels, found by neighbors, held-out predictions and the past of training."""

from typing import Any
from typing import NamedTuple

import numpy as np

from optax_ranger._core import labels as _labels
from optax_ranger._core import progress as _progress
from optax_ranger._core import validate
from optax_ranger._core.types import ArrayLike
from optax_ranger._core.types import Neighbors
from optax_ranger.graph import _posterior

SCORES = ("votes", "posterior", "margin", "mean", "contradicted")
_NEEDS = {
  "votes": ("neighbors",),
  "margin": ("predictions",),
  "mean": ("neighbors", "predictions"),
  "contradicted": ("contradicted",),
}
_CELLS = 2**22  # of a block of votes


class Audit(NamedTuple):
  """Examples by how suspicious their labels are.

  Attributes:
    order: ``int [n]``, all examples, the most suspicious first.
    support: ``float32 [n]``, how far the given label is backed, in [0, 1]: its
      share of the votes or of the prediction, or the chance that it is right; NaN
      where nothing is known, or where there is no label.
    margin: ``float32 [n]``, support less that of the strongest other class, in
      [-1, 1].
    suggested: ``int32 [n]``, the strongest class; the given one where it is among
      the strongest, and where nothing is known, -1 for none.
    classes: the names of classes 0, 1, ... where labels are names, so that
      ``classes[suggested]`` are names again; None where they are integers.
    num_wrong: how many labels are wrong, an estimate that needs no clean label;
      ``order[: round(num_wrong)]`` are they. NaN where only ``contradicted`` is
      known.
  """

  order: np.ndarray
  support: np.ndarray
  margin: np.ndarray
  suggested: np.ndarray
  classes: np.ndarray | None
  num_wrong: float


def audit(
  neighbors: Neighbors | None,
  labels: Any,
  *,
  score: str = "votes",
  predictions: ArrayLike | None = None,
  beliefs: ArrayLike | None = None,
  contradicted: ArrayLike | None = None,
  visits: ArrayLike | None = None,
  num_classes: int | None = None,
  balance: bool = False,
  groups: Any = None,
  progress: bool = True,
) -> Audit:
  r"""Ranks labels by how suspicious they are, and estimates how many are wrong.

  Neighbors and predictions are witnesses that have not seen an example's own label:
  ``score="posterior"`` weighs them, and finds wrong labels of look-alikes too,
  which votes hardly do. For predictions that *have* seen it, such as the smoothed
  ones of training, take ``"margin"``. It works while most labels of a class are
  right. On the host, in blocks.

  .. math::
    v_{ic} &= \sum_j w_{ij} b_{jc} / f_c, \qquad
    q_i \propto \exp\big(\alpha \log (v_i + \tfrac{1}{2}) + \beta \log p_i\big) \\
    q_i &= b_i T, \qquad
    \mathrm{posterior}_i(c) \propto b_i(c) \, T[c, y_i], \qquad
    \mathrm{num\_wrong} = \sum_i 1 - \mathrm{posterior}_i(y_i)

  q is the chance of each *label*. The weights :math:`\alpha, \beta \geq 0` make the
  given labels the likeliest. T, how classes get their labels, is estimated from
  the examples that are most confident of each class, with the sharpness of
  ``labels.label_confusion``, and its wrong labels are drawn to an even share where
  anchors are few. b, the chance of each *class*, is what explains q.

  Args:
    neighbors: ``[n, k]``; weights from distances, not from labels. None for
      scores that don't need them.
    labels: ``[n]``, the given ones: integers in [0, C) or names, of NumPy, JAX,
      pandas or Arrow, or a list. An example without a label (-1 or a missing value)
      has no vote and is never suspicious, but a class is suggested for it.
    score: what ranks the labels.
      ``"votes"``: the margin of the neighbors' votes.
      ``"posterior"``: the chance that the label is right, by neighbors,
      predictions, or both.
      ``"margin"``: that of the predictions. It can't tell look-alikes from wrong
      labels, and fails once training has memorized them.
      ``"mean"``: the margin of the mean of votes and predictions, which memorizing
      hurts less.
      ``"contradicted"``: the share of visits at which training contradicted the
      label, which remembers the time before memorizing.
    predictions: ``float [n, C]``, not negative, of any scale. For
      ``score="posterior"`` those of models that have not seen the label, such as
      ``held_out_predictions`` or cross-validation; ``smoothed_predictions`` for
      ``"margin"``. Rows of zeros, or not finite, are none.
    beliefs: ``float [n, C]`` or None: what neighbors vote; rows that are not finite
      don't vote. None: their given labels.
    contradicted: ``float [n]``, how often training predicted another class than the
      label; with ``visits``, a number or ``float [n]``, how often it visited the
      example. Support is ``(visits - contradicted + 1/2) / (visits + 1)``, so
      that few visits say little. Nothing is known where these are not finite, or
      there was no visit.
    visits: see there.
    num_classes: C; None for that of the beliefs or predictions, or the largest
      label plus one.
    balance: divides votes by the share :math:`f_c` that the class has of all
      votes (else 1), for ``score="votes"``: so that rare classes are not outvoted by
      chance. It hurts where wrong labels fall on rare classes too, since most of
      their few votes are wrong and count many times: with a long tail of classes
      the AUC fell from .985 to .843. It helps where classes are confused in pairs,
      where ``"posterior"`` helps more.
    groups: ``[n]``, integers or names, or None: the source of each example, such as
      the patient or the video. Neighbors of the same group as the example have no
      vote, as records of one source share their errors. -1 and missing values
      stand for a source of its own. Build the graph with k larger than groups are.
    progress: a bar (tqdm) on what takes more than two seconds.

  Shapes:
    Beside the arguments and the result, memory is O(n k) and a block. Time is
    O(n (k + C^2)).

  Returns:
    ``Audit(order, support, margin, suggested, classes, num_wrong)``, NumPy arrays
    and a float. The order is by margin, for ``"posterior"`` by support, ties by
    index; NaN comes last. ``num_wrong`` is the sum of posteriors, whatever the score
    is, over examples of which something is known. Predictions that have memorized
    labels make it too small, overlapping classes too large.

  Guarantees:
    * It equals counting by hand, with groups too; so do margin, mean and contradicted.
    * With the true chances of the labels, the posterior is that of Bayes' rule.
    * Examples without neighbors or predictions come last and keep their label.

  Raises:
    ValueError: for labels or groups of another length, labels outside [-1, C) or
      beyond int32, beliefs or predictions of another shape, another score, a score
      without what it needs, ``balance`` with another score than votes.
    TypeError: for labels or groups that are neither integers nor names.

  Examples:
    >>> import numpy as np
    >>> from optax_ranger import graph
    >>> points = np.array([[0.0], [1.0], [2.0], [7.0], [8.0], [9.0]])
    >>> neighbors = graph.build(points, 2, backend="jax")
    >>> found = graph.audit(neighbors, ["a", "a", "a", "b", "a", "b"])
    >>> print(found.order[0], found.classes[found.suggested[4]], found.support)
    4 b [1.  1.  1.  0.5 0.  0.5]
    >>> predictions = np.array([[0.9, 0.1], [0.3, 0.7], [0.0, 0.0]])
    >>> found = graph.audit(None, [0, 0, 1], predictions=predictions, score="margin")
    >>> print(found.order, found.margin)
    [1 0 2] [ 0.8 -0.4  nan]

  References:
    Bahri et al., Deep k-NN for Noisy Labels, 2020, https://arxiv.org/abs/2004.12289,
    for votes; Northcutt et al., Confident Learning, 2021,
    https://arxiv.org/abs/1911.00068, for labels judged by held-out predictions and
    counted; Patrini et al., 2017, https://arxiv.org/abs/1609.03683, theorem 3, for
    T; https://arxiv.org/abs/2510.16211 for margins of predictions that are averaged
    over training. The posterior with weighed witnesses is ours.
  """
  validate.choice("score", score, SCORES)
  n = len(neighbors.indices) if neighbors is not None else _length(labels, predictions)
  tables = {"beliefs": beliefs, "predictions": predictions}
  for name, table in tables.items():
    if table is None:
      continue
    shape = np.shape(table)
    if len(shape) != 2 or shape[0] != n or not shape[1]:
      raise ValueError(f"{name} must have shape [{n}, C], got {list(shape)}.")
    if num_classes is None:
      num_classes = shape[1]
    validate.shape(name, table, (n, num_classes))
  given, classes = _labels.read("labels", labels, n, num_classes=num_classes)
  given = np.asarray(given, np.int64)
  if num_classes is None:
    num_classes = max(1, int(given.max(initial=-1)) + 1)
  past = _past(contradicted, visits, n)
  _needs(score, neighbors=neighbors, predictions=predictions, contradicted=past)
  if balance and score != "votes":
    raise ValueError(
      f"balance=True divides votes: it needs score='votes', got {score!r}."
    )
  source = None
  if groups is not None:
    if neighbors is None:
      raise ValueError("groups leave out votes of neighbors, but neighbors are None.")
    source = np.asarray(_labels.read("groups", groups, n, compared=True).ids)
  voters = None
  if neighbors is not None:
    voters = _Voters(neighbors, given, beliefs, num_classes, source)
  predicted = None if predictions is None else np.asarray(predictions)
  share = np.ones([num_classes])
  if voters is not None and balance:
    share = voters.totals()
    share = share / max(share.sum(), np.finfo(np.float64).tiny)
    share = np.where(share > 0, share, 1)

  size = max(1, _CELLS // max(num_classes, voters.k if voters else 1))
  parts = [slice(start, min(start + size, n)) for start in range(0, n, size)]
  blocks = lambda what: _progress.bar(parts, what, progress)

  def scores(part: Any) -> list[np.ndarray]:
    found = []
    if voters is not None:
      votes = voters.votes(part)
      some = votes.any(axis=1, keepdims=True)
      # Scaled to numbers of votes out of k.
      found.append(np.where(some, np.log(votes * voters.scale + 0.5), np.nan))
    if predicted is not None:
      # NaN stays: no witness.
      found.append(np.log(np.maximum(_normalized(predicted[part]), 1e-6)))
    return [one.astype(np.float32) for one in found]

  model, num_wrong = None, float("nan")
  if voters is not None or predicted is not None:
    model, num_wrong = _posterior.fit(scores, given, num_classes, blocks), 0.0
  support, margin = np.full([n], np.nan, np.float32), np.full([n], np.nan, np.float32)
  suggested = given.astype(np.int32)
  for part in blocks("audit"):
    own = given[part]
    chances = votes = rows = None
    if model is not None:
      chances = _posterior.judge(model, scores(part), own)
      wrong = 1 - chances[np.arange(len(own)), np.maximum(own, 0)][own >= 0]
      num_wrong += float(np.nansum(wrong, dtype=np.float64))
    if score in ("votes", "mean") and voters is not None:
      votes = _normalized(voters.votes(part) / share)
    if score in ("margin", "mean") and predicted is not None:
      rows = _normalized(predicted[part])
    shares = {"votes": votes, "margin": rows}.get(score, chances)
    if score == "mean" and votes is not None and rows is not None:
      votes = np.where(np.isnan(votes), rows, votes)
      shares = (votes + np.where(np.isnan(rows), votes, rows)) / 2
    if shares is not None:
      support[part], margin[part], suggested[part] = _ranked(shares, own)
    if score == "contradicted" and past is not None:
      support[part] = np.where(own >= 0, past[part], np.nan)
      margin[part] = 2 * support[part] - 1
  order = np.argsort(support if score == "posterior" else margin, kind="stable")
  return Audit(order, support, margin, suggested, classes, num_wrong)


def _ranked(
  shares: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Support, margin and suggestion of labels by shares of classes, [count, C]."""
  row, column = np.arange(len(own)), np.maximum(own, 0)
  support = np.where(own >= 0, shares[row, column], np.nan)
  best = shares.max(axis=1)
  other = (support < best) | ((own < 0) & ~np.isnan(best))
  filled = np.where(np.isnan(shares), -np.inf, shares)
  suggested = np.where(other, filled.argmax(axis=1), own)
  if shares.shape[1] == 1:
    return support, support, suggested
  filled[row, column] = -np.inf
  others = np.where(np.isnan(best), np.nan, filled.max(axis=1))
  return support, support - others, suggested


def _past(contradicted: Any, visits: Any, n: int) -> np.ndarray | None:
  """The share of visits that agreed with the label, [n]; NaN for none."""
  if (contradicted is None) != (visits is None):
    lacking = "visits" if visits is None else "contradicted"
    raise ValueError(f"contradicted and visits belong together, but {lacking} is None.")
  if contradicted is None:
    return None
  counts, visits = np.asarray(contradicted, np.float64), np.asarray(visits, np.float64)
  validate.shape("contradicted", counts, (n,))
  if visits.ndim:
    validate.shape("visits", visits, (n,))
  known = np.isfinite(counts) & np.isfinite(visits) & (visits > 0)
  visits = np.where(known, visits, 1)
  counts = np.clip(np.where(known, counts, 0), 0, visits)
  return np.where(known, (visits - counts + 0.5) / (visits + 1), np.nan)


def _needs(score: str, **given: Any) -> None:
  """Refuses a score without its witness."""
  if score == "posterior" and given["neighbors"] is given["predictions"] is None:
    raise ValueError("score='posterior' needs neighbors or predictions, both are None.")
  for name in _NEEDS.get(score, ()):
    if given[name] is None:
      raise ValueError(f"score={score!r} needs {name}, got None.")


def _length(labels: Any, predictions: Any) -> int:
  return len(labels if predictions is None else predictions)


class _Voters:
  """Neighbors, and what they vote."""

  def __init__(
    self,
    neighbors: Neighbors,
    given: np.ndarray,
    beliefs: Any,
    num_classes: int,
    source: np.ndarray | None,
  ):
    weights, indices = np.asarray(neighbors.weights), np.asarray(neighbors.indices)
    n, self.k = indices.shape
    filled = (indices >= 0) & (indices < n) & np.isfinite(weights) & (weights > 0)
    self.indices = np.where(filled, indices, 0)
    if source is not None:
      others = source[self.indices] != source[:, None]
      filled &= others | (source < 0)[:, None]
    self.weights = np.where(filled, weights, 0).astype(np.float64)
    self.given, self.num_classes = given, num_classes
    self.beliefs = None if beliefs is None else np.asarray(beliefs)
    heaviest = self.weights.max(initial=0)
    self.scale = 1 / heaviest if heaviest > 0 else 1.0

  def votes(self, part: Any) -> np.ndarray:
    """The votes that some examples get from their neighbors, [count, C]."""
    weights, indices = self.weights[part], self.indices[part]
    count, num_classes = len(indices), self.num_classes
    if self.beliefs is None:
      # One more class, of those without a label, whose votes are cut off.
      classes = self.given[indices]
      classes = np.where(classes >= 0, classes, num_classes)
      cells = np.arange(count)[:, None] * (num_classes + 1) + classes
      sums = np.bincount(cells.ravel(), weights.ravel(), count * (num_classes + 1))
      return sums.reshape(count, num_classes + 1)[:, :num_classes]
    votes = np.zeros([count, num_classes])
    for column in range(self.k):
      votes += weights[:, column, None] * _finite(self.beliefs[indices[:, column]])
    return votes

  def totals(self) -> np.ndarray:
    """The votes that each class has of all examples' neighbors, [C]."""
    received = np.bincount(self.indices.ravel(), self.weights.ravel(), len(self.given))
    if self.beliefs is None:
      labeled = self.given >= 0
      return np.bincount(self.given[labeled], received[labeled], self.num_classes)
    return received @ _finite(self.beliefs)


def _finite(beliefs: np.ndarray) -> np.ndarray:
  finite = np.isfinite(beliefs).all(axis=1, keepdims=True)
  return np.where(finite, beliefs, 0).astype(np.float64)


def _normalized(rows: np.ndarray) -> np.ndarray:
  """Rows that sum to one; NaN for those that are blank, negative or not finite."""
  rows = rows.astype(np.float64)
  usable = (np.isfinite(rows) & (rows >= 0)).all(axis=1, keepdims=True)
  peak = np.where(usable, rows, 0).max(axis=1, keepdims=True)
  usable = usable & (peak > 0)
  rows = np.where(usable, rows, np.nan) / np.where(usable, peak, 1)
  return rows / rows.sum(axis=1, keepdims=True)

"""Wrong labels, found by those whose neighborhood does not back them."""

from typing import Any
from typing import NamedTuple

import numpy as np

from optax_ranger._core import labels as _labels
from optax_ranger._core import validate
from optax_ranger._core.types import ArrayLike
from optax_ranger._core.types import Neighbors

_CELLS = 2**22  # of a block of votes


class Audit(NamedTuple):
  """Examples by how little their neighborhood backs their label.

  Attributes:
    order: ``int [n]``, all examples, the most suspicious first.
    support: ``float32 [n]``, the share of the neighborhood's votes that the given
      label has, in [0, 1]; NaN where there are no votes, or no label.
    margin: ``float32 [n]``, support less that of the strongest other class, in
      [-1, 1]; it gives the order, ties by index, and NaN comes last.
    suggested: ``int32 [n]``, the class with the most votes; the given one where
      it is among the strongest, and where there are no votes, -1 for none.
    classes: the names of classes 0, 1, ... where labels are names, so that
      ``classes[suggested]`` are names again; None where they are integers.
  """

  order: np.ndarray
  support: np.ndarray
  margin: np.ndarray
  suggested: np.ndarray
  classes: np.ndarray | None


def audit(
  neighbors: Neighbors,
  labels: Any,
  *,
  beliefs: ArrayLike | None = None,
  num_classes: int | None = None,
  balance: bool = False,
  groups: Any = None,
) -> Audit:
  r"""Ranks examples by how little their neighborhood backs their label.

  It finds labels that were flipped at random, and hardly those of classes that
  look alike. Wrong neighbors vote too, so it works while most labels around an
  example are right. On the host, in blocks.

  .. math::
    v_{ic} = \sum_j w_{ij} b_{jc} / f_c, \qquad
    \mathrm{support}_i = v_{i y_i} / \textstyle\sum_c v_{ic}

  Args:
    neighbors: ``[n, k]``; weights from distances, not from labels.
    labels: ``[n]``, the given ones: integers in [0, C) or names, of NumPy, JAX,
      pandas or Arrow, or a list. An example without a label (-1 or a missing value)
      has no vote and is never suspicious, but a class is suggested for it.
    beliefs: ``float [n, C]`` or None: what neighbors vote, such as smoothed
      predictions; rows that are not finite don't vote. None: their given labels.
    num_classes: C; None for that of the beliefs, or the largest label plus one.
    balance: divides votes by the share :math:`f_c` that the class has of all
      votes (else 1): so that rare classes are not outvoted by chance.
    groups: ``[n]``, integers or names, or None: the source of each example, such as
      the patient or the video. Neighbors of the same group as the example have no
      vote, as records of one source share their errors. -1 and missing values
      stand for a source of its own. Build the graph with k larger than groups are.

  Returns:
    ``Audit(order, support, margin, suggested, classes)``, NumPy arrays.

  Guarantees:
    * It equals counting by hand (``test_audit_equals_counting``), with groups too
      (``test_audit_leaves_out_the_same_group``).
    * Examples without neighbors come last and keep their label
      (``test_audit_without_neighbors``).
    * Examples without a label come last and have no vote
      (``test_audit_of_unlabeled_examples``).

  Raises:
    ValueError: for labels or groups of another length, labels outside [-1, C) or
      beyond int32, beliefs of another shape.
    TypeError: for labels or groups that are neither integers nor names.

  Examples:
    >>> import numpy as np
    >>> from optax_ranger import graph
    >>> points = np.array([[0.0], [1.0], [2.0], [7.0], [8.0], [9.0]])
    >>> neighbors = graph.build(points, 2, backend="jax")
    >>> found = graph.audit(neighbors, ["a", "a", "a", "b", "a", "b"])
    >>> print(found.order[0], found.classes[found.suggested[4]], found.support)
    4 b [1.  1.  1.  0.5 0.  0.5]
  """
  weights, indices = np.asarray(neighbors.weights), np.asarray(neighbors.indices)
  n, k = indices.shape
  if beliefs is not None:
    beliefs = np.asarray(beliefs)
    if beliefs.ndim != 2 or len(beliefs) != n:
      raise ValueError(f"beliefs must have shape [{n}, C], got {list(beliefs.shape)}.")
    if num_classes is None:
      num_classes = beliefs.shape[1]
    validate.shape("beliefs", beliefs, (n, num_classes))
  given, classes = _labels.read("labels", labels, n, num_classes=num_classes)
  given = np.asarray(given, np.int64)
  if num_classes is None:
    num_classes = max(1, int(given.max()) + 1)
  filled = (indices >= 0) & (indices < n)
  indices = np.where(filled, indices, 0)
  if groups is not None:
    source = np.asarray(_labels.read("groups", groups, n, compared=True).ids)
    filled &= (source[indices] != source[:, None]) | (source < 0)[:, None]
  weights = np.where(filled, weights, 0).astype(np.float64)
  share = np.ones([num_classes])
  if balance:
    share = _all_votes(weights, indices, given, beliefs, num_classes)
    share = share / max(share.sum(), np.finfo(np.float64).tiny)
  support, margin = np.zeros([n], np.float32), np.zeros([n], np.float32)
  suggested = np.zeros([n], np.int32)
  size = max(1, _CELLS // max(num_classes, k))
  for start in range(0, n, size):
    part = slice(start, min(start + size, n))
    own = given[part]
    votes = _votes(weights[part], indices[part], given, beliefs, num_classes)
    votes = votes / np.where(share > 0, share, 1)
    with np.errstate(invalid="ignore"):
      votes = votes / votes.sum(axis=1, keepdims=True)
    row, column = np.arange(len(own)), np.maximum(own, 0)
    mine = np.where(own >= 0, votes[row, column], np.nan)
    support[part] = mine
    best = votes.max(axis=1)
    other = (mine < best) | ((own < 0) & ~np.isnan(best))
    suggested[part] = np.where(other, votes.argmax(axis=1), own)
    votes[row, column] = -np.inf
    others = votes.max(axis=1) if num_classes > 1 else np.zeros(len(own))
    margin[part] = support[part] - others
  margin[np.isnan(support)] = np.nan
  order = np.argsort(margin, kind="stable")
  return Audit(order, support, margin, suggested, classes)


def _votes(
  weights: np.ndarray,
  indices: np.ndarray,
  labels: np.ndarray,
  beliefs: Any,
  num_classes: int,
) -> np.ndarray:
  """The votes of some examples' neighbors, [count, C]."""
  count = len(indices)
  if beliefs is None:
    # One more class, of those without a label, whose votes are cut off.
    classes = np.where(labels[indices] >= 0, labels[indices], num_classes)
    cells = np.arange(count)[:, None] * (num_classes + 1) + classes
    sums = np.bincount(cells.ravel(), weights.ravel(), count * (num_classes + 1))
    return sums.reshape(count, num_classes + 1)[:, :num_classes]
  votes = np.zeros([count, num_classes])
  for column in range(indices.shape[1]):
    votes += weights[:, column, None] * _finite(beliefs[indices[:, column]])
  return votes


def _all_votes(
  weights: np.ndarray,
  indices: np.ndarray,
  labels: np.ndarray,
  beliefs: Any,
  num_classes: int,
) -> np.ndarray:
  """The votes that each class has of all examples' neighbors, [C]."""
  received = np.bincount(indices.ravel(), weights.ravel(), len(labels))
  if beliefs is None:
    labeled = labels >= 0
    return np.bincount(labels[labeled], received[labeled], num_classes)
  return received @ _finite(beliefs)


def _finite(beliefs: np.ndarray) -> np.ndarray:
  finite = np.isfinite(beliefs).all(axis=1, keepdims=True)
  return np.where(finite, beliefs, 0).astype(np.float64)

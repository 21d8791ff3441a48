"""Noise in labels, features and targets.

A kind of noise is a function ``(rng, x, y, rate, facts) -> (x, y)``. Rows may be added.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import numpy as np
from sklearn import linear_model

# Copies of a row, in turns: the same number in total for every seed.
_COPIES = (3, 4, 5)
_LARGE = 10.0


class Facts(NamedTuple):
  """What a kind of noise may use besides the rows themselves.

  Attributes:
    classes: the number of classes; 0 for regression.
    next_class: the class that each class is mistaken for.
    given: labels that people gave, ``int [n]``, for the noise "human".
    log_chances: gives ``float [n, C]``, log-probabilities of a model of the clean rows.
  """

  classes: int
  next_class: np.ndarray
  given: np.ndarray | None = None
  log_chances: Callable[[np.ndarray], np.ndarray] | None = None


def confusion_of(
  noise: str, rate: float, classes: int, next_class: np.ndarray | None = None
) -> np.ndarray | None:
  """The chance of each label given the class, ``[C, C]``.

  None where noise is not a matter of the class alone.
  """
  same = np.eye(classes)
  if noise in ("none", "symmetric"):
    others = np.full([classes] * 2, rate / (classes - 1))
    return np.where(same > 0, 1 - rate, others)
  if noise == "asymmetric":
    to = next_of(classes) if next_class is None else next_class
    return (1 - rate) * same + rate * same[to]
  return None


def next_of(classes: int) -> np.ndarray:
  return (np.arange(classes) + 1) % max(classes, 1)


def corrupt(
  rng: np.random.Generator, labels: np.ndarray, confusion: np.ndarray
) -> np.ndarray:
  """Draws each label from its class's row of the matrix."""
  draws = rng.random([len(labels), 1])
  drawn = (draws > confusion.cumsum(axis=1)[labels]).sum(axis=1)
  return drawn.clip(0, len(confusion) - 1)


def none(rng, x, y, rate, facts):
  del rng, rate, facts
  return x, y


def symmetric(rng, x, y, rate, facts):
  """A label becomes any of the other classes."""
  confusion: Any = confusion_of("symmetric", rate, facts.classes)
  return x, corrupt(rng, y, confusion)


def asymmetric(rng, x, y, rate, facts):
  """A label becomes the class that its class is mistaken for."""
  confusion: Any = confusion_of("asymmetric", rate, facts.classes, facts.next_class)
  return x, corrupt(rng, y, confusion)


def human(rng, x, y, rate, facts):
  """Labels that people gave."""
  del rng, y, rate
  return x, facts.given


def outliers(rng, x, y, rate, facts):
  """Half of the columns of a share of the rows become wrong; labels stay.

  Every other such row gets large values, the others get columns of another row.
  """
  del facts
  bad = rng.choice(len(x), round(rate * len(x)), replace=False)
  wrong = rng.random([len(bad), x.shape[1]]) < 0.5
  large = _LARGE * rng.standard_normal(wrong.shape)
  swapped = x[(bad + rng.integers(1, len(x), len(bad))) % len(x)]
  other = np.where(np.arange(len(bad))[:, None] % 2, swapped, large)
  x = x.copy()
  x[bad] = np.where(wrong, other, x[bad])
  return x, y


def duplicates(rng, x, y, rate, facts):
  """A share of the rows comes three to five times more, jittered, wrongly labeled."""
  chosen = rng.choice(len(x), round(rate * len(x)), replace=False)
  copied = np.repeat(chosen, np.resize(_COPIES, len(chosen)))
  jitter = 0.01 * rng.standard_normal([len(copied), x.shape[1]])
  wrong = (y[copied] + rng.integers(1, facts.classes, len(copied))) % facts.classes
  return np.concatenate([x, x[copied] + jitter]), np.concatenate([y, wrong])


def boundary(rng, x, y, rate, facts):
  """Labels become the runner-up, most likely near the boundary.

  The chance falls linearly with the rank of the margin, from twice the rate to 0.
  """
  chances = facts.log_chances(x)
  others = chances.copy()
  others[np.arange(len(y)), y] = -np.inf
  margin = chances[np.arange(len(y)), y] - others.max(axis=1)
  rank = np.argsort(np.argsort(margin)) / max(1, len(y) - 1)
  flip = rng.random(len(y)) < 2 * rate * (1 - rank)
  return x, np.where(flip, others.argmax(axis=1), y)


def heavy_tail(rng, x, y, rate, facts):
  """Student's t with 1.5 degrees of freedom is added; `rate` is its scale."""
  del facts
  return x, y + rate * rng.standard_t(1.5, len(y))


def gross_errors(rng, x, y, rate, facts):
  """A share of the targets is replaced by large numbers."""
  del facts
  bad = rng.choice(len(y), round(rate * len(y)), replace=False)
  y = y.copy()
  y[bad] = _LARGE * rng.standard_normal(len(bad))
  return x, y


KINDS = {
  "none": none,
  "symmetric": symmetric,
  "asymmetric": asymmetric,
  "aggregate": human,
  "worst": human,
  "random1": human,
  "random2": human,
  "random3": human,
  "outlier features": outliers,
  "conflicting duplicates": duplicates,
  "boundary labels": boundary,
  "heavy tails": heavy_tail,
  "gross errors": gross_errors,
}


def log_chances(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """The log-probabilities of a logistic regression on clean rows."""
  return linear_model.LogisticRegression(max_iter=1000).fit(x, y).predict_log_proba

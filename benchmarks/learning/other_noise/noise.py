"""Small problems of scikit-learn, and noise of kinds that people have.

Training and validation rows are noisy alike, test rows are clean.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import numpy as np
from sklearn import datasets
from sklearn import linear_model
from sklearn import model_selection
from sklearn import preprocessing

# Copies of a row, in turns: as many in all, whatever the seed.
_COPIES = (3, 4, 5)
_LARGE = 10.0


class Data(NamedTuple):
  """One problem with one kind of noise.

  Rows beyond `count` fill up: features NaN, label -1 or target NaN.

  Attributes:
    x: training features, ``[n, d]``, in standard deviations of the clean ones.
    y: the given labels ``int [n]`` or targets ``float [n]``.
    valid_x, valid_y: the same for validation, as noisy.
    test_x, test_y: clean.
    count: training rows that are there.
  """

  x: Any
  y: Any
  valid_x: Any
  valid_y: Any
  test_x: Any
  test_y: Any
  count: Any


class Noise(NamedTuple):
  """A kind of noise.

  Attributes:
    make: ``(rng, x, y, rate, doubt) -> (x, y)``; rows may be added.
    rates: how much of it.
    tasks: on which tasks it is tried.
  """

  make: Callable[..., tuple[np.ndarray, np.ndarray]]
  rates: tuple[float, ...]
  tasks: tuple[str, ...]


def none(rng, x, y, rate, doubt):
  del rng, rate, doubt
  return x, y


def outliers(rng, x, y, rate, doubt):
  """Half of the columns of a share of the rows become wrong; labels stay.

  Every other such row gets large values, the others the columns of another row.
  """
  del doubt
  bad = rng.choice(len(x), round(rate * len(x)), replace=False)
  wrong = rng.random([len(bad), x.shape[1]]) < 0.5
  large = _LARGE * rng.standard_normal(wrong.shape)
  swapped = x[(bad + rng.integers(1, len(x), len(bad))) % len(x)]
  other = np.where(np.arange(len(bad))[:, None] % 2, swapped, large)
  x = x.copy()
  x[bad] = np.where(wrong, other, x[bad])
  return x, y


def duplicates(rng, x, y, rate, doubt):
  """A share of the rows comes three to five times more, jittered, wrongly labeled."""
  classes = doubt.shape[1]
  chosen = rng.choice(len(x), round(rate * len(x)), replace=False)
  copied = np.repeat(chosen, np.resize(_COPIES, len(chosen)))
  jitter = 0.01 * rng.standard_normal([len(copied), x.shape[1]])
  wrong = (y[copied] + rng.integers(1, classes, len(copied))) % classes
  return np.concatenate([x, x[copied] + jitter]), np.concatenate([y, wrong])


def boundary(rng, x, y, rate, doubt):
  """Labels become the runner-up, the likelier the nearer they are to the boundary.

  The chance falls linearly with the rank of the margin, from twice the rate to 0.
  """
  others = doubt.copy()
  others[np.arange(len(y)), y] = -np.inf
  margin = doubt[np.arange(len(y)), y] - others.max(axis=1)
  rank = np.argsort(np.argsort(margin)) / max(1, len(y) - 1)
  flip = rng.random(len(y)) < 2 * rate * (1 - rank)
  return x, np.where(flip, others.argmax(axis=1), y)


def heavy_tail(rng, x, y, rate, doubt):
  """Student's t of 1.5 degrees of freedom is added, `rate` its scale."""
  del doubt
  return x, y + rate * rng.standard_t(1.5, len(y))


def gross_errors(rng, x, y, rate, doubt):
  """A share of the targets is replaced by large numbers."""
  del doubt
  bad = rng.choice(len(y), round(rate * len(y)), replace=False)
  y = y.copy()
  y[bad] = _LARGE * rng.standard_normal(len(bad))
  return x, y


NOISES = {
  "none": Noise(none, (0.0,), ("classes", "numbers")),
  "outlier features": Noise(outliers, (0.1, 0.3), ("classes", "numbers")),
  "conflicting duplicates": Noise(duplicates, (0.1, 0.2), ("classes",)),
  "boundary labels": Noise(boundary, (0.2, 0.4), ("classes",)),
  "heavy tails": Noise(heavy_tail, (0.5, 1.0), ("numbers",)),
  "gross errors": Noise(gross_errors, (0.2, 0.4), ("numbers",)),
}


def _friedman() -> tuple[np.ndarray, np.ndarray]:
  return datasets.make_friedman1(600, noise=1.0, random_state=0)


PROBLEMS: dict[str, Callable[[], Any]] = {
  "digits": lambda: datasets.load_digits(return_X_y=True),
  "breast_cancer": lambda: datasets.load_breast_cancer(return_X_y=True),
  "wine": lambda: datasets.load_wine(return_X_y=True),
  "diabetes": lambda: datasets.load_diabetes(return_X_y=True),
  "friedman1": _friedman,
}
_NUMBERS = ("diabetes", "friedman1")


def task(problem: str) -> str:
  return "numbers" if problem in _NUMBERS else "classes"


def load(problem: str, noise: str, rate: float, seed: int) -> Data:
  """Three fifths to train on, three twentieths to validate, a quarter to test."""
  x, y = PROBLEMS[problem]()
  classes = 0 if task(problem) == "numbers" else int(y.max()) + 1
  split = lambda x, y, share: model_selection.train_test_split(
    x, y, test_size=share, random_state=seed, stratify=y if classes else None
  )
  x, test_x, y, test_y = split(np.asarray(x, float), y, 0.25)
  x, valid_x, y, valid_y = split(x, y, 0.2)
  # Of the clean rows: how to scale in spite of outliers is another question.
  scaler = preprocessing.StandardScaler().fit(x)
  if problem == "digits":  # Pixels share a scale; some are always zero.
    scaler.mean_, scaler.scale_ = np.full(64, x.mean()), np.full(64, x.std())
  x, valid_x, test_x = map(scaler.transform, (x, valid_x, test_x))
  if classes:
    doctor = linear_model.LogisticRegression(max_iter=1000).fit(x, y)
    doubts = [doctor.predict_log_proba(rows) for rows in (x, valid_x)]
  else:
    doubts = [None, None]
    mean, scale = y.mean(), y.std()
    y, valid_y, test_y = ((part - mean) / scale for part in (y, valid_y, test_y))
  rng = np.random.default_rng([seed, list(NOISES).index(noise), round(100 * rate)])
  noisy, filled = [], []
  for rows, given, doubt in zip((x, valid_x), (y, valid_y), doubts, strict=True):
    found = NOISES[noise].make(rng, rows, given, rate, doubt)
    noisy.append(found)
    filled += _filled(*found, 2 * len(rows) if classes else len(rows))
  as_label = np.int32 if classes else np.float32
  train_x, train_y, valid_x, valid_y = filled
  return Data(
    train_x.astype(np.float32),
    train_y.astype(as_label),
    valid_x.astype(np.float32),
    valid_y.astype(as_label),
    test_x.astype(np.float32),
    test_y.astype(as_label),
    np.int32(len(noisy[0][0])),
  )


def _filled(x: np.ndarray, y: np.ndarray, size: int) -> list[np.ndarray]:
  """Rows up to a size that is the same for all kinds: one program for all."""
  room = size - len(x)
  nothing = np.nan if y.dtype.kind == "f" else -1
  return [
    np.concatenate([x, np.full([room, x.shape[1]], np.nan)]),
    np.concatenate([y, np.full(room, nothing, y.dtype)]),
  ]

"""`held_out_predictions`: of each example's label, by all other examples."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import numpy as np

from optax_ranger._core import draws
from optax_ranger._core import labels as _labels
from optax_ranger._core import progress as _progress
from optax_ranger._core import validate
from optax_ranger.graph import _posterior
from optax_ranger.graph import _sparse

_SCALES = (0.5, 1.0)  # of the kernel, in median distances
_RIDGES = (0.03, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_SAMPLE = 5000  # examples that choose among these
_NARROW = 300  # random features that choose the width of the kernel
_CELLS = 2**22  # of a block of columns


def held_out_predictions(
  features: Any,
  labels: Any,
  *,
  num_classes: int | None = None,
  width: int = 1000,
  seed: int = 0,
  progress: bool = True,
) -> np.ndarray:
  r"""Predicts the label of each example by all the others, without training.

  A ridge regression to the labels, linear and by random Fourier features of a
  Gaussian kernel. What it would predict of an example had it been fitted without
  that example has a closed form, so one fit takes the place of cross-validation, and
  nothing is memorized. Give it to ``audit(..., score="posterior")``. It helps
  wherever a kernel or a linear model does well: tables, texts, features of a
  pretrained network. On pixels neighbors are as good, and both together better.
  Copies of an example confirm its label.

  .. math::
    \hat f_{-i}(x_i) = \frac{\hat f(x_i) - h_i \, e_{y_i}}{1 - h_i}, \qquad
    h_i = \phi_i^\top (\Phi^\top \Phi + \lambda I)^{-1} \phi_i, \qquad
    p_i = \mathrm{softmax}(\alpha \hat f_{-i}(x_i))

  The ridge :math:`\lambda` and the width of the kernel have the least leave-one-out
  error, :math:`\alpha` the greatest likelihood, of the given labels; clean ones are
  not needed.

  Args:
    features: ``[n, d]``, of any real type, or SciPy's sparse rows; columns on one
      scale, as for ``build``. Texts and other rows for which only the direction
      counts should have length one. Sparse rows, and more columns than half the
      width, are seen through the kernel only.
    labels: ``[n]``, integers in [0, C) or names. An example without a label (-1 or a
      missing value) teaches nothing, and is predicted.
    num_classes: C; None for the largest label plus one.
    width: how many random features, a static Python integer.
    seed: of the random features and of the sample that chooses.
    progress: a bar (tqdm) on what takes more than two seconds.

  Shapes:
    Time O(n D (D + C)), D = width + d + 1; memory O(n C + D^2) and a block, beside
    the features.

  Returns:
    ``float32 [n, C]``, the chances of the labels; rows of zeros for features that
    are not finite.

  Guarantees:
    * Each row is the prediction of a fit without its example.
    * An example's row does not depend on its own label, when hyperparameters stay the
      same.
    * Non-finite rows and examples without a label do not change other predictions.

  Raises:
    ValueError: for features that are not 2-D, labels of another length, or outside
      [-1, C).
    TypeError: for complex features, labels that are neither integers nor names, a
      width that is no Python integer.

  Examples:
    >>> import numpy as np
    >>> from optax_ranger import graph
    >>> points = np.linspace(-1, 1, 8)[:, None]
    >>> labels = np.array([0, 0, 1, 0, 1, 1, 1, 1])  # the third is wrong
    >>> predictions = graph.held_out_predictions(points, labels)
    >>> print(predictions[2].argmax())
    0

  References:
    Rahimi and Recht, Random Features for Large-Scale Kernel Machines, 2007; Allen,
    The Relationship between Variable Selection and Data Augmentation, 1974, for the
    leave-one-out form.
  """
  if not hasattr(features, "shape"):
    features = np.asarray(features)
  if len(features.shape) != 2 or not features.shape[1]:
    raise ValueError(
      f"features must have shape [n, d], d at least 1, got {list(features.shape)}."
    )
  validate.static_count("width", width)
  validate.integer("seed", seed)
  sparse = _sparse.is_sparse(features)
  features = features.tocsr() if sparse else np.asarray(features)
  if features.dtype.kind == "c":
    raise TypeError(f"features must be real, got {features.dtype}.")
  n = features.shape[0]
  given = _labels.read("labels", labels, n, num_classes=num_classes).ids
  given = np.asarray(given, np.int64)
  if num_classes is None:
    num_classes = max(1, int(given.max(initial=-1)) + 1)
  rows = _Rows(features, sparse)
  predictions = np.zeros([n, num_classes], np.float32)
  taught = np.flatnonzero(rows.alive & (given >= 0))
  if not len(taught):
    return predictions
  rng = draws.generator(seed)
  sample = np.sort(rng.choice(taught, min(len(taught), _SAMPLE), replace=False))
  errors = []
  for scale in _SCALES:
    each = _columns(rows, sample, min(width, _NARROW), scale, seed)
    fit = _fit(each, sample, given, num_classes, lambda parts: parts)
    along = each(sample) @ fit.directions
    held_out = [_held_out(fit, along, given[sample], ridge) for ridge in _RIDGES]
    errors.append(min(_error(one, given[sample]) for one in held_out))
  chosen = _columns(rows, sample, width, _SCALES[int(np.argmin(errors))], seed)
  bar = lambda what: lambda parts: _progress.bar(parts, what, progress)
  fit = _fit(chosen, taught, given, num_classes, bar("ridge"))
  along = chosen(sample) @ fit.directions
  held_out = [_held_out(fit, along, given[sample], ridge) for ridge in _RIDGES]
  best = int(np.argmin([_error(one, given[sample]) for one in held_out]))
  scale = np.float32(_posterior.weigh([held_out[best] * 10], given[sample])[0] * 10)
  alive = np.flatnonzero(rows.alive)
  for part in bar("held-out")(_parts(alive, chosen.number)):
    along = chosen(part) @ fit.directions
    found = scale * _held_out(fit, along, given[part], _RIDGES[best])
    found = np.exp(found - found.max(axis=1, keepdims=True))
    predictions[part] = found / found.sum(axis=1, keepdims=True)
  return predictions


class _Rows:
  """Rows of features by their indices, and which of them are finite."""

  def __init__(self, features: Any, sparse: bool):
    self.features, self.sparse = features, sparse
    if sparse:
      owner = np.repeat(np.arange(features.shape[0]), np.diff(features.indptr))
      self.alive = np.ones([features.shape[0]], bool)
      self.alive[owner[~_fits(features.data)]] = False
    else:
      self.alive = np.zeros([features.shape[0]], bool)
      size = max(1, _CELLS // features.shape[1])
      for start in range(0, features.shape[0], size):
        part = slice(start, start + size)
        self.alive[part] = _fits(features[part]).all(axis=1)

  def __call__(self, part: np.ndarray) -> Any:
    return self.features[part].astype(np.float64)


class _Columns(NamedTuple):
  """Of some examples, what the regression sees.

  Attributes:
    rows: features by indices.
    mean: ``float64 [d]``, of dense features, zeros of sparse ones.
    length: the root mean square of the features' distance from it.
    waves, phases: ``float32 [d, width]`` and ``[width]``.
    linear: whether the features themselves are columns too.
  """

  rows: _Rows
  mean: np.ndarray
  length: float
  waves: np.ndarray
  phases: np.ndarray
  linear: bool

  @property
  def number(self) -> int:
    return len(self.phases) + 1 + self.linear * len(self.mean)

  def __call__(self, part: np.ndarray) -> np.ndarray:
    """Columns of these examples, float32 [count, D]."""
    rows = self.rows(part)
    if not self.rows.sparse:
      rows = ((rows - self.mean) / self.length).astype(np.float32)
    else:
      rows = (rows / self.length).astype(np.float32)
    waves = np.cos(rows @ self.waves + self.phases)
    waves *= np.float32(np.sqrt(2 / len(self.phases)))
    columns = [waves, np.ones([len(part), 1], np.float32)]
    return np.concatenate(columns + [rows] * self.linear, axis=1)


def _columns(
  rows: _Rows, sample: np.ndarray, width: int, scale: float, seed: int
) -> _Columns:
  """Random features of a Gaussian as wide as `scale` median distances."""
  some = rows(sample[:2000])
  d = some.shape[1]
  rng = draws.generator(seed, 1)
  pairs = rng.integers(0, some.shape[0], [2, 2000])
  apart = some[pairs[0]] - some[pairs[1]]
  if rows.sparse:
    mean = np.zeros([d])
    distances = np.sqrt(np.asarray(apart.multiply(apart).sum(axis=1)).ravel())
    length = float(np.sqrt(np.asarray(some.multiply(some).sum(axis=1)).mean()))
  else:
    mean = some.mean(axis=0)
    largest = np.abs(apart).max(initial=0)
    largest = largest if largest > 0 else 1.0  # Squares stay in range then.
    distances = largest * np.sqrt(((apart / largest) ** 2).sum(axis=1))
    length = largest * float(np.sqrt((((some - mean) / largest) ** 2).sum(1).mean()))
  length = length if length > 0 else 1.0
  distances = distances[distances > 0]
  median = float(np.median(distances)) / length if len(distances) else 1.0
  waves = rng.standard_normal([d, width], np.float32) / np.float32(scale * median)
  phases = rng.uniform(0, 2 * np.pi, width).astype(np.float32)
  linear = not rows.sparse and d <= width // 2
  return _Columns(rows, mean, length, waves, phases, linear)


class _Fit(NamedTuple):
  """Squares and directions of the columns' Gramian, and its product with labels."""

  squares: np.ndarray
  directions: np.ndarray
  targets: np.ndarray


def _fit(
  columns: _Columns,
  taught: np.ndarray,
  given: np.ndarray,
  num_classes: int,
  bar: Callable[[list[np.ndarray]], Any],
) -> _Fit:
  labels = np.eye(num_classes, dtype=np.float32)
  if len(taught) < columns.number:
    # Few examples: by their inner products, which are fewer than the columns'.
    table = columns(taught)
    squares, vectors = np.linalg.eigh((table @ table.T).astype(np.float64))
    kept = squares > 1e-6 * squares.max()
    lengths, vectors = np.sqrt(squares[kept]), vectors[:, kept]
    directions = (table.T @ (vectors / lengths)).astype(np.float32)
    targets = lengths[:, None] * (vectors.T @ labels[given[taught]])
    return _Fit(squares[kept], directions, targets)
  gramian = np.zeros([columns.number] * 2)
  targets = np.zeros([columns.number, num_classes])
  for part in bar(_parts(taught, columns.number)):
    table = columns(part)
    gramian += table.T @ table
    targets += table.T @ labels[given[part]]
  squares, directions = np.linalg.eigh(gramian)
  targets = directions.T @ targets
  return _Fit(np.maximum(squares, 0), directions.astype(np.float32), targets)


def _held_out(
  fit: _Fit, along: np.ndarray, own: np.ndarray, ridge: float
) -> np.ndarray:
  """The regression's value for each class, without the example, [count, C].

  `along` are the examples' columns along the fit's directions.
  """
  inverse = 1 / (fit.squares + ridge)
  values = along @ (inverse[:, None] * fit.targets).astype(np.float32)
  leverage = (along**2 @ inverse.astype(np.float32)).astype(np.float64)
  leverage = np.where(own >= 0, np.minimum(leverage, 1 - 1e-3), 0)
  rows = np.flatnonzero(own >= 0)
  values = values.astype(np.float64)
  values[rows, own[rows]] -= leverage[rows]
  return (values / (1 - leverage)[:, None]).astype(np.float32)


def _error(values: np.ndarray, own: np.ndarray) -> float:
  """The mean squared error of labels."""
  right = values[np.arange(len(own)), own]
  return float(((values**2).sum(axis=1) - 2 * right + 1).mean())


def _parts(indices: np.ndarray, width: int) -> list[np.ndarray]:
  size = max(1, _CELLS // width)
  return [indices[start : start + size] for start in range(0, len(indices), size)]


def _fits(values: np.ndarray) -> np.ndarray:
  """Which numbers are finite, and have a square that is."""
  return np.abs(values.astype(np.float64)) < 1e150

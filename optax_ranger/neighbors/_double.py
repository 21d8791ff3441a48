"""Features in their own type on the host: narrowed for the device, measured in float64.

The device searches among float32 rows. Where these are not the features exactly,
the candidates are measured again here, and examples whose neighbors float32 cannot
tell are compared with all others, in float64.
"""

from collections.abc import Callable
from collections.abc import Iterable
import math
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_ranger._core import host

# Candidates that the device finds beside the k nearest.
SPARE = 8
_ROWS = 8192  # at a time
_CELLS = 2**24  # of a block of distances
_MEASURED = 2**18  # numbers of the candidates that are measured at a time

Bar = Callable[[Iterable[Any]], Iterable[Any]]


class Rows(NamedTuple):
  """Features on the host.

  Attributes:
    values: ``[n, d]``, in their own type; of unit length (cosine) but for zeros.
    origin: ``[d]``, what is subtracted before products.
    alive: ``[n]``, whether a row is anybody's neighbor.
    error: ``[n]``, how far the row that the device has is from this one.
  """

  values: np.ndarray
  origin: np.ndarray
  alive: np.ndarray
  error: np.ndarray

  def take(self, places: Any) -> "Rows":
    """Some of the rows."""
    values, alive, error = (x[places] for x in (self.values, self.alive, self.error))
    return Rows(values, self.origin, alive, error)


def own_rows(features: Any, metric: str) -> Rows:
  """Features as they are measured here."""
  values = np.asarray(features)
  if values.dtype.kind not in "iuf" or values.dtype.itemsize < 4:
    values = values.astype(np.float32)
  alive = np.asarray(np.isfinite(values).all(axis=1))
  error = np.zeros([len(values)])
  if metric == "cosine":
    values = values.astype(np.float64)
    values = np.where(alive[:, None], values, 0)
    # By the largest entry first, so that squares stay in range.
    size = np.abs(values).max(axis=1, keepdims=True, initial=0)
    values /= np.where(size > 0, size, 1)
    norms = np.sqrt((values**2).sum(axis=1, keepdims=True))
    values /= np.where(norms > 0, norms, 1)
    origin = np.zeros(values.shape[1])
    # The device makes unit rows in float32.
    error += (math.log2(values.shape[1]) + 8) * float(np.finfo(np.float32).eps)
  else:
    origin = host.nearest_zero(values)
  return Rows(values, origin, alive, error)


def narrow(features: Any, metric: str) -> tuple[Any, Rows | None]:
  """Features for the device, and their own rows where the device's are not the same.

  Wide numbers of the host are shifted in their own type, column by column, before
  they are rounded. Arrays of JAX, traced ones too, are taken as they are.
  """
  double = jnp.result_type(float) == np.float64
  if not host.is_wide(features) or (double and np.asarray(features).dtype.kind == "f"):
    return features, None
  values = np.asarray(features)
  if _fits(values):
    return values, None
  rows = own_rows(values, metric)
  narrowed = np.empty(values.shape, np.float64 if double else np.float32)
  for part in _parts(len(values)):
    shifted = _centered(rows, rows.origin, part)
    with np.errstate(over="ignore"):
      narrowed[part] = shifted
    rows.alive[part] &= np.isfinite(narrowed[part]).all(axis=1)
    lost = np.where(rows.alive[part, None], shifted, 0)
    lost -= np.where(rows.alive[part, None], narrowed[part], 0)
    rows.error[part] += np.sqrt((lost**2).sum(axis=1))
  narrowed[~rows.alive] = np.nan
  return narrowed, rows if rows.error.any() else None


def settle(
  keys: Rows,
  queries: Rows,
  ids: np.ndarray,
  found: tuple[np.ndarray, np.ndarray, np.ndarray | None],
  k: int,
  metric: str,
  *,
  bar: Bar = iter,
) -> tuple[np.ndarray, np.ndarray, int]:
  """The k nearest in their own type, of those that the device found and of others.

  Args:
    keys: all rows.
    queries: the rows whose neighbors are found.
    ids: ``[m]``, the place of each query among the keys, -1 for none.
    found: distances and indices of the device, ``[m, at least k]``, nearest first,
      and ``[m]``, of which it is sure that there are no nearer ones; None where
      the search is approximate: then nobody is searched for again.
    k: how many.
    metric: as everywhere.
    bar: shows progress.

  Returns:
    Distances and indices ``[m, k]``, and how many were compared with all others.
  """
  distances, indices, sure = found
  m, width = indices.shape
  squares = np.empty([m, k])
  nearest = np.empty([m, k], np.int32)
  for part in _parts(m, max(1, _MEASURED // max(1, width * keys.values.shape[1]))):
    candidates = indices[part]
    far = _squares(keys, candidates, queries.values[part], metric)
    far = np.where(candidates >= 0, far, np.inf)
    order = np.lexsort((candidates, far))[:, :k]
    squares[part] = np.take_along_axis(far, order, axis=1)
    nearest[part] = np.take_along_axis(candidates, order, axis=1)
  repaired = np.zeros([0], np.int64)
  if sure is not None:
    # What the device left out is at least this far, less what it rounded.
    last = distances[:, -1].astype(np.float64)
    last = np.sqrt(2 * last) if metric == "cosine" else last
    eps = float(np.finfo(distances.dtype).eps)
    worst = keys.error[keys.alive].max(initial=0)
    rounding = eps * (math.log2(keys.values.shape[1]) + 8)
    bound = last * (1 - rounding) - (queries.error + worst)
    everyone = indices[:, -1] < 0  # There were no more.
    sure = sure & (everyone | (np.sqrt(squares[:, -1]) < bound))
    repaired = np.flatnonzero(~sure & queries.alive)
  if len(repaired):
    some = queries.take(repaired)
    squares[repaired], nearest[repaired] = search(
      keys, some, ids[repaired], k, k, metric, bar=bar
    )
  nearest[np.isinf(squares)] = -1
  dead = ~queries.alive
  squares[dead], nearest[dead] = np.inf, -1
  far = squares / 2 if metric == "cosine" else np.sqrt(squares)
  with np.errstate(over="ignore"):
    limited = np.minimum(far, float(np.finfo(distances.dtype).max))
  far = np.where(np.isinf(squares), np.inf, limited)
  return far.astype(distances.dtype), nearest, len(repaired)


def search(
  keys: Rows,
  queries: Rows,
  ids: np.ndarray,
  k: int,
  keep: int,
  metric: str,
  *,
  dtype: Any = np.float64,
  bar: Bar = iter,
) -> tuple[np.ndarray, np.ndarray]:
  """Compares some rows with all keys, in float64: those that hold the k nearest.

  Args:
    keys: all rows.
    queries: the rows whose neighbors are found.
    ids: ``[m]``, the place of each query among the keys, -1 for none.
    k: how many must be right.
    keep: how many are returned, at least k, ties to the lower index.
    metric: as everywhere.
    dtype: distances that are equal in it are ties.
    bar: shows progress.

  Returns:
    Squared distances (cosine: of unit rows) and indices, ``[m, keep]``, nearest
    first; infinite and -1 where there are no more.
  """
  n, d = keys.values.shape
  m = len(queries.values)
  squares, chosen = np.full([m, keep], np.inf), np.full([m, keep], -1, np.int32)
  lengths = np.concatenate(
    [(_centered(keys, keys.origin, part) ** 2).sum(axis=1) for part in _parts(n)]
  )
  lengths = np.where(keys.alive, lengths, np.inf)
  longest = lengths[keys.alive].max(initial=0)
  slack = 4 * (d + 8) * float(np.finfo(np.float64).eps)
  for part in bar(list(_parts(m, max(1, _CELLS // max(1, n))))):
    values = queries.values[part]
    rows = _centered(queries, keys.origin, part)
    own = (rows**2).sum(axis=1)
    bounds = np.empty([len(rows), n])
    for some in _parts(n):
      bounds[:, some] = -2 * (rows @ _centered(keys, keys.origin, some).T)
    bounds += own[:, None] + lengths[None]
    inside = np.flatnonzero(ids[part] >= 0)
    bounds[inside, ids[part][inside]] = np.inf
    if metric == "cosine":
      apart = ~_has_direction(keys.values)[None] | ~_has_direction(values)[:, None]
      bounds = np.where(apart & np.isfinite(bounds), 2, bounds)
    limit = np.partition(bounds, k - 1, axis=1)[:, k - 1]
    limit += slack * (own + longest)
    for row in np.flatnonzero(queries.alive[part]):
      near = np.flatnonzero((bounds[row] <= limit[row]) & (bounds[row] < np.inf))
      exact = _squares(keys, near[None], values[row : row + 1], metric)[0]
      order = np.lexsort((near, exact.astype(dtype)))[:keep]
      squares[part.start + row, : len(order)] = exact[order]
      chosen[part.start + row, : len(order)] = near[order]
  return squares, chosen


def squares_of(
  keys: Rows, indices: np.ndarray, queries: Rows, metric: str
) -> np.ndarray:
  """Squared distances of given neighbors, [m, k]; infinite for a dead row."""
  far = _squares(keys, indices, queries.values, metric)
  alive = keys.alive[indices] & queries.alive[:, None]
  return np.where(alive, far, np.inf)


def _squares(
  keys: Rows, indices: np.ndarray, queries: np.ndarray, metric: str
) -> np.ndarray:
  """By differences in their own type, so that nothing cancels."""
  others = keys.values[indices]
  with np.errstate(invalid="ignore", over="ignore"):
    away = host.difference(others, queries[:, None])
    squares = np.square(away, out=away).sum(axis=2)
  if metric == "cosine":
    empty = ~_has_direction(others) | ~_has_direction(queries)[:, None]
    squares = np.where(empty, 2, squares)
  return squares


def _centered(rows: Rows, origin: np.ndarray, part: slice) -> np.ndarray:
  """Some rows around the origin, zeros where they are dead."""
  away = host.difference(rows.values[part], origin)
  return np.where(rows.alive[part, None], away, 0)


def _has_direction(rows: np.ndarray) -> np.ndarray:
  return np.asarray(rows.any(axis=-1))


def _fits(values: np.ndarray) -> bool:
  """Whether float32 holds all these numbers exactly."""
  if values.dtype.kind in "iu":
    return not values.size or max(-int(values.min()), int(values.max())) <= 2**24
  with np.errstate(over="ignore"):
    return all(
      np.array_equal(values[part], values[part].astype(np.float32), equal_nan=True)
      for part in _parts(len(values))
    )


def _parts(count: int, size: int = _ROWS) -> Iterable[slice]:
  return (slice(i, min(i + size, count)) for i in range(0, count, size))

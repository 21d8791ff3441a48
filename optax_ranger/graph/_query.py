"""`query`: neighbors of new rows among the rows of a data set."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import progress as _progress
from optax_ranger._core import validate
from optax_ranger._core.types import Neighbors
from optax_ranger.neighbors import _double
from optax_ranger.neighbors import _nearest
from optax_ranger.neighbors import _points
from optax_ranger.neighbors import _search

_BLOCK = 2048  # queries of a tile


def query(
  features: Any,
  queries: Any,
  k: int,
  *,
  metric: str = "euclidean",
  progress: bool = True,
) -> Neighbors:
  """Finds the k nearest rows of a data set for each of some new rows.

  Use it to label, audit or weigh examples that are not in the graph: held-out
  rows, or rows of today among those of yesterday. A query that equals a row of the
  data set has it as its neighbor, at distance 0. The search is exact, by tiles in
  JAX; neighbors are measured and ordered in float64 on the host, by the features
  in their own type.

  Args:
    features: ``[n, d]``, the data set, of any real type.
    queries: ``[m, d]``, the new rows.
    k: how many, in [1, n]; a static Python integer.
    metric: ``"euclidean"`` or ``"cosine"``, as in ``build``.
    progress: a bar (tqdm) on what takes more than two seconds.

  Returns:
    ``Neighbors`` with arrays of ``[m, k]``, nearest first, ties to the lower index,
    uniform weights. Indices are positions among the n rows of the data set. Rows
    that are not finite have no neighbors (-1), and are nobody's. Memory is
    O(m k + (n + m) d + block).

  Guarantees:
    * It equals a full sort, in exact numbers too.
    * Rows that are left out of a graph have the neighbors there that the whole graph
      gives them.

  Raises:
    ValueError: for arrays that are not 2-D or of unequal d, k outside [1, n],
      another metric.
    TypeError: for complex rows, two integer types that have none in common, k that
      is not a Python integer.

  Examples:
    >>> import numpy as np
    >>> from optax_ranger import graph
    >>> points, labels = np.array([[0.0], [1.0], [5.0]]), np.array(["a", "a", "b"])
    >>> found = graph.query(points, np.array([[4.5], [0.5]]), 1)
    >>> print(found.indices.tolist(), labels[np.ravel(found.indices)])
    [[2], [0]] ['b' 'a']
  """
  both = _stacked(features, queries)
  validate.static_count("k", k)
  m = len(queries)
  n = len(both) - m
  if k > n:
    raise ValueError(f"k must be at most the rows of features, n = {n}, got {k}.")
  validate.choice("metric", metric, _nearest.METRICS)
  narrowed, own = _double.narrow(both, metric)
  own = _double.own_rows(both, metric) if own is None else own
  points = _points.prepare(jnp.asarray(narrowed), metric, n + m, n + m)
  wanted = min(k + _double.SPARE, n)
  tile, width, padded = _points.sizes(n, _BLOCK)
  tile = min(tile, max(m, 1))
  keys = _part(points, 0, n, padded)
  news = _part(points, n, n + m, max(tile, m + -m % tile))
  bar = lambda parts, what: _progress.bar(parts, what, progress)
  parts = [
    jax.block_until_ready(
      _search.search_others(
        keys,
        _points.cut(news, first, tile),
        k=wanted,
        metric=metric,
        n=n,
        keys=width,
      )
    )
    for first in bar(range(0, news.term.shape[0], tile), "queries")
  ]
  distances, indices, sure = (
    np.concatenate([np.asarray(part) for part in column])[:m]
    for column in zip(*parts, strict=True)
  )
  distances, indices, _ = _double.settle(
    own.take(slice(n)),
    own.take(slice(n, None)),
    np.full([m], -1),
    (distances, indices, sure),
    k,
    metric,
    bar=lambda parts: bar(parts, "repairs"),
  )
  return _nearest.uniform(jnp.asarray(indices), jnp.asarray(distances))


def _stacked(features: Any, queries: Any) -> Any:
  """Rows of the data set, then the new ones, in a type that holds both."""
  pair = {"features": features, "queries": queries}
  for name, rows in pair.items():
    if np.ndim(rows) != 2 or not np.shape(rows)[1]:
      raise ValueError(
        f"{name} must have shape [n, d], d at least 1, got {list(np.shape(rows))}."
      )
  if np.shape(features)[1] != np.shape(queries)[1]:
    raise ValueError(
      f"queries must have as many columns as features, {np.shape(features)[1]}, got"
      f" {np.shape(queries)[1]}."
    )
  arrays = [np.asarray(rows) for rows in pair.values()]
  for name, rows in zip(pair, arrays, strict=True):
    if rows.dtype.kind == "c":
      raise TypeError(f"{name} must be real, got {rows.dtype}.")
  integers = all(rows.dtype.kind in "iu" for rows in arrays)
  both = np.concatenate(arrays)
  if integers and both.dtype.kind == "f":
    raise TypeError(
      f"features and queries must have a type in common, got {arrays[0].dtype} and"
      f" {arrays[1].dtype}, whose numbers no integer type holds: convert one of them."
    )
  return both


def _part(points: _points.Points, first: int, last: int, padded: int) -> _points.Points:
  """Some of the points, and dead ones behind them."""
  more = padded - (last - first)
  return points._replace(
    rows=jnp.pad(points.rows[first:last], ((0, more), (0, 0))),
    term=jnp.pad(points.term[first:last], (0, more), constant_values=jnp.inf),
  )

"""Exact graphs on one host: candidates from an engine, then a certificate.

Engines differ in how they find candidates. What is returned is measured and
ordered by one function, so that all of them give the same graph.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import progress as _progress
from optax_ranger.graph import _duplicates
from optax_ranger.neighbors import _double
from optax_ranger.neighbors import _points
from optax_ranger.neighbors import _search

_BLOCK = 2048  # queries of a tile of the engine in JAX
_CHUNK = 1024  # examples whose candidates are measured at a time


class Exact(NamedTuple):
  """A graph, [n, k], and what it took.

  Attributes:
    distances: nearest first.
    indices: -1 where there is none.
    num_repaired: examples whose candidates were not sure to hold all k nearest.
    num_duplicates: examples that are equal to one before them.
  """

  distances: np.ndarray
  indices: np.ndarray
  num_repaired: int
  num_duplicates: int


def build(
  features: Any,
  k: int,
  metric: str,
  progress: bool,
  engine: Callable[..., Any],
) -> Exact:
  """Searches among the distinct rows, and lists the copies of what was found."""
  n = len(features)
  points = _points.prepare(jnp.asarray(features), metric, n, n)
  groups = _duplicates.find(np.asarray(points.rows))
  alive = np.isfinite(np.asarray(points.term))
  # Rows that are not finite are zeros by now, and not equal to a row of zeros.
  groups = groups if alive.all() else _duplicates.find(_marked(points, alive))
  u = len(groups.first)
  if u < n:
    features = jnp.asarray(features)[groups.first]
    points = _points.prepare(features, metric, u, u)
  dtype = np.asarray(points.rows[:0]).dtype
  fewer = min(k, u - 1)
  if fewer == 0:
    distances, indices = np.zeros([u, 0], dtype), np.zeros([u, 0], np.int32)
    repaired = 0
  else:
    distances, indices, sure = engine(points, fewer, metric, progress)
    bad = np.flatnonzero(~sure)
    repaired = len(bad)
    if repaired:
      _repair(points, bad, distances, indices, metric, progress)
  if u < n:
    # A zero row has no direction: it is at distance one from its copies too.
    distances, indices = _duplicates.expand(groups, distances, indices, k, 0.0)
    if metric == "cosine":
      empty = ~np.asarray(points.rows).any(axis=1)
      lost = np.flatnonzero(np.take(empty, groups.group) & alive)
      distances[lost], indices[lost] = _directionless(lost, alive, k)
    distances[~alive], indices[~alive] = np.inf, -1
    distances = distances.astype(dtype)
  # The rows that are not finite make one group, and are copies of nobody.
  copies = n - u - max(0, int((~alive).sum()) - 1)
  return Exact(distances, indices, repaired, copies)


def _marked(points: _points.Points, alive: np.ndarray) -> np.ndarray:
  """Rows that are not finite, made different from all the others and alike."""
  rows = np.array(points.rows)
  rows[~alive] = np.inf
  return rows


def _directionless(
  lost: np.ndarray, alive: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """All others are at distance one: the first k of them."""
  usable = np.flatnonzero(alive)[: k + 1]
  indices = np.full([len(lost), k], -1, np.int32)
  distances = np.full([len(lost), k], np.inf)
  for row, i in enumerate(lost):
    others = usable[usable != i][:k]
    indices[row, : len(others)] = others
    distances[row, : len(others)] = 1
  return distances, indices


def by_jax(points: _points.Points, k: int, metric: str, progress: bool) -> Any:
  """The engine in JAX: tiles of lower bounds, on any accelerator."""
  n = points.term.shape[0]
  queries, keys, padded = _points.sizes(n, _BLOCK)
  more = padded - n
  rows = jnp.pad(points.rows, ((0, more), (0, 0)))
  term = jnp.pad(points.term, (0, more), constant_values=jnp.inf)
  points = points._replace(rows=rows, term=term)
  parts = []
  for first in _progress.bar(range(0, padded, queries), "neighbors", progress):
    parts.append(
      jax.block_until_ready(
        _search.search_some(
          points,
          jnp.int32(first),
          k=k,
          metric=metric,
          n=n,
          queries=queries,
          keys=keys,
          count=queries,
        )
      )
    )
  distances, indices, sure = (
    np.concatenate([np.asarray(part) for part in column])[:n]
    for column in zip(*parts, strict=True)
  )
  return distances, indices, sure


def measured(
  points: _points.Points, candidates: np.ndarray, k: int, metric: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Distances and indices of the k nearest candidates; the last one, squared."""
  return _measured(points, np.arange(len(candidates)), candidates, k, metric)


def _measured(points, ids, candidates, k, metric):
  n, count = points.term.shape[0], len(ids)
  size = min(_CHUNK, count)
  more = -count % size
  ids = np.pad(ids, (0, more)).astype(np.int32)
  candidates = np.pad(candidates, ((0, more), (0, 0))).astype(np.int32)
  parts = [
    _search.rank(
      points, ids[i : i + size], candidates[i : i + size], k=k, metric=metric, n=n
    )
    for i in range(0, len(ids), size)
  ]
  distances, indices, last = (
    np.concatenate([np.asarray(part) for part in column])[:count]
    for column in zip(*parts, strict=True)
  )
  return distances, indices, last


def _repair(
  points: _points.Points,
  bad: np.ndarray,
  distances: np.ndarray,
  indices: np.ndarray,
  metric: str,
  progress: bool,
) -> None:
  """Searches again in float64, for those of which float32 is not sure."""
  k, n = indices.shape[1], points.term.shape[0]
  alive = np.isfinite(np.asarray(points.term))
  center = np.asarray(points.center[0], np.float64)
  rows = _double.Rows(np.asarray(points.rows), center, alive, np.zeros([n]))
  _, chosen = _double.search(
    rows,
    rows.take(bad),
    bad,
    k,
    min(k + _search.SPARE, n - 1),
    metric,
    dtype=rows.values.dtype,
    bar=lambda parts: _progress.bar(parts, "repairs", progress),
  )
  distances[bad], indices[bad], _ = _measured(points, bad, chosen, k, metric)

"""The exact search for nearest neighbors: lower bounds by tiles, then a certificate.

One matrix product per tile gives a lower bound of every squared distance: its
terms, less what rounding can have added. The few best are measured exactly. An
example is sure when nothing that was left out can be nearer than what it has;
the others are measured against all examples, which is slow, and rare.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import numerics
from optax_ranger._core.sharding import vary
from optax_ranger._core.sharding import varying_axes
from optax_ranger._core.types import Array
from optax_ranger.neighbors import _points

# Candidates kept beside the k best: with none, ordinary data needs repairs.
SPARE = 8
# Examples that are repaired at a time.
_REPAIRS = 64


class Found(NamedTuple):
  """The best so far: ``[n, k]``, nearest first; index `total` where there is none.

  Attributes:
    distances: squared, in the unit of ``Points.rows``.
    indices: positions.
    bound: ``[n]``, no example that was left out is nearer than this.
  """

  distances: Array
  indices: Array
  bound: Array


@functools.partial(jax.jit, static_argnames=("k", "metric", "block_size", "repairs"))
def search(
  features: Array,
  *,
  k: int,
  metric: str,
  block_size: int,
  repairs: bool = True,
) -> tuple[Array, Array, Array]:
  """Distances and indices, [n, k], and which examples are sure, [n]."""
  n = features.shape[0]
  queries, keys, padded = _points.sizes(n, block_size)
  points = _points.prepare(features, metric, n, padded)

  def fetch(block):
    return _points.cut(points, block * keys, keys), block * keys

  over = Sweep(fetch, padded // keys, metric, n)
  ids = jnp.arange(padded, dtype=jnp.int32)
  found = look_everywhere(points, ids, over, k, queries)
  sure = is_sure(found, points, n)
  if repairs:
    found, sure = repair(found, sure, points, ids, over, lambda x: x)
  distances, indices = finish(found, points.scale, metric, n)
  return distances[:n], indices[:n], sure[:n]


@functools.partial(
  jax.jit, static_argnames=("k", "metric", "n", "queries", "keys", "count")
)
def search_some(
  points: _points.Points,
  first: Array,
  *,
  k: int,
  metric: str,
  n: int,
  queries: int,
  keys: int,
  count: int,
) -> tuple[Array, Array, Array]:
  """As `search`, of the `count` points from `first` on, without repairs."""
  fetch = lambda block: (_points.cut(points, block * keys, keys), block * keys)
  over = Sweep(fetch, points.term.shape[0] // keys, metric, n)
  some = _points.cut(points, first, count)
  ids = first + jnp.arange(count, dtype=jnp.int32)
  found = look_everywhere(some, ids, over, k, queries)
  return *finish(found, points.scale, metric, n), is_sure(found, some, n)


@functools.partial(jax.jit, static_argnames=("k", "metric", "n", "keys"))
def search_others(
  points: _points.Points,
  others: _points.Points,
  *,
  k: int,
  metric: str,
  n: int,
  keys: int,
) -> tuple[Array, Array, Array]:
  """As `search_some`, of rows that are not among the points."""
  fetch = lambda block: (_points.cut(points, block * keys, keys), block * keys)
  over = Sweep(fetch, points.term.shape[0] // keys, metric, n)
  count = others.term.shape[0]
  nowhere = jnp.full([count], -1, jnp.int32)
  found = look_everywhere(others, nowhere, over, k, count)
  return *finish(found, points.scale, metric, n), is_sure(found, others, n)


@functools.partial(jax.jit, static_argnames=("k", "metric", "n"))
def rank(
  points: _points.Points,
  ids: Array,
  candidates: Array,
  *,
  k: int,
  metric: str,
  n: int,
) -> tuple[Array, Array, Array]:
  """The k nearest of given candidates, [count, m], negative where there is none.

  Returns:
    Distances and indices, [count, k], and the last squared distance, [count].
  """
  nobody = (candidates < 0) | (candidates == ids[:, None])
  nobody |= jnp.isinf(points.term)[candidates] | jnp.isinf(points.term[ids])[:, None]
  queries = points.rows[ids]
  distances = _measure(queries, points.rows, candidates, metric)
  distances = jnp.where(nobody, jnp.inf, distances)
  start = _nothing((len(ids), k), n, distances.dtype)
  found = _merge(start, distances, candidates, start.bound)
  return *finish(found, points.scale, metric, n), found.distances[:, -1]


class Sweep(NamedTuple):
  """How to go through all n points, block by block, in order of index.

  Attributes:
    fetch: gives a block and the index of its first point.
    blocks: how many there are.
    metric: as everywhere.
    n: the number of all points; an index that is not less is a padding.
  """

  fetch: Callable[[Any], tuple[_points.Points, Any]]
  blocks: int
  metric: str
  n: int

  def run(
    self, visit: Callable[..., Found], start: Found, like: _points.Points
  ) -> Found:
    """Folds `visit(best, keys, first index)`; `like` tells on how many devices."""
    axes = varying_axes(like.rows)
    start = jax.tree.map(lambda leaf: vary(leaf, axes), start)
    step = lambda best, block: (visit(best, *self.fetch(block)), None)
    return jax.lax.scan(step, start, jnp.arange(self.blocks, dtype=jnp.int32))[0]


def _nothing(shape: tuple[int, ...], n: int, dtype: Any) -> Found:
  infinite = jnp.full(shape, jnp.inf, dtype)
  return Found(infinite, jnp.full(shape, n, jnp.int32), infinite[..., 0])


def look_everywhere(
  points: _points.Points, ids: Array, over: Sweep, k: int, queries: int
) -> Found:
  """Compares these points with all points, tile by tile.

  Args:
    points: the queries, those of this device.
    ids: their indices among all points.
    over: goes through all points.
    k: how many neighbors.
    queries: how many of them make a tile; divides their number.
  """
  local, d = points.rows.shape
  tiles = local // queries
  rows = points.rows.reshape(tiles, queries, d)
  terms, ids = points.term.reshape(tiles, queries), ids.reshape(tiles, queries)

  def visit(best, keys, first):
    def one_tile(tile):
      best, rows, term, ids = tile
      some = points._replace(rows=rows, term=term)
      return _tile(best, some, ids, keys, first, over.metric)

    return jax.lax.map(one_tile, (best, rows, terms, ids))

  start = _nothing((tiles, queries, k), over.n, rows.dtype)
  found = over.run(visit, start, points)
  return jax.tree.map(lambda leaf: leaf.reshape(local, *leaf.shape[2:]), found)


def _tile(
  best: Found,
  points: _points.Points,
  ids: Array,
  keys: _points.Points,
  first: Any,
  metric: str,
) -> Found:
  """Merges the nearest of one block of keys into the best of some queries."""
  k, width = best.indices.shape[1], keys.term.shape[0]
  keep = min(k + SPARE, width)
  product = jnp.matmul(
    points.rows - points.center,
    (keys.rows - keys.center).T,
    precision=jax.lax.Precision.HIGHEST,
  )
  bounds = keys.term[None] - 2 * product
  columns = first + jnp.arange(width, dtype=jnp.int32)
  bounds = jnp.where(ids[:, None] == columns[None], jnp.inf, bounds)
  bounds, places = _least(bounds, keep)
  if keep < width:
    left_out = jnp.minimum(best.bound, points.term + bounds[:, -1])
  else:
    left_out = best.bound
  distances = _measure(points.rows, keys.rows, places, metric)
  nobody = jnp.isinf(bounds) | jnp.isinf(points.term)[:, None]
  distances = jnp.where(nobody, jnp.inf, distances)
  return _merge(best, distances, first + places, left_out)


def _merge(best: Found, distances: Array, indices: Array, bound: Array) -> Found:
  """The k least of those at hand and the new ones; ties go to the lower index."""
  k = best.indices.shape[1]
  largest = jnp.iinfo(jnp.int32).max
  indices = jnp.where(jnp.isinf(distances), largest, indices)
  both = (
    jnp.concatenate([best.distances, distances], axis=1),
    jnp.concatenate([best.indices, indices], axis=1),
  )
  distances, indices = jax.lax.sort(both, num_keys=2)
  return Found(distances[:, :k], indices[:, :k], bound)


def _least(values: Array, keep: int) -> tuple[Array, Array]:
  """The least values of each row and their places; of equals, the first.

  The groups with the `keep` least minima hold the `keep` least values.
  """
  rows, width = values.shape
  group = 1 << max(0, int(np.log2(max(1, width / keep)) / 2))
  while width % group:
    group //= 2
  if group == 1:
    least, places = jax.lax.top_k(-values, keep)
    return -least, places
  grouped = values.reshape(rows, width // group, group)
  _, groups = jax.lax.top_k(-grouped.min(axis=2), keep)
  groups = jnp.sort(groups, axis=1)
  chosen = jnp.take_along_axis(grouped, groups[:, :, None], axis=1)
  least, places = jax.lax.top_k(-chosen.reshape(rows, -1), keep)
  column = jnp.take_along_axis(groups, places // group, axis=1)
  return -least, column * group + places % group


def _measure(queries: Array, rows: Array, places: Array, metric: str) -> Array:
  """Squared distances without cancellation, for the few that were kept."""

  def one_place(column):
    return _points.squared_distance(queries, rows[column], metric)

  return jax.lax.map(one_place, places.T).T


def is_sure(found: Found, points: _points.Points, n: int) -> Array:
  """Whether nothing that was left out can be among the k nearest."""
  last = found.distances[:, -1] * (1 + _points.slack(points.rows))
  full = found.indices[:, -1] < n
  nearer = (full & (last < found.bound)) | jnp.isinf(found.bound)
  return nearer | jnp.isinf(points.term)


def repair(
  found: Found,
  sure: Array,
  points: _points.Points,
  ids: Array,
  over: Sweep,
  most: Callable[[Array], Array],
) -> tuple[Found, Array]:
  """Measures those that are not sure against all others, a few at a time."""
  local, k = found.indices.shape
  count = min(_REPAIRS, local)

  def some_are_left(carry):
    return most((~carry[1]).sum()) > 0

  def repair_some(carry):
    found, sure = carry
    (chosen,) = jnp.nonzero(~sure, size=count, fill_value=local)
    queries = points.rows.at[chosen].get(mode="fill", fill_value=0)
    own = ids.at[chosen].get(mode="fill", fill_value=over.n)

    def visit(best, keys, first):
      columns = first + jnp.arange(keys.term.shape[0], dtype=jnp.int32)

      def one(query, own):
        squares = _points.squared_distance(query[None], keys.rows, over.metric)
        return jnp.where(jnp.isinf(keys.term) | (columns == own), jnp.inf, squares)

      squares = jax.lax.map(lambda pair: one(*pair), (queries, own))
      squares, places = _least(squares, min(k, squares.shape[1]))
      return _merge(best, squares, first + places, best.bound)

    best = over.run(visit, _nothing((count, k), over.n, queries.dtype), points)
    put = lambda leaf, new: leaf.at[chosen].set(new, mode="drop")
    return jax.tree.map(put, found, best), put(sure, True)

  return jax.lax.while_loop(some_are_left, repair_some, (found, sure))


def finish(found: Found, scale: Array, metric: str, n: int) -> tuple[Array, Array]:
  """Distances in the unit of the features, and -1 where there is no neighbor."""
  filled = found.indices < n
  if metric == "cosine":
    distances = found.distances / 2
  else:
    largest = float(jnp.finfo(found.distances.dtype).max)
    distances = jnp.minimum(numerics.shift(jnp.sqrt(found.distances), scale), largest)
  distances = jnp.where(filled, distances, jnp.inf)
  return distances, jnp.where(filled, found.indices, -1)

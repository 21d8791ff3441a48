"""Features prepared for comparison, and the distance between two of them."""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import host
from optax_ranger._core import numerics
from optax_ranger._core.types import Array

# Keys of a tile for each of its queries: merging costs less in wide tiles.
_WIDTH = 8
# Widths are multiples of this, so that they can be cut into groups.
_GROUPS = 32


class Points(NamedTuple):
  """Features that are ready to be compared.

  Attributes:
    rows: ``[n, d]``, scaled by a power of two, or of unit length (cosine).
    term: ``[n]``, the squared length that stands in a lower bound, a little less
      than the real one; infinite for a row that is nobody's neighbor.
    center: ``[1, d]``, the mean of all rows: around it, products cancel less.
    scale: the exponent of the power of two, ``int32 []``.
  """

  rows: Array
  term: Array
  center: Array
  scale: Array


@functools.partial(jax.jit, static_argnames=("metric", "n", "padded", "add", "most"))
def prepare(
  features: Array,
  metric: str,
  n: int,
  padded: int,
  *,
  add: Callable[[Array], Array] = lambda x: x,
  most: Callable[[Array], Array] = lambda x: x,
) -> Points:
  """Casts, scales and pads; `add` and `most` go over all devices.

  Args:
    features: rows of this device.
    metric: as everywhere.
    n: the number of rows of all devices.
    padded: the number of rows to return.
    add: sums over devices.
    most: the maximum over devices.
  """
  more = padded - features.shape[0]
  if jnp.issubdtype(features.dtype, jnp.floating):
    rows = features.astype(numerics.wide(features.dtype))
  elif metric == "euclidean" and features.dtype.itemsize >= 4:
    # Integers are shifted before they are rounded. The complement turns the order.
    low, high = ~most((~features).max(axis=0)), most(features.max(axis=0))
    origin = jnp.clip(jnp.zeros_like(low), low, high)
    rows = host.difference(features, origin[None])
  else:
    rows = features.astype(np.float32)
  rows = jnp.pad(rows, ((0, more), (0, 0)))
  dtype = rows.dtype
  finite = jnp.isfinite(rows).all(axis=1)
  rows = jnp.where(finite[:, None], rows, jnp.zeros_like(rows))
  largest = jnp.abs(rows).max(axis=1, initial=0)
  center = jnp.zeros([1, rows.shape[1]], dtype)
  if metric == "euclidean":
    # A power of two: the features keep their digits, and squares stay in range.
    scale = jnp.frexp(most(largest.max()))[1]
    rows = numerics.shift(rows, -scale)
    center = add(rows.sum(axis=0, keepdims=True)) / n
    term = ((rows - center) ** 2).sum(axis=1)
  else:
    rows = numerics.shift(rows, -jnp.frexp(largest)[1][:, None])
    norm = jnp.sqrt(sum_of_squares(rows))[:, None]
    rows = rows / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    scale = jnp.zeros([], jnp.int32)
    # All at length one, those without a direction too: distance one from all.
    term = jnp.ones_like(largest)
  # The product and the squared lengths round by at most d ulps each.
  alive = finite & (jnp.arange(padded) < padded - more)
  term = jnp.where(alive, term * (1 - slack(rows)), jnp.inf)
  return Points(rows, term, center, scale)


def sizes(n: int, block_size: int) -> tuple[int, int, int]:
  """Queries and keys of a tile, and the number of rows that makes both fit."""
  blocks = -(-n // (_WIDTH * block_size))
  tiles = -(-n // (blocks * block_size))
  queries = -(-n // (blocks * tiles))
  if queries > _GROUPS:
    queries = -(-queries // _GROUPS) * _GROUPS
  return queries, tiles * queries, blocks * tiles * queries


def slack(rows: Any) -> float:
  """What rounding can add to a squared distance, in units of the squared lengths."""
  return 2 * (rows.shape[1] + 8) * float(jnp.finfo(rows.dtype).eps)


def cut(points: Points, first: Any, count: int) -> Points:
  """The `count` points from `first` on."""
  part = lambda array: jax.lax.dynamic_slice_in_dim(array, first, count)
  return points._replace(rows=part(points.rows), term=part(points.term))


def squared_distance(a: Array, b: Array, metric: str) -> Array:
  """Of rows; of unit vectors (cosine), where a zero row has no direction."""
  squares = sum_of_squares(a - b)
  if metric == "euclidean":
    return squares
  empty = ~a.any(axis=-1) | ~b.any(axis=-1)
  # |a - b|^2 = 2 (1 - <a, b>).
  return jnp.where(empty, jnp.full_like(squares, 2), squares)


def sum_of_squares(rows: Array) -> Array:
  """By halves, entry by entry: the same bits in every program and shape.

  A compiler chooses the order of a reduction by its size, and fuses a product
  with a sum; it may not reorder additions, and a minimum keeps the two apart.
  """
  squares = jnp.minimum(rows * rows, float(jnp.finfo(rows.dtype).max))
  while squares.shape[-1] > 1:
    half = -(-squares.shape[-1] // 2)
    rest = squares[..., half:]
    if rest.shape[-1] < half:
      rest = jnp.pad(rest, [(0, 0)] * (rest.ndim - 1) + [(0, 1)])
    squares = squares[..., :half] + rest
  return squares[..., 0]

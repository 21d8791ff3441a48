"""Inner products of members, summed leaf by leaf: nothing is concatenated.

For Krum and the geometric median they are taken around a center and in a unit that
no single member can move far; for tasks around zero, each member in a unit of its
own. So nothing overflows.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optax_ranger._core import numerics
from optax_ranger._core.members import gather_rows
from optax_ranger._core.members import keep_rows
from optax_ranger._core.members import weighted_sum
from optax_ranger._core.sharding import after
from optax_ranger._core.sharding import is_sharded
from optax_ranger._core.sharding import per_row
from optax_ranger._core.sharding import replicate
from optax_ranger._core.tree import inner_product
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree

# A member this many times the size of the median one is absent: its square would
# leave the others' below the rounding of float32, or overflow.
_FARTHEST = 2.0**40


class Frame(NamedTuple):
  """Where inner products are taken from, and in which unit.

  Attributes:
    weights: ``float [n]``, the members' weights; absent ones have zero.
    center: ``float [n]``, one for the member of median size, where the center
      is, and zero for the others.
    unit: the median size, positive; or ``float [n]``, one for each member.
  """

  weights: Array
  center: Array
  unit: Array


def sizes(updates: PyTree, n: int) -> Array:
  """The largest magnitude among each member's entries, [n]."""
  found = jnp.zeros([n], jnp.float32)
  for leaf in jax.tree.leaves(updates):
    for part in _real_parts(leaf):
      largest = jnp.abs(part).max(axis=tuple(range(1, part.ndim)), initial=0)
      dtype = numerics.widest(found.dtype, numerics.wide(part.dtype))
      largest = replicate(largest.astype(dtype))
      found = jnp.maximum(found.astype(dtype), largest)
  return found


def frame(sizes: Array, weights: Array) -> Frame:
  """Chooses the center and the unit by the members' sizes and weights, [n] each."""
  sizes = sizes.astype(weights.dtype)
  positive = jnp.where(sizes > 0, weights, jnp.zeros_like(weights))
  unit = weighted_quantile(sizes, positive)
  # A member of median size, so no large outlier; the first if there are several.
  there = jnp.logical_and(positive > 0, sizes == unit)
  first = jnp.logical_and(there, jnp.cumsum(there) == 1)
  unit = jnp.where(unit > 0, unit, jnp.ones_like(unit))
  unit = jnp.maximum(unit, 2 * jnp.finfo(unit.dtype).tiny)
  near = sizes / _FARTHEST <= unit
  weights = jnp.where(near, weights, jnp.zeros_like(weights))
  return Frame(weights, first.astype(weights.dtype), unit)


def of_leaf(leaf: Array, frame: Frame, row: Any = None) -> Array:
  """One leaf's inner products, [n, n]; add up those of all leaves.

  With `row`, those of that member alone, [1, n].
  """
  dtype = numerics.widest(numerics.real(numerics.wide(leaf.dtype)))
  n = leaf.shape[0]
  total = jnp.zeros([n if row is None else 1, n], dtype)
  for part in _real_parts(gather_rows(leaf)):
    part = keep_rows(frame.weights > 0, part.astype(dtype))
    unit = frame.unit.astype(dtype)
    part = part / (per_row(unit, part) if unit.ndim else unit)
    part = part - weighted_sum(frame.center, part)[None]
    axes = tuple(range(1, part.ndim))
    total = total + jax.lax.dot_general(
      part if row is None else part[row][None],
      part,
      ((axes, axes), ((), ())),
      precision=jax.lax.Precision.HIGHEST,
      out_sharding=PartitionSpec(None, None) if is_sharded(part) else None,
    )
  return total


def of_members(updates: PyTree, weights: Array) -> tuple[Any, Any]:
  """The frame of these members and their inner products, over all leaves."""
  found = frame(sizes(updates, weights.shape[0]), weights)
  return found, _summed(updates, found)


class Directions(NamedTuple):
  """Lengths and angles of members.

  Attributes:
    norms: ``float [n]``, of whole gradients; zero for absent members.
    cosines: ``float [n, n]``, of the angles between them; zero for members that are
      zero or absent.
  """

  norms: Array
  cosines: Array


def own_frame(sizes: Array, weights: Array) -> Frame:
  """Around zero, each member in the unit of its largest entry."""
  sizes = sizes.astype(weights.dtype)
  unit = jnp.where(sizes > 0, sizes, jnp.ones_like(sizes))
  return Frame(weights, jnp.zeros_like(weights), unit)


def direction(gradient: PyTree) -> tuple[Array, PyTree]:
  """The norm of one gradient, and the gradient in that unit; zero stays zero.

  The norm of a gradient that is not finite is infinite or NaN.
  """
  size = sizes(jax.tree.map(lambda leaf: leaf[None], gradient), 1)[0]

  def over(divisor: Array, leaf: Array) -> Array:
    return numerics.divide(leaf.astype(numerics.wide(leaf.dtype)), divisor)

  # In two steps: the square of the norm may overflow where the norm does not.
  scaled = jax.tree.map(lambda leaf: over(size, leaf), gradient)
  length = jnp.sqrt(inner_product(scaled, scaled)).astype(size.dtype)
  unit = jax.tree.map(
    lambda leaf, whole: over(length, leaf).astype(whole.dtype), scaled, gradient
  )
  return size * length, unit


def directions(products: Array, frame: Frame, sizes: Array) -> Directions:
  """From the inner products in an own frame, and the sizes."""
  lengths = jnp.sqrt(jnp.diagonal(products))
  there = lengths > 0
  inverse = jnp.where(there, 1 / jnp.where(there, lengths, 1), 0)
  cosines = products * inverse[:, None] * inverse[None]
  norms = jnp.where(frame.weights > 0, lengths * sizes.astype(lengths.dtype), 0)
  return Directions(norms, jnp.clip(cosines, -1, 1))


def directions_of_members(updates: PyTree, weights: Array) -> Directions:
  """Lengths and angles of these members, over all leaves."""
  n = weights.shape[0]
  found = sizes(updates, n)
  frame = own_frame(found, weights)
  return directions(_summed(updates, frame), frame, found)


def squared_distances(gramian: Array) -> Array:
  """Squared distances between the members, [n, n], in the Gramian's unit."""
  squares = jnp.diagonal(gramian)
  squared = squares[:, None] + squares[None] - 2 * gramian
  return jnp.maximum(squared, jnp.zeros_like(squared))


def weighted_quantile(values: Array, weights: Array, share: Any = 0.5) -> Array:
  """The lower weighted quantile of a vector; zero where no weight is positive."""
  if not values.shape[0]:
    return jnp.zeros([], values.dtype)
  order = jnp.argsort(jnp.where(weights > 0, values, jnp.inf))
  upper = jnp.cumsum(weights[order])
  room = upper[-1] * (values.shape[0] * jnp.finfo(upper.dtype).eps)
  place = jnp.argmax(upper >= upper[-1] * share - room)
  quantile = values[order[place]]
  return jnp.where(upper[-1] > 0, quantile, jnp.zeros_like(quantile))


def _summed(updates: PyTree, frame: Frame) -> Array:
  n = frame.weights.shape[0]
  total = jnp.zeros([n, n], frame.weights.dtype)
  for leaf in jax.tree.leaves(updates):
    waiting = frame._replace(weights=after(total, frame.weights))
    total = total + of_leaf(leaf, waiting).astype(total.dtype)
  return total


def _real_parts(leaf: Array) -> tuple[Array, ...]:
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    return jnp.real(leaf), jnp.imag(leaf)
  return (leaf,)

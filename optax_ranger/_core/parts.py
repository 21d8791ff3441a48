"""A part of each large leaf, another one at each step: sums over it, and copies.

The cosine of two vectors of millions of entries is known well from a part of them. A
leaf is seen as ``[..., outer, count, inner, ...]`` along one of its axes, and a step
looks at one of the `count` parts. Which one depends on shapes and on the number of the
step only, so all devices and all runs look at the same entries.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optax_ranger._core.platforms import for_one_cpu
from optax_ranger._core.sharding import like
from optax_ranger._core.sharding import reshard
from optax_ranger._core.tree import Dot
from optax_ranger._core.tree import all_finite as tree_all_finite
from optax_ranger._core.tree import inner_product
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree

# Smaller leaves are looked at as a whole.
SMALLEST = 2**16
# Entries of a part that are enough, for a leaf that has more than eight times as many.
_ENOUGH = 2**17
# Contiguous entries: the number wanted, and the least, a cache line.
_RUN = 2**9
_LINE = 2**4
# Entries of a block: it stays in the cache of a core.
_BLOCK = 2**14

Take = Callable[[Array], Array]


class View(NamedTuple):
  """How a leaf is seen: ``[*shape[:axis], outer, count, inner, *shape[axis + 1:]]``."""

  axis: int
  outer: int
  count: int
  inner: int

  def part(self, leaf: Array, phase: Array | int) -> Array:
    """One of the parts, ``[*shape[:axis], outer, inner, *shape[axis + 1:]]``."""
    return jax.lax.dynamic_index_in_dim(
      self._seen(leaf), phase, self.axis + 1, keepdims=False
    )

  def block(self, leaf: Array, phase: Array, start: Array, length: int) -> Array:
    """A piece of one of the parts, `length` entries of its axis `outer`."""
    seen = self._seen(leaf)
    piece = jax.lax.dynamic_slice_in_dim(seen, start, length, self.axis)
    return jax.lax.dynamic_index_in_dim(piece, phase, self.axis + 1, keepdims=False)

  def _seen(self, leaf: Array) -> Array:
    leaf = self._local(leaf)
    before, after = leaf.shape[: self.axis], leaf.shape[self.axis + 1 :]
    return leaf.reshape(*before, self.outer, self.count, self.inner, *after)

  def _local(self, leaf: Array) -> Array:
    """The leaf, gathered along its axis unless devices share all parts alike."""
    sharding = jax.typeof(leaf).sharding
    spec = [*sharding.spec, *[None] * leaf.ndim][: leaf.ndim]
    names = spec[self.axis] or ()
    names = (names,) if isinstance(names, str) else names
    if self.outer % math.prod(sharding.mesh.shape[name] for name in names) == 0:
      return leaf
    spec[self.axis] = None
    return reshard(leaf, PartitionSpec(*spec))


def view(leaf: Array) -> View | None:
  """How a leaf is seen; None if it is looked at as a whole."""
  size = leaf.size
  if size < SMALLEST:
    return None
  most = min(max(size // _ENOUGH, 8), 64)
  for count in (64, 32, 16, 8):
    for axis, length in enumerate(leaf.shape):
      row = math.prod(leaf.shape[axis + 1 :])
      inner = math.gcd(length // count, max(_RUN // row, 1)) if row else 1
      whole = length % (count * inner) == 0
      if count <= most and whole and inner * row >= _LINE:
        return View(axis, length // (count * inner), count, inner)
  return None


def all_finite(tree: PyTree) -> Array:
  """Whether the squares of those leaves are finite that are looked at in parts."""
  leaves = [leaf for leaf in jax.tree.leaves(tree) if view(leaf)]
  return tree_all_finite(leaves, squares=True)


def zeros(leaf: Array) -> Array:
  """Room for the part of a leaf that one step looks at."""
  seen = view(leaf)
  empty = jnp.zeros_like(leaf)
  return empty if seen is None else seen.part(empty, 0)


def kept_shapes(tree: PyTree) -> PyTree:
  """Stand-ins for the leaves, in the shapes of what is kept of them."""

  def one(leaf):
    seen = view(leaf)
    if seen is None:
      return leaf
    before, after = leaf.shape[: seen.axis], leaf.shape[seen.axis + 1 :]
    shape = (*before, seen.outer, seen.inner, *after)
    return jax.ShapeDtypeStruct(shape, leaf.dtype)

  return jax.tree.map(one, tree)


def products(leaf: Array, other: Array, count: Array) -> tuple[Array, ...]:
  """``<leaf, other>``, ``|leaf|^2`` and ``|other|^2`` over the part of a step.

  Args:
    leaf: an array.
    other: another one of its shape, or the part of it that was kept.
    count: the number of the step, ``int32``.

  Returns:
    Three numbers, ``float32``: those of the part, times the number of parts.
  """
  seen = view(leaf)
  if seen is None:
    return _products(leaf, other)
  kept = other.shape != leaf.shape

  def whole(leaf, other, phase):
    part = seen.part(leaf, phase)
    return _products(part, like(other if kept else seen.part(other, phase), part))

  def in_blocks(leaf, other, phase):
    number, length = _blocks(leaf, seen)

    def add(i, sums):
      start = i * length
      a = seen.block(leaf, phase, start, length)
      if kept:
        b = jax.lax.dynamic_slice_in_dim(other, start, length, seen.axis)
      else:
        b = seen.block(other, phase, start, length)
      new = _products(a, b, _vdot)
      return tuple(x + y for x, y in zip(sums, new, strict=True))

    return jax.lax.fori_loop(0, number, add, (jnp.zeros([], jnp.float32),) * 3)

  sums = for_one_cpu(leaf, in_blocks, whole)(leaf, other, count % seen.count)
  return tuple(seen.count * total for total in sums)


def keep(
  compute: Callable[[Take], Array], leaf: Array, old: Array, count: Array, good: Array
) -> tuple[Array, Array]:
  """The part of an array that a step will look at, and its squared norm.

  Args:
    compute: gives what its argument takes of the array.
    leaf: an array of its shape and sharding.
    old: the part that was kept so far, whose type the new one has.
    count: the number of the step that will look at it, ``int32``.
    good: whether it is kept; else `old` stays.

  Returns:
    The part; entries that are not finite are zero in it. Its squared norm times
    the number of parts, ``float32``, in which they count.
  """
  seen = view(leaf)

  def chosen(new, old, dot=None):
    new = new.astype(old.dtype)
    kept = jnp.where(jnp.isfinite(new), new, jnp.zeros_like(new))
    return jnp.where(good, kept, old), inner_product(new, new, dot)

  if seen is None:
    return chosen(like(compute(lambda leaf: leaf), old), old)

  def whole(old, phase):
    return chosen(like(compute(functools.partial(seen.part, phase=phase)), old), old)

  def in_blocks(old, phase):
    number, length = _blocks(leaf, seen)

    def advance(i, carry):
      parts, total = carry
      start = i * length
      new = compute(lambda leaf: seen.block(leaf, phase, start, length))
      old = jax.lax.dynamic_slice_in_dim(parts, start, length, seen.axis)
      new, norm = chosen(new, old, _vdot)
      parts = jax.lax.dynamic_update_slice_in_dim(parts, new, start, seen.axis)
      return parts, total + norm

    return jax.lax.fori_loop(0, number, advance, (old, jnp.zeros([], jnp.float32)))

  part, norm = for_one_cpu(leaf, in_blocks, whole)(old, count % seen.count)
  return part, seen.count * norm


def mean(compute: Callable[[Take], Array], leaf: Array, count: Array) -> Array:
  """The mean over the part of a step.

  Args:
    compute: gives what its argument takes of the array: numbers or booleans.
    leaf: an array of its shape and sharding.
    count: the number of the step, ``int32``.

  Returns:
    A number, ``float32``; of an empty leaf zero.
  """
  seen = view(leaf)
  total = lambda part: part.sum(dtype=jnp.float32)
  if seen is None:
    return total(compute(lambda leaf: leaf)) / max(leaf.size, 1)

  def whole(phase):
    return total(compute(functools.partial(seen.part, phase=phase)))

  def in_blocks(phase):
    number, length = _blocks(leaf, seen)

    def add(i, found):
      take = functools.partial(seen.block, phase=phase, start=i * length, length=length)
      return found + total(compute(take))

    return jax.lax.fori_loop(0, number, add, jnp.zeros([], jnp.float32))

  found = for_one_cpu(leaf, in_blocks, whole)(count % seen.count)
  return found * seen.count / leaf.size


def _products(a: Array, b: Array, dot: Dot | None = None) -> tuple[Array, ...]:
  return tuple(inner_product(*pair, dot) for pair in ((a, b), (a, a), (b, b)))


def _vdot(a: Array, b: Array) -> Array:
  return jnp.vdot(a.ravel(), b.ravel())


def _blocks(leaf: Array, seen: View) -> tuple[int, int]:
  """How many blocks there are, and how much of the axis `outer` each has."""
  most = max(_BLOCK * seen.outer * seen.count // leaf.size, 1)
  length = max(n for n in range(1, seen.outer + 1) if n <= most and seen.outer % n == 0)
  return seen.outer // length, length

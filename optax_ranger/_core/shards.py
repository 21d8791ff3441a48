"""The rows of a batch that is split over devices: gather, slice, sum."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core.sharding import vary
from optax_ranger._core.sharding import varying_axes
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree

# Extra args that hold one row an example, without being declared.
ROWS = (
  "beliefs",
  "example_ids",
  "features",
  "labels",
  "member_weights",
  "neighbors",
  "regions",
  "smoothed",
)
AxisName = str | tuple[str, ...] | None


class Shards:
  """What a device knows of the batch: n rows of its own, and an axis of devices.

  Without an axis the whole batch is here, and nothing is sent.
  """

  def __init__(self, axis_name: AxisName, n: int):
    self.axis_name = axis_name
    self.n = n
    self.total = n if axis_name is None else n * jax.lax.axis_size(axis_name)

  def marked(self, tree: PyTree) -> PyTree:
    """Keeps what is computed from `tree` apart on each device."""
    if not is_typed(self.axis_name):
      return tree
    return jax.tree.map(lambda leaf: vary(leaf, self.axis_name), tree)

  def gather(self, tree: PyTree) -> PyTree:
    """The rows of all devices, in their order; the same everywhere."""
    if self.axis_name is None:
      return tree
    return gather_rows(tree, self.axis_name)

  def own(self, rows: Array) -> Array:
    """This device's part of the rows of all devices."""
    if self.axis_name is None:
      return rows
    first = jax.lax.axis_index(self.axis_name) * self.n
    return jax.lax.dynamic_slice_in_dim(rows, first, self.n)

  def sum(self, tree: PyTree) -> PyTree:
    """Adds up over devices, in one collective."""
    if self.axis_name is None:
      return tree
    return jax.lax.psum(self.marked(tree), self.axis_name)

  def is_apart(self, tree: PyTree) -> bool:
    """Whether a tree is known to differ from device to device."""
    return any(
      not varying_axes(leaf).isdisjoint(names_of(self.axis_name))
      for leaf in jax.tree.leaves(tree)
      if isinstance(leaf, jax.Array)
    )


def names_of(axis_name: AxisName) -> tuple[str, ...]:
  """The names of an axis, of several, or of none."""
  if axis_name is None:
    return ()
  return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def vary_as(tree: PyTree, like: PyTree) -> PyTree:
  """Marks each leaf as varying over the axes of its counterpart, as a scan needs."""
  mark = lambda leaf, other: vary(leaf, varying_axes(other))
  return jax.tree.map(mark, tree, like)


def axes_among(*trees: PyTree) -> frozenset[Any]:
  """The mesh axes over which one of the arrays of some trees differs."""
  leaves = [leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array)]
  return frozenset().union(*map(varying_axes, leaves))


def is_typed(axis_name: AxisName) -> bool:
  """Whether types tell what differs over the axis: ``shard_map(check_vma=True)``."""
  if axis_name is None:
    return False
  return varying_axes(jax.lax.axis_index(axis_name)) >= set(names_of(axis_name))


def gather_rows(tree: PyTree, axis_name: AxisName) -> PyTree:
  """Puts the rows of all devices after each other, the same on all of them.

  In one collective: what has four bytes a number, or is a flag, travels as bits.
  """
  typed = is_typed(axis_name)

  def gather(leaf):
    leaf = vary(leaf, axis_name) if typed else leaf
    return jax.lax.all_gather(
      leaf, axis_name, tiled=True, to="invarying" if typed else "varying"
    )

  leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
  packed = [leaf for leaf in leaves if _fits(leaf)]
  if len(packed) < 2:
    return structure.unflatten(map(gather, leaves))
  bits = [_as_bits(leaf).reshape(leaf.shape[0], -1) for leaf in packed]
  rows = gather(jnp.concatenate(bits, axis=1))
  ends = np.cumsum([part.shape[1] for part in bits])[:-1]
  parts = iter(jnp.split(rows, ends, axis=1))
  return structure.unflatten(
    _from_bits(next(parts), leaf) if _fits(leaf) else gather(leaf) for leaf in leaves
  )


def _fits(leaf: Array) -> bool:
  return leaf.dtype == bool or (leaf.dtype.itemsize == 4 and leaf.dtype.kind in "fiu")


def _as_bits(leaf: Array) -> Array:
  if leaf.dtype == bool:
    return leaf.astype(jnp.uint32)
  return jax.lax.bitcast_convert_type(leaf, jnp.uint32)


def _from_bits(bits: Array, like: Array) -> Array:
  bits = bits.reshape(-1, *like.shape[1:])
  if like.dtype == bool:
    return bits.astype(bool)
  return jax.lax.bitcast_convert_type(bits, like.dtype)


def axes_of(*arrays: Any) -> tuple[str, ...]:
  """The mesh axes over which one of some arrays differs, in the mesh's order."""
  found = frozenset().union(*map(varying_axes, arrays))
  names = jax.sharding.get_abstract_mesh().axis_names if found else ()
  return tuple(name for name in names if name in found)

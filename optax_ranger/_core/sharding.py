"""Arrays on a mesh: how they are split, and over which axes they vary."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree


def per_row(vector: Array, leaf: Array) -> Array:
  """Gives a vector [n] the rank of a leaf [n, ...], to broadcast against it.

  Or an array of more axes that the leaf starts with, such as [n, T].
  """
  split, axes = first_sharded(leaf, vector), jnp.ndim(vector)
  if is_sharded(split):
    rows = PartitionSpec(*jax.typeof(leaf).sharding.spec[:axes])
    vector = reshard(vector, rows, jax.typeof(split).sharding.mesh)
  return jnp.expand_dims(vector, tuple(range(axes, jnp.ndim(leaf))))


def take_rows(rows: Array, places: Array) -> Array:
  """The rows of an array [n, ...] at some places, split as the array is."""
  if is_sharded(rows):
    return rows.at[places].get(out_sharding=jax.typeof(rows).sharding)
  return rows[places]


def is_sharded(array: Array) -> bool:
  """Whether an array is split over axes of a mesh that are explicit."""
  return any(axis is not None for axis in jax.typeof(array).sharding.spec)


def first_sharded(first: Array, *others: Array | None) -> Array:
  """The first array that is split over explicit axes; else the first."""
  arrays = (first, *(array for array in others if array is not None))
  return next(filter(is_sharded, arrays), first)


def replicate(array: Array) -> Array:
  """Gathers a small array that is split over explicit axes; others stay."""
  if is_sharded(array):
    return reshard(array, PartitionSpec())
  return array


def reshard(array: Array, spec: PartitionSpec, mesh: Any = None) -> Array:
  """Splits an array anew, over its own mesh, whatever mesh is set."""
  mesh = jax.typeof(array).sharding.mesh if mesh is None else mesh
  return jax.sharding.reshard(array, NamedSharding(mesh, spec))


def like(array: Array, other: Array) -> Array:
  """Splits an array as `other` is split over an explicit mesh; free where it is."""
  here, there = jax.typeof(array).sharding, jax.typeof(other).sharding
  if here == there or AxisType.Explicit not in there.mesh.axis_types:
    return array
  if isinstance(array, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
    return jax.sharding.reshard(array, there)
  return jax.device_put(array, other.sharding)


def like_tree(tree: PyTree, other: PyTree) -> PyTree:
  """Splits every array of a tree as its fellow in `other` is split."""
  return jax.tree.map(like, tree, other)


def place(array: Array, sharding: jax.sharding.Sharding) -> Array:
  """Puts an array where it shall live, under jit as well."""
  if not isinstance(sharding, NamedSharding):
    return jax.lax.with_sharding_constraint(array, sharding)
  if AxisType.Explicit in sharding.mesh.axis_types:
    inside = jax.sharding.get_abstract_mesh()
    if inside.empty or AxisType.Explicit in inside.axis_types:
      return jax.device_put(array, sharding)
    sharding = NamedSharding(inside, sharding.spec)
  return jax.lax.with_sharding_constraint(array, sharding)


def automatic(
  function: Callable[..., Any], on: Array, rows_like: Array
) -> Callable[..., Any]:
  """Leaves shardings inside to the compiler, if `on` lies on an explicit mesh.

  The result is split by rows as `rows_like` is. Sorting and scattering have no
  rule for axes that are explicit.
  """
  mesh = jax.typeof(on).sharding.mesh
  if AxisType.Explicit not in mesh.axis_types:
    return function
  spec = PartitionSpec(*jax.typeof(rows_like).sharding.spec[:1])
  return jax.sharding.auto_axes(function, out_sharding=NamedSharding(mesh, spec))


def varying_axes(array: Any) -> frozenset[Any]:
  """The axes of a mesh over which an array differs from device to device."""
  if not isinstance(array, jax.ShapeDtypeStruct):
    array = jax.typeof(array)
  kind = getattr(array, "manual_axis_type", None)
  return frozenset() if kind is None else frozenset(kind.varying)


def vary(array: Array, axes: Any) -> Array:
  """Marks an array as differing over axes of a mesh, those it lacks so far."""
  names = {axes} if isinstance(axes, str) else set(axes)
  missing = tuple(sorted(names - varying_axes(array)))
  return jax.lax.pcast(array, missing, to="varying") if missing else array


def after(previous: Array | None, value: Array) -> Array:
  """`value`, but computed after `previous`, which is finite or None.

  XLA runs what is independent in any order, and would hold the temporaries of
  all leaves at once; optimization barriers are gone when it chooses the order.
  """
  if previous is None or not previous.size:
    return value
  entry = previous.max() if is_sharded(previous) else previous[(0,) * previous.ndim]
  return jnp.where(jnp.isnan(entry), jnp.zeros_like(value), value)

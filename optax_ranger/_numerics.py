"""Scalars and data types that stay what they are, whatever comes in."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from optax_ranger import _types


def widest(*dtypes: Any) -> np.dtype:
  """The type that holds them all, also where strict promotion refuses to choose."""
  return functools.reduce(np.promote_types, map(np.dtype, dtypes))


def wide(dtype: Any) -> np.dtype:
  """The type to compute in: float32 for half precision, else `dtype` itself."""
  return widest(dtype, np.float32)


def real(dtype: Any) -> np.dtype:
  """The real type of the same precision as `dtype`."""
  return np.dtype(jnp.finfo(dtype).dtype)


def scalar(value: Any, dtype: Any = jnp.float32) -> _types.Array:
  """A strongly typed scalar array; made in `init` and `update`, never earlier."""
  return jnp.asarray(value).astype(dtype)


def zero_count() -> _types.Array:
  """A counter at its start."""
  return jnp.zeros([], jnp.int32)


def increment(count: _types.Array, by: Any = 1) -> _types.Array:
  """Counts up, and stops at the largest int32 instead of turning negative."""
  top = jnp.iinfo(jnp.int32).max
  step = jnp.asarray(by).astype(jnp.int32)
  return jnp.where(count > top - step, jnp.asarray(top, jnp.int32), count + step)


def divide(numerator: _types.Array, denominator: _types.Array) -> _types.Array:
  """Divides by a scalar or an array of the same rank; by zero gives zero.

  The denominator is real and not negative; the numerator may be complex.
  """
  positive = denominator > 0
  safe = jnp.where(positive, denominator, jnp.ones_like(denominator))
  quotient = numerator / safe.astype(numerator.dtype)
  return jnp.where(positive, quotient, jnp.zeros_like(numerator))


def to_peak(rows: _types.Array, axis: int = 1) -> _types.Array:
  """Scales rows [n, C], not negative, to a peak of exactly one; zeros stay.

  With `axis=0`, the columns.
  """
  peak = rows.max(axis=axis, keepdims=True, initial=0)
  highest = jnp.logical_and(rows == peak, peak > 0)
  # XLA multiplies by the reciprocal: of 3e38 it would be flushed to zero.
  rows, peak = (jnp.where(peak > 1, each / 4, each) for each in (rows, peak))
  rows = jnp.minimum(divide(rows, peak), jnp.ones_like(rows))
  return jnp.where(highest, jnp.ones_like(rows), rows)


def step_towards(
  old: _types.Array, new: _types.Array, rate: _types.Array
) -> _types.Array:
  """Goes a part of the way from `old` to `new`, in the type of `old`."""
  return old + rate.astype(old.dtype) * (new.astype(old.dtype) - old)


def per_row(vector: _types.Array, leaf: _types.Array) -> _types.Array:
  """Gives a vector [n] the rank of a leaf [n, ...], to broadcast against it."""
  split = first_sharded(leaf, vector)
  if is_sharded(split):
    rows = PartitionSpec(*jax.typeof(leaf).sharding.spec[:1])
    vector = reshard(vector, rows, jax.typeof(split).sharding.mesh)
  return jnp.expand_dims(vector, tuple(range(1, jnp.ndim(leaf))))


def take_rows(rows: _types.Array, places: _types.Array) -> _types.Array:
  """The rows of an array [n, ...] at some places, split as the array is."""
  if is_sharded(rows):
    return rows.at[places].get(out_sharding=jax.typeof(rows).sharding)
  return rows[places]


def is_sharded(array: _types.Array) -> bool:
  """Whether an array is split over axes of a mesh that are explicit."""
  return any(axis is not None for axis in jax.typeof(array).sharding.spec)


def first_sharded(first: _types.Array, *others: _types.Array | None) -> _types.Array:
  """The first array that is split over explicit axes; else the first."""
  arrays = (first, *(array for array in others if array is not None))
  return next(filter(is_sharded, arrays), first)


def replicate(array: _types.Array) -> _types.Array:
  """Gathers a small array that is split over explicit axes; others stay."""
  if is_sharded(array):
    return reshard(array, PartitionSpec())
  return array


def reshard(array: _types.Array, spec: PartitionSpec, mesh: Any = None) -> _types.Array:
  """Splits an array anew, over its own mesh, whatever mesh is set."""
  mesh = jax.typeof(array).sharding.mesh if mesh is None else mesh
  return jax.sharding.reshard(array, NamedSharding(mesh, spec))


def place(array: _types.Array, sharding: jax.sharding.Sharding) -> _types.Array:
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
  function: Callable[..., Any], on: _types.Array, rows_like: _types.Array
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


def vary(array: _types.Array, axes: Any) -> _types.Array:
  """Marks an array as differing over axes of a mesh, those it lacks so far."""
  names = {axes} if isinstance(axes, str) else set(axes)
  missing = tuple(sorted(names - varying_axes(array)))
  return jax.lax.pcast(array, missing, to="varying") if missing else array


def after(previous: _types.Array | None, value: _types.Array) -> _types.Array:
  """`value`, but computed after `previous`, which is finite or None.

  XLA runs what is independent in any order, and would hold the temporaries of
  all leaves at once; optimization barriers are gone when it chooses the order.
  """
  if previous is None or not previous.size:
    return value
  entry = previous.max() if is_sharded(previous) else previous[(0,) * previous.ndim]
  return jnp.where(jnp.isnan(entry), jnp.zeros_like(value), value)

"""Labels and ids as people have them, read into int32; -1 means "no label".

Columns are lists, arrays of NumPy or JAX, and whatever turns into one of them,
such as the columns of pandas, Polars and Arrow. They are read on the host, before
JAX narrows 64-bit integers. Traced arrays are narrowed here, and never wrap.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import validate
from optax_ranger._core.types import Array

# A column of labels: an array, a list, or a column of pandas, Polars or Arrow.
Column = Any

_LEAST, _MOST = np.iinfo(np.int32).min, np.iinfo(np.int32).max
# Stands for an id that does not fit. It is no row of any table, and not -1.
_NOWHERE = -2


class Labels(NamedTuple):
  """Labels as integers.

  Attributes:
    ids: ``int32``, the class of each example, -1 where it has no label; of
      JAX where the labels are, else of NumPy.
    classes: the names of classes 0, 1, ... in order, None where labels are
      integers already.
  """

  ids: Any
  classes: np.ndarray | None


def read(
  name: str,
  labels: Column,
  n: int | tuple[int, ...],
  *,
  num_classes: int | None = None,
  compared: bool = False,
) -> Labels:
  """Reads labels of n examples, or of another shape.

  Integers stay as they are. Missing values (None, NaN, pandas' NA, Arrow's null,
  masked entries) become -1. Other values are names: their ids count the sorted
  names from 0. A traced label that does not fit int32, or is below -1, becomes -1.

  Args:
    name: of the argument, for errors.
    labels: ``[n]``, or of the shape given.
    n: how many there must be, or in which shape.
    num_classes: refuses a class that is not less, where values are known.
    compared: whether labels are only compared with each other. Then integers
      that do not fit int32, such as hashes, are names; else they are refused.

  Raises:
    ValueError: for another shape, integers below -1, or that do not fit.
    TypeError: for values that are neither integers nor names.
  """
  shape = n if isinstance(n, tuple) else (n,)
  if isinstance(labels, jax.Array):
    validate.shape(name, labels, shape)
    if not jnp.issubdtype(labels.dtype, jnp.bool_):
      validate.integers(name, labels)
    if validate.is_known(labels) and labels.is_fully_addressable:
      _check(name, np.asarray(labels), num_classes)
    return Labels(_narrowed(labels, -1, -1), None)
  column = _column(labels)
  validate.shape(name, column, shape)
  values, missing = _present(name, column.reshape(-1))
  classes = None
  names = values.dtype.kind in "US"
  if names or (compared and _too_wide(values).any()):
    named = np.ones(len(values), bool) if names else values != -1
    classes, inverse = np.unique(values[named], return_inverse=True)
    values = np.full([len(values)], -1)
    values[named] = inverse
  _check(name, values, num_classes)
  ids = np.full(missing.shape, -1, np.int32)
  ids[~missing] = values
  return Labels(ids.reshape(shape), classes)


def read_ids(name: str, ids: Column) -> Array:
  """Reads positions of examples, ``int32 [n]``; one that does not fit is -2.

  So it lies outside of every table, where int32 alone would wrap it onto a row.
  Missing values become -1, "no example".

  Raises:
    ValueError: for another shape than ``[n]``.
    TypeError: for values that are not integers.
  """
  column = ids if isinstance(ids, jax.Array) else _column(ids)
  if column.ndim != 1:
    raise ValueError(f"{name} must have shape [n], got {list(column.shape)}.")
  if isinstance(column, jax.Array) or column.dtype.kind in "iu":
    return fit(name, column)
  values, missing = _present(name, column)
  if values.dtype.kind in "US":
    raise TypeError(f"{name} must hold integers, got {values[0]!r} and others.")
  narrow = np.full(column.shape, -1, np.int32)
  narrow[~missing] = _narrowed(values, _LEAST, _NOWHERE)
  return jnp.asarray(narrow)


def fit(name: str, positions: Any) -> Array:
  """An array of positions as int32; -2, which is none, where one does not fit.

  Raises:
    TypeError: for values that are not integers.
  """
  if not isinstance(positions, jax.Array):
    positions = np.asarray(positions)
  validate.integers(name, positions)
  return jnp.asarray(_narrowed(positions, _LEAST, _NOWHERE))


def _narrowed(values: Any, least: int, otherwise: int) -> Any:
  """As int32, and `otherwise` for what lies below `least` or does not fit."""
  where = jnp.where if isinstance(values, jax.Array) else np.where
  if values.dtype == bool or (values.dtype.kind == "u" and values.dtype.itemsize < 4):
    return values.astype(np.int32)
  # Values of another type than int32 are compared in their own: they would wrap.
  lowest, highest = _bounds(values.dtype)
  fits = (values >= max(least, lowest)) & (values <= highest)
  narrow = where(fits, values, 0).astype(np.int32)
  return where(fits, narrow, np.int32(otherwise))


def _too_wide(values: np.ndarray) -> np.ndarray:
  """Which integers do not fit int32."""
  lowest, highest = _bounds(values.dtype)
  return (values < lowest) | (values > highest)


def _bounds(dtype: np.dtype) -> tuple[int, int]:
  """Those of int32, as far as the type reaches."""
  if dtype.kind == "O":  # Python's integers, as they don't fit 64 bits.
    return _LEAST, _MOST
  return max(_LEAST, np.iinfo(dtype).min), min(_MOST, np.iinfo(dtype).max)


def _check(name: str, values: np.ndarray, num_classes: int | None) -> None:
  """Refuses classes that there are not."""
  if values.dtype == bool:
    values = values.astype(np.int32)
  if (wide := values[_too_wide(values)]).size:
    raise ValueError(
      f"{name} must fit 32 bits, got {wide[0]}: pass no hashes. Number the classes,"
      f" for example with np.unique({name}, return_inverse=True)[1]."
    )
  if values.size and values.min() < -1:
    raise ValueError(
      f"{name} must be at least -1, which stands for no label, got {values.min()}."
    )
  if num_classes is not None and values.size and values.max() >= num_classes:
    raise ValueError(
      f"{name} must lie in [0, {num_classes}), got {values.max()}: raise num_classes,"
      " or number the classes without gaps. An example without a label has -1."
    )


def _column(values: Column) -> np.ndarray:
  """A column on the host, as a NumPy array."""
  if hasattr(values, "to_pylist"):  # Arrow: its nulls become None.
    values = values.to_pylist()
  if isinstance(values, np.ma.MaskedArray):
    masked = np.ma.getmaskarray(values)
    values = np.asarray(values.data).astype(object)
    values[masked] = None
  if isinstance(values, (list, tuple)):
    # As objects: NumPy would turn a missing value among strings into "nan".
    return np.array(values, object)
  return np.asarray(values)


def _present(name: str, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The values that are not missing, integers or names, and which are missing."""
  missing = np.zeros(column.shape, bool)
  values = column
  if column.dtype.kind in "OT":
    missing = np.array([_is_missing(value) for value in column], bool)
    values = _of_objects(name, column[~missing].tolist())
  if values.dtype.kind == "f":
    number = ~np.isnan(values)
    missing[~missing] = ~number
    dtype, values = values.dtype, values[number].astype(np.float64)
    # Missing values turn a column of integers into one of floats.
    odd = values[~np.isfinite(values) | (values != np.floor(values))]
    if odd.size:
      raise TypeError(
        f"{name} must hold integers, got {dtype} with the value {odd[0]}."
      )
    values = _of_objects(name, [int(value) for value in values])
  if values.dtype.kind == "b":
    values = values.astype(np.int32)
  is_wide = values.dtype.kind == "O" and isinstance(values[0], int)
  if values.dtype.kind not in "iuUS" and not is_wide:
    raise TypeError(
      f"{name} must hold integers, got {column.dtype}; strings are allowed, and"
      " None or NaN for missing values."
    )
  return values, missing


def _of_objects(name: str, values: list[Any]) -> np.ndarray:
  """Objects as an array of integers, floats, or strings."""
  if not values:
    return np.zeros([0], np.int64)
  if all(isinstance(value, (int, np.integer)) for value in values):
    values = [int(value) for value in values]
    # NumPy would turn integers beyond 63 bits into floats.
    wide = max(values) > np.iinfo(np.int64).max or min(values) < np.iinfo(np.int64).min
    return np.array(values, object if wide else np.int64)
  array = np.array(values)
  strings = {isinstance(value, (str, bytes)) for value in values}
  if len(strings) > 1 or array.ndim != 1:
    kinds = sorted({type(value).__name__ for value in values})
    raise TypeError(f"{name} must hold integers or strings, not both, got {kinds}.")
  return array


def _is_missing(value: Any) -> bool:
  """None, NaN, NaT, or pandas' NA, which is neither equal to itself nor not."""
  if value is None:
    return True
  try:
    return bool(value != value)
  except (TypeError, ValueError):
    return type(value).__name__ == "NAType"

"""Rows over the classes: distributions, labels as distributions, means over tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import labels as _labels
from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.sharding import per_row
from optax_ranger._core.types import Array

# Votes that were rounded to percents or to bfloat16 do not sum to one exactly.
_TOLERANCE = 0.05


def distributions(name: str, rows: Any) -> Array:
  """Rows [n, C] of any scale as probabilities, in float32 or better.

  One that is blank, negative or not finite is no distribution: zeros.
  """
  rows = jnp.asarray(rows)
  if rows.ndim != 2 or not rows.shape[1]:
    raise ValueError(
      f"{name} must have shape [n, C], C at least 1, got {list(rows.shape)}."
    )
  if jnp.issubdtype(rows.dtype, jnp.inexact):
    return normalized(rows.astype(numerics.wide(rows.dtype)))
  return normalized(rows.astype(jnp.float32))


def normalized(rows: Array) -> Array:
  """Rows [..., C] scaled to sum to one; zeros where there is nothing to scale."""
  usable = jnp.logical_and(jnp.isfinite(rows), rows >= 0).all(axis=-1, keepdims=True)
  rows = jnp.where(usable, rows, jnp.zeros_like(rows))
  rows = numerics.to_peak(rows, axis=-1)  # The sum stays in range then.
  return numerics.divide(rows, rows.sum(axis=-1, keepdims=True))


def is_soft(labels: Any, rank: int) -> bool:
  """Whether labels are rows over the classes; `rank` is that of the classes alone.

  An array with one column holds classes, in the wrong shape.
  """
  shape = _shape(labels)
  return len(shape) == rank + 1 and shape[-1] > 1


def soft(labels: Any) -> Array:
  """Reads soft labels: rows that are distributions, or zeros for no label.

  Raises:
    ValueError: for rows that sum to something else, where values are known.
    TypeError: for values that are not real numbers.
  """
  rows = labels if isinstance(labels, jax.Array) else np.asarray(labels)
  real = (jnp.floating, jnp.integer, jnp.bool_)
  if not any(jnp.issubdtype(rows.dtype, kind) for kind in real):
    raise TypeError(f"soft labels must hold real numbers, got {rows.dtype}.")
  if validate.is_known(rows) and getattr(rows, "is_fully_addressable", True):
    _check(np.asarray(rows))
  rows = jnp.asarray(rows)
  if jnp.issubdtype(rows.dtype, jnp.floating):
    return normalized(rows.astype(numerics.wide(rows.dtype)))
  return normalized(rows.astype(jnp.float32))


def read(labels: Any, n: int, num_classes: int) -> Array:
  """Labels of n examples, ``int32 [n]``, or soft ones, ``float [n, C]``."""
  if not is_soft(labels, 1):
    return jnp.asarray(_labels.read("labels", labels, n, num_classes=num_classes).ids)
  validate.shape("labels", jnp.asarray(labels), (n, num_classes))
  return soft(labels).astype(jnp.float32)


def label_rows(labels: Any, like: Array) -> Array:
  """Labels as rows like those of `like`, [n, ..., C]; zeros where there is none."""
  if not is_soft(labels, like.ndim - 1):
    ids = _labels.read("labels", labels, like.shape[:-1]).ids
    ids = per_row(jnp.asarray(ids), like)[..., 0]
    return jax.nn.one_hot(ids, like.shape[-1], dtype=like.dtype)
  if _shape(labels) != like.shape:
    raise ValueError(
      f"labels must have shape {list(like.shape[:-1])}, or {list(like.shape)} if they"
      f" are soft, got {list(_shape(labels))}."
    )
  return per_row(soft(labels).astype(like.dtype), like)


def chances(label: Array, confusion: Array) -> Array:
  """The chance of each example's label, given each class: columns of a confusion."""
  return jnp.matmul(label, confusion.T, precision="highest")


def read_mask(mask: Any, there: Array) -> Array:
  """The places [n, ...] that are there and not masked; all that are, for None."""
  if mask is None:
    return there
  mask = jnp.asarray(mask)
  validate.shape("mask", mask, there.shape)
  kinds = (jnp.bool_, jnp.integer)
  if not any(jnp.issubdtype(mask.dtype, kind) for kind in kinds):
    raise TypeError(
      f"mask must hold booleans or integers, got {mask.dtype}: it selects and does not"
      " weigh; write mask > 0."
    )
  return jnp.logical_and(there, per_row(mask.astype(bool), there))


def mean_over_places(losses: Array, there: Array) -> Array:
  """The mean of losses [n, ...] over each example's places; zero without one."""
  axes = tuple(range(1, losses.ndim))
  count = there.sum(axis=axes, keepdims=True, dtype=jnp.int32)
  count = jnp.maximum(count, 1).astype(losses.dtype)
  losses = jnp.where(there, losses / count, jnp.zeros_like(losses))
  return losses.sum(axis=axes)


def _shape(labels: Any) -> tuple[int, ...]:
  """The shape of an array or of lists in lists, as far as it can be seen."""
  sizes: tuple[int, ...] = ()
  while isinstance(labels, (list, tuple)) and len(labels):
    sizes, labels = (*sizes, len(labels)), labels[0]
  return (*sizes, *getattr(labels, "shape", ()))


def _check(rows: np.ndarray) -> None:
  """Refuses rows that are neither a distribution nor blank."""
  rows = rows.astype(np.float64)
  usable = (np.isfinite(rows) & (rows >= 0)).all(axis=-1)
  sums = np.where(usable, np.where(np.isfinite(rows), rows, 0).sum(axis=-1), 0)
  wrong = sums[(sums > 0) & (np.abs(sums - 1) > _TOLERANCE)]
  if wrong.size:
    raise ValueError(
      f"soft labels must be rows that sum to 1, got one that sums to {wrong[0]:g}:"
      " divide votes by their number; several labels at once (multi-label) are not"
      " supported."
    )

"""The gradient of weighted losses, in micro-batches, with the memory of one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_ranger._core import numerics
from optax_ranger._core.sharding import vary
from optax_ranger._core.sharding import varying_axes
from optax_ranger._core.shards import ROWS
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree


def values(
  losses_and_aux: Callable[..., Any],
  batch: PyTree,
  seen: dict[str, Any],
  num_micro_batches: int,
) -> tuple[Array, Any]:
  """Losses and aux of the whole batch, forward only."""
  split, shared = _split(batch, seen, num_micro_batches)

  def visit(piece):
    part, rows = piece
    return losses_and_aux(part, {**shared, **rows})

  losses, aux = jax.lax.map(visit, split)
  size = losses.shape[1]
  return _rejoin(losses), jax.tree.map(lambda leaf: _joined(leaf, size), aux)


def gradient(
  losses_and_aux: Callable[..., Any],
  params: PyTree,
  batch: PyTree,
  seen: dict[str, Any],
  weights: Array,
  num_micro_batches: int,
) -> tuple[Array, Any, PyTree]:
  """Losses, aux and the gradient of ``(weights * losses).sum()``.

  An example whose loss is not finite has weight zero; that keeps its gradient
  out where it is finite.
  """
  split, shared = _split(batch, seen, num_micro_batches)
  weights = _cut(weights, num_micro_batches)

  def add(total, piece):
    (part, rows), weights = piece
    losses, pull_back, aux = jax.vjp(
      lambda params: losses_and_aux(params, part, {**shared, **rows}),
      params,
      has_aux=True,
    )
    if losses.shape != weights.shape:
      raise ValueError(
        "the value of per_example_losses must have shape"
        f" {list(weights.shape)}, got {list(losses.shape)}."
      )
    kept = jnp.where(jnp.isfinite(losses), weights.astype(losses.dtype), 0)
    (grads,) = pull_back(kept)
    total = jax.tree.map(lambda sum_, g: sum_ + g.astype(sum_.dtype), total, grads)
    return total, (losses, aux)

  first = jax.tree.map(lambda leaf: leaf[0], (split, weights))
  start = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, numerics.wide(leaf.dtype)), params
  )
  types, _ = jax.eval_shape(add, start, first)
  start = jax.tree.map(lambda leaf, like: vary(leaf, varying_axes(like)), start, types)
  total, (losses, aux) = jax.lax.scan(add, start, (split, weights))
  grads = jax.tree.map(lambda sum_, leaf: sum_.astype(leaf.dtype), total, params)
  size = losses.shape[1]
  return _rejoin(losses), jax.tree.map(lambda leaf: _joined(leaf, size), aux), grads


def _split(
  batch: PyTree, seen: dict[str, Any], num_micro_batches: int
) -> tuple[Any, dict[str, Any]]:
  """Parts batch and rows among the extra args into micro-batches."""
  rows = {name: arg for name, arg in seen.items() if name in ROWS}
  shared = {name: arg for name, arg in seen.items() if name not in rows}
  cut = lambda leaf: _cut(leaf, num_micro_batches)
  return jax.tree.map(cut, (batch, rows)), shared


def _cut(leaf: Array, num_micro_batches: int) -> Array:
  """[n, ...] to [m, n / m, ...]; every m-th row, so that rows stay where they are."""
  n = leaf.shape[0]
  if n % num_micro_batches:
    raise ValueError(
      f"num_micro_batches must divide the {n} rows of a device, got"
      f" {num_micro_batches}; train_step pads what it is given."
    )
  cut = leaf.reshape(n // num_micro_batches, num_micro_batches, *leaf.shape[1:])
  return jnp.swapaxes(cut, 0, 1)


def _rejoin(leaf: Array) -> Array:
  """[m, n / m, ...] to [n, ...], in the order that `_cut` was given."""
  return jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])


def _joined(leaf: Array, size: int) -> Array:
  """Rows in their order; anything else as its mean over the micro-batches."""
  if leaf.shape[1:2] == (size,):
    return _rejoin(leaf)
  return leaf.mean(axis=0)

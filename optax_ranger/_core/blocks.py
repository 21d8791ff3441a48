"""Functions of many rows, block by block, for the memory's sake."""

from collections.abc import Callable
from collections.abc import Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optax_ranger._core import progress
from optax_ranger._core.sharding import vary
from optax_ranger._core.sharding import varying_axes
from optax_ranger._core.types import PyTree

# Blocks that a call computes where there is a bar.
_AT_ONCE = 16


def map_blocks(
  function: Callable[[Any, Any], Any],
  shared: PyTree,
  rows: PyTree,
  size: int,
  what: str = "",
) -> PyTree:
  """Applies `function(shared, block)` to blocks of rows, and joins the results.

  Args:
    function: from blocks of rows to as many rows; compiled once where it is always
      the same object.
    shared: what all blocks see.
    rows: arrays ``[n, ...]``, at least one row. A row may be computed twice.
    size: rows of a block.
    what: says what is done on a bar, outside of ``jax.jit``; no bar if empty.
  """
  if not what:
    return _mapped(function, size, shared, rows)
  parts = [
    jax.block_until_ready(_mapped(function, size, shared, part))
    for part in _parts(rows, size, what)
  ]
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def fold_blocks(
  function: Callable[[Any, Any, Any], Any],
  shared: PyTree,
  start: PyTree,
  rows: PyTree,
  size: int,
  what: str = "",
) -> PyTree:
  """Folds `function(shared, carry, block)` over blocks of rows; see `map_blocks`.

  The last block is filled with zeros.
  """
  if not what:
    return _folded(function, size, shared, start, rows)
  for part in _parts(rows, size, what):
    start = jax.block_until_ready(_folded(function, size, shared, start, part))
  return start


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _mapped(function: Any, size: int, shared: Any, rows: Any) -> Any:
  n, count, size = _sizes(rows, size)
  compute = jax.jit(functools.partial(function, shared), inline=True)
  if count == 1:
    return compute(rows)

  def take(start):
    cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size)
    return jax.tree.map(cut, rows)

  def empty(like):
    array = jnp.zeros((n, *like.shape[1:]), like.dtype)
    return vary(array, varying_axes(like))

  def one(place, whole):
    # The last block ends with the last row: filling it up would copy all rows.
    start = jnp.minimum(place * size, n - size)
    put = lambda to, part: jax.lax.dynamic_update_slice_in_dim(to, part, start, 0)
    return jax.tree.map(put, whole, compute(take(start)))

  start = jax.tree.map(empty, jax.eval_shape(compute, take(0)))
  return jax.lax.fori_loop(0, count, one, start)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _folded(function: Any, size: int, shared: Any, start: Any, rows: Any) -> Any:
  blocks = _cut(rows, size)
  one = lambda carry, block: (function(shared, carry, block), None)
  return jax.lax.scan(one, start, blocks)[0]


def _sizes(rows: PyTree, size: int) -> tuple[int, int, int]:
  """How many rows there are, how many blocks, and rows of a block: nearly even."""
  n = jax.tree.leaves(rows)[0].shape[0]
  count = -(-n // size)
  return n, count, -(-n // count)


def _cut(rows: PyTree, size: int) -> PyTree:
  # A block that is filled up copies all rows.
  n, _, size = _sizes(rows, size)

  def cut(leaf):
    leaf = jnp.pad(leaf, ((0, -n % size), *((0, 0),) * (leaf.ndim - 1)))
    return leaf.reshape(-1, size, *leaf.shape[1:])

  return jax.tree.map(cut, rows)


def _parts(rows: PyTree, size: int, what: str) -> Iterator[PyTree]:
  """Parts of the rows behind a bar, one copy at a time."""
  n = jax.tree.leaves(rows)[0].shape[0]
  step = _AT_ONCE * size
  for start in progress.bar(range(0, n, step), what, True):
    yield jax.tree.map(lambda leaf, start=start: leaf[start : start + step], rows)

"""Functions of many rows, block by block, for the memory's sake."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optax_ranger._core import progress
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
    rows: arrays ``[n, ...]``, at least one row. The last block is filled with zeros.
    size: rows of a block.
    what: says what is done on a bar, outside of ``jax.jit``; no bar if empty.
  """
  if not what:
    return _mapped(function, size, shared, rows)
  parts = [
    jax.block_until_ready(_mapped(function, size, shared, part))
    for part in progress.bar(_parts(rows, size), what, True)
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
  """Folds `function(shared, carry, block)` over blocks of rows; see `map_blocks`."""
  if not what:
    return _folded(function, size, shared, start, rows)
  for part in progress.bar(_parts(rows, size), what, True):
    start = jax.block_until_ready(_folded(function, size, shared, start, part))
  return start


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _mapped(function: Any, size: int, shared: Any, rows: Any) -> Any:
  blocks, n = _cut(rows, size)
  found = jax.lax.map(functools.partial(function, shared), blocks)
  return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:n], found)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _folded(function: Any, size: int, shared: Any, start: Any, rows: Any) -> Any:
  blocks, _ = _cut(rows, size)
  one = lambda carry, block: (function(shared, carry, block), None)
  return jax.lax.scan(one, start, blocks)[0]


def _cut(rows: PyTree, size: int) -> tuple[PyTree, int]:
  n = jax.tree.leaves(rows)[0].shape[0]
  # As even as possible: a block that is filled up copies all rows.
  size = -(-n // -(-n // size))

  def cut(leaf):
    leaf = jnp.pad(leaf, ((0, -n % size), *((0, 0),) * (leaf.ndim - 1)))
    return leaf.reshape(-1, size, *leaf.shape[1:])

  return jax.tree.map(cut, rows), n


def _parts(rows: PyTree, size: int) -> list[PyTree]:
  n = jax.tree.leaves(rows)[0].shape[0]
  step = _AT_ONCE * size
  return [
    jax.tree.map(lambda leaf, start=start: leaf[start : start + step], rows)
    for start in range(0, n, step)
  ]

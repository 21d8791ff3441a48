"""Sorting a few rows entry by entry."""

from collections.abc import Iterator

import jax.numpy as jnp

from optax_ranger._core.types import Array

# With more rows, compiling takes seconds.
MOST_ROWS = 32


def sort_rows(
  keys: list[Array], others: list[Array]
) -> tuple[list[Array], list[Array]]:
  """Sorts rows by their keys, and the others with them, by a network of comparators.

  XLA sorts along an axis one column at a time, and calls the comparison; this is some
  dozens of instructions for all columns, in one loop over memory.
  """
  keys, others = list(keys), list(others)
  for i, j in comparators(len(keys)):
    above = keys[i] > keys[j]
    for rows in (keys, others):
      low, high = rows[i], rows[j]
      rows[i], rows[j] = jnp.where(above, high, low), jnp.where(above, low, high)
  return keys, others


def comparators(n: int) -> Iterator[tuple[int, int]]:
  """Batcher's merge exchange (Knuth, volume 3, 5.2.2, algorithm M), for any n."""
  top = 1
  while 2 * top < n:
    top *= 2
  p = top if n > 1 else 0
  while p:
    q, r, d = top, 0, p
    while True:
      yield from ((i, i + d) for i in range(n - d) if i & p == r)
      if q == p:
        break
      d, q, r = q - p, q // 2, p
    p //= 2

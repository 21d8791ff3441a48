"""Sparse features: cosine neighbors of rows in SciPy's CSR form, never densified."""

from typing import Any

import numpy as np

from optax_ranger._core import progress as _progress

_CELLS = 2**23  # of a block of similarities, in float64


def is_sparse(features: Any) -> bool:
  """Whether these are SciPy's; told by what they offer, without importing SciPy."""
  return hasattr(features, "tocsr") and hasattr(features, "nnz")


def build(features: Any, k: int, progress: bool) -> tuple[np.ndarray, np.ndarray]:
  """Cosine distances, to 12 digits after the point, and indices, [n, k]."""
  rows = features.tocsr().astype(np.float64)
  n = rows.shape[0]
  count = np.diff(rows.indptr)
  owner = np.repeat(np.arange(n), count)
  finite = np.ones([n], bool)
  finite[owner[~np.isfinite(rows.data)]] = False
  values = np.where(finite[owner], rows.data, 0)
  largest = np.zeros([n])
  np.maximum.at(largest, owner, np.abs(values))
  # By the largest entry first, so that squares stay in range.
  values = values / np.where(largest > 0, largest, 1)[owner]
  norms = np.sqrt(np.bincount(owner, values**2, n))
  values = values / np.where(norms > 0, norms, 1)[owner]
  # Entries may be stored in any order: sums in one order make exact ties.
  rows = type(rows)((values, rows.indices, rows.indptr), shape=rows.shape)
  rows.sum_duplicates()
  keys = rows.T.tocsr()
  distances = np.full([n, k], np.inf, np.float32)
  indices = np.full([n, k], -1, np.int32)
  size = max(1, _CELLS // n)
  starts = range(0, n, size)
  for start in _progress.bar(starts, "sparse neighbors", progress):
    block = (rows[start : start + size] @ keys).toarray()
    # Rounded, so that equal rows are at distance zero and ties are ties.
    block = np.maximum(np.round(1 - block, 12), 0)
    block[:, ~finite] = np.inf
    own = np.arange(start, start + len(block))
    block[np.arange(len(own)), own] = np.inf
    block[~finite[own]] = np.inf
    last = np.partition(block, k - 1, axis=1)[:, k - 1]
    for row, i in enumerate(own):
      near = np.flatnonzero((block[row] <= last[row]) & (block[row] < np.inf))
      near = near[np.argsort(block[row, near], kind="stable")[:k]]
      distances[i, : len(near)] = block[row, near]
      indices[i, : len(near)] = near
  return distances, indices

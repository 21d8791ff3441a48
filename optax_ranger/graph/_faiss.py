"""FAISS as an engine: a flat index for exact graphs, HNSW or IVF for large ones."""

from typing import Any

import numpy as np

from optax_ranger._core import progress as _progress
from optax_ranger.graph import _exact
from optax_ranger.neighbors import _points
from optax_ranger.neighbors import _search

_QUERIES = 4096  # at a time: FAISS's own blocks


def library() -> Any:
  """FAISS, or a refusal that names the extra."""
  try:
    import faiss
  except ImportError as error:
    raise ImportError(
      "backend='faiss' needs FAISS: pip install 'optax-ranger[graph]', or pass"
      " backend='jax'."
    ) from error
  return faiss


def is_installed() -> bool:
  """Whether FAISS can be imported."""
  try:
    library()
  except ImportError:
    return False
  return True


def flat(points: _points.Points, k: int, metric: str, progress: bool) -> Any:
  """Exact: the index's candidates, measured again, and which of them are sure."""
  rows, terms = centered(points)
  index = library().IndexFlatL2(rows.shape[1])
  keys = rows[np.isfinite(terms)]
  ids = np.flatnonzero(np.isfinite(terms))
  index.add(keys)
  keep = min(k + _search.SPARE + 1, len(keys))
  squares, candidates = ask(index, rows, keep, progress)
  candidates = np.where(candidates >= 0, ids[candidates], -1)
  distances, indices, last = _exact.measured(points, candidates, k, metric)
  if keep == len(keys):
    return distances, indices, np.ones([len(rows)], bool)
  slack = _points.slack(rows)
  lengths = np.where(np.isfinite(terms), terms, 0)
  bound = squares[:, -1] - slack * (lengths + lengths.max())
  # In FAISS, zero rows are not at squared distance 2, as here.
  sure = last * (1 + slack) < bound
  if metric == "cosine" and not rows.any(axis=1).all():
    sure &= rows.any(axis=1) & (last < 2 * (1 - slack))
  return distances, indices, sure | ~np.isfinite(terms)


def approximate(
  points: _points.Points,
  k: int,
  metric: str,
  progress: bool,
  *,
  kind: str,
  effort: int | None,
  seed: int,
) -> Any:
  """Candidates of a graph (HNSW) or of the nearest cells (IVF), measured again."""
  faiss = library()
  rows, terms = centered(points)
  alive = np.isfinite(terms)
  keys, ids = rows[alive], np.flatnonzero(alive)
  if kind == "hnsw":
    index = faiss.IndexHNSWFlat(rows.shape[1], 32)
    index.hnsw.efConstruction = 80
    index.hnsw.efSearch = max(effort or 64, k + 1)
  else:
    cells = int(min(4 * np.sqrt(len(keys)), max(1, len(keys) // 39)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(rows.shape[1]), rows.shape[1], cells)
    index.cp.seed = seed
    index.nprobe = min(effort or max(8, cells // 16), cells)
    index.train(keys)
  for first in _progress.bar(range(0, len(keys), _QUERIES), "index", progress):
    index.add(keys[first : first + _QUERIES])
  keep = min(k + _search.SPARE + 1, len(keys))
  _, candidates = ask(index, rows, keep, progress)
  candidates = np.where(candidates >= 0, ids[candidates], -1)
  distances, indices, _ = _exact.measured(points, candidates, k, metric)
  return distances, indices, np.ones([len(rows)], bool)


def ask(
  index: Any, rows: np.ndarray, keep: int, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Searches the index for all rows."""
  starts = range(0, len(rows), _QUERIES)
  parts = [
    index.search(rows[i : i + _QUERIES], keep)
    for i in _progress.bar(starts, "neighbors", progress)
  ]
  squares, candidates = (np.concatenate(p) for p in zip(*parts, strict=True))
  return squares, candidates


def centered(points: _points.Points) -> tuple[np.ndarray, np.ndarray]:
  """Rows around their mean, float32, and their squared lengths."""
  rows = np.asarray(points.rows - points.center, np.float32)
  return np.ascontiguousarray(rows), np.asarray(points.term)

"""`Neighbors` from what other libraries give: sparse graphs and distance matrices."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_ranger._core import validate
from optax_ranger._core.types import ArrayLike
from optax_ranger._core.types import Neighbors
from optax_ranger.neighbors import _nearest

_MODES = ("distance", "connectivity")
_CELLS = 2**22  # of a block of rows that are sorted


def from_graph(
  graph: Any, k: int | None = None, *, mode: str = "distance"
) -> Neighbors:
  """Makes neighbors of a sparse graph, such as scikit-learn's ``kneighbors_graph``.

  Args:
    graph: ``[n, n]``, a sparse matrix or array of SciPy. Row i stores the
      neighbors of example i; stored zeros count. Entries on the diagonal, those
      that are not finite, and repeated ones are left out.
    k: how many, the nearest; None for those of the fullest row. A static Python
      integer.
    mode: what is stored, as for ``kneighbors_graph``. ``"distance"``: distances.
      ``"connectivity"``: that there is an edge, any number; all neighbors are at
      distance 1 then, and listed by index.

  Returns:
    ``Neighbors`` with arrays of ``[n, k]``, nearest first, ties to the lower
    index, weights ``1 / k``. A row with fewer entries ends with index -1, distance
    infinity and weight 0. On the host, in memory O(entries + n k).

  Guarantees:
    * It equals a loop over the entries.
    * Of scikit-learn's graph it makes the neighbors of ``nearest``.

  Raises:
    ValueError: for a matrix that is not square, negative distances, another mode,
      and, with ``"connectivity"``, k less than the fullest row has.
    TypeError: for what is not sparse, k that is not a Python integer.

  Examples:
    >>> import numpy as np, optax_ranger as ranger
    >>> from scipy import sparse
    >>> edges = sparse.csr_array(np.array([[0.0, 2, 1], [2, 0, 0], [1, 0, 0]]))
    >>> neighbors = ranger.neighbors.from_graph(edges)
    >>> print(neighbors.indices.tolist(), neighbors.distances[1])
    [[2, 1], [0, -1], [0, -1]] [ 2. inf]
  """
  validate.choice("mode", mode, _MODES)
  if not hasattr(graph, "tocsr"):
    raise TypeError(
      f"graph must be a sparse matrix of SciPy, got {type(graph).__name__}; for a"
      " matrix of distances call neighbors.from_distances."
    )
  _check_square("graph", graph.shape)
  csr, n = graph.tocsr(), graph.shape[0]
  owner = np.repeat(np.arange(n), np.diff(csr.indptr))
  other, far = np.asarray(csr.indices), np.asarray(csr.data, np.float64)
  used = (owner != other) & np.isfinite(far)
  owner, other, far = owner[used], other[used], far[used]
  if mode == "connectivity":
    far = np.ones_like(far)
  _check_distances("graph", far)
  order = np.lexsort((far, other, owner))  # The nearest of repeated entries first.
  owner, other, far = owner[order], other[order], far[order]
  first = np.ones(len(owner), bool)
  first[1:] = (owner[1:] != owner[:-1]) | (other[1:] != other[:-1])
  owner, other, far = owner[first], other[first], far[first]
  order = np.lexsort((other, far, owner))
  owner, other, far = owner[order], other[order], far[order]
  count = np.bincount(owner, minlength=n)
  fullest = int(count.max(initial=0))
  if k is None:
    k = max(1, fullest)
  validate.static_count("k", k)
  if mode == "connectivity" and k < fullest:
    raise ValueError(
      f"k must be at least the {fullest} neighbors of the fullest row, got {k}: with"
      " mode='connectivity' nothing tells which of them are nearest."
    )
  place = np.arange(len(owner)) - (np.cumsum(count) - count)[owner]
  kept = place < k
  indices, distances = np.full([n, k], -1, np.int32), np.full([n, k], np.inf)
  indices[owner[kept], place[kept]] = other[kept]
  distances[owner[kept], place[kept]] = far[kept]
  return _nearest.uniform(jnp.asarray(indices), jnp.asarray(_narrow(distances)))


def from_distances(distances: ArrayLike, k: int) -> Neighbors:
  """Makes neighbors of a matrix of precomputed distances.

  For distances of your own: edit distances, time warping, kernels of molecules.

  Args:
    distances: ``[n, n]``; entry (i, j) is how far j is from i, not negative, and
      need not be symmetric. The diagonal is left out, and so are entries that are
      not finite.
    k: how many, in [1, n - 1]; a static Python integer.

  Returns:
    ``Neighbors`` with arrays of ``[n, k]``, nearest first, ties to the lower
    index, weights ``1 / k``. A row with fewer finite entries ends with index -1,
    distance infinity and weight 0. On the host, sorted in blocks of rows.

  Guarantees:
    * It equals a full sort.

  Raises:
    ValueError: for a matrix that is not square, negative distances, k outside
      [1, n - 1].
    TypeError: for k that is not a Python integer.

  Examples:
    >>> import numpy as np, optax_ranger as ranger
    >>> words = ["cat", "cut", "dog"]
    >>> differ = lambda v, w: sum(a != b for a, b in zip(v, w))
    >>> far = np.array([[differ(v, w) for w in words] for v in words])
    >>> print(ranger.neighbors.from_distances(far, 1).indices[:, 0])
    [1 0 0]
  """
  matrix = np.asarray(distances)
  _check_square("distances", matrix.shape)
  validate.static_count("k", k)
  n = len(matrix)
  if k >= n:
    raise ValueError(
      f"k must be less than the number of examples, n = {n}, got {k}: an example is"
      " not its own neighbor."
    )
  indices, far = np.empty([n, k], np.int32), np.empty([n, k])
  size = max(1, _CELLS // n)
  for start in range(0, n, size):
    block = matrix[start : start + size].astype(np.float64)
    row = np.arange(len(block))
    block[row, start + row] = np.inf
    block[~np.isfinite(block)] = np.inf
    _check_distances("distances", block)
    order = np.argsort(block, axis=1, kind="stable")[:, :k]
    indices[start + row] = order
    far[start + row] = np.take_along_axis(block, order, axis=1)
  indices[np.isinf(far)] = -1
  return _nearest.uniform(jnp.asarray(indices), jnp.asarray(_narrow(far)))


def _check_square(name: str, shape: tuple[int, ...]) -> None:
  if len(shape) != 2 or shape[0] != shape[1]:
    raise ValueError(f"{name} must have shape [n, n], got {list(shape)}.")


def _check_distances(name: str, distances: np.ndarray) -> None:
  if distances.size and distances.min() < 0:
    raise ValueError(
      f"{name} must hold distances, which are not negative, got {distances.min()}:"
      " turn similarities s into distances first, for example 1 - s."
    )


def _narrow(distances: np.ndarray) -> np.ndarray:
  """As float32, where what is finite stays so."""
  most = float(np.finfo(np.float32).max)
  return np.where(np.isinf(distances), distances, distances.clip(max=most)).astype(
    np.float32
  )

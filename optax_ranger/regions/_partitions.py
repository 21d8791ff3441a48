"""Partitions of data into regions, as ids: for `aggregate_by_regions` and layers."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_ranger._core import validate
from optax_ranger._core.types import Array
from optax_ranger._core.types import ArrayLike


class Clusters(NamedTuple):
  """Regions around centers.

  Attributes:
    regions: ``int32 [n]``, the region of each example; -1 where its features
      are not finite.
    centers: ``float32 [num_regions, d]``.
  """

  regions: Array
  centers: Array


def by_kmeans(features: ArrayLike, num_regions: int, *, seed: int = 0) -> Clusters:
  r"""Splits examples into regions around the centers of k-means.

  scikit-learn does it, on the host. Features should be on comparable scales.

  Args:
    features: ``[n, d]``, real.
    num_regions: how many, at most the number of examples with finite features;
      a static Python integer.
    seed: of the choice of the first centers; the same seed, the same regions.

  Returns:
    ``Clusters(regions [n], centers [num_regions, d])``.

  Raises:
    ImportError: without scikit-learn, which the extra ``regions`` installs.
    ValueError: for features that are not 2-D, and too many regions.
    TypeError: for a number of regions that is not a Python integer.

  Examples:
    >>> import numpy as np, optax_ranger as ranger
    >>> points = np.array([[0.0], [0.1], [5.0], [5.1]])
    >>> regions, centers = ranger.regions.by_kmeans(points, 2)
    >>> print(bool(regions[0] == regions[1]), bool(regions[0] == regions[2]))
    True False
  """
  validate.static_count("num_regions", num_regions)
  if jnp.ndim(features) != 2:
    raise ValueError(
      f"features must have shape [n, d], got {list(jnp.shape(features))}."
    )
  try:
    from sklearn import cluster
  except ImportError as error:
    raise ImportError(
      "regions.by_kmeans needs scikit-learn: pip install 'optax-ranger[regions]'."
    ) from error
  rows = np.asarray(features, np.float32)
  finite = np.isfinite(rows).all(axis=1)
  if num_regions > finite.sum():
    raise ValueError(
      f"num_regions must be at most the {finite.sum()} examples with finite"
      f" features, got {num_regions}."
    )
  found = cluster.KMeans(num_regions, n_init=4, random_state=seed).fit(rows[finite])
  regions = np.full([len(rows)], -1, np.int32)
  regions[finite] = found.labels_
  return Clusters(
    jnp.asarray(regions), jnp.asarray(found.cluster_centers_.astype(np.float32))
  )


def by_grid(
  positions: ArrayLike,
  parts: Sequence[int],
  *,
  low: Any = None,
  high: Any = None,
) -> Array:
  r"""Splits positions in space by a grid of equal cells, 2-D, 3-D, or any other.

  .. math:: \mathrm{cell}_d = \lfloor p_d \, (x_d - l_d) / (h_d - l_d) \rfloor

  Args:
    positions: ``[n, d]``, where each example lies.
    parts: d Python integers, into how many parts each direction is cut.
    low: the grid's lower corner, a number or ``[d]``; None for the least
      position. Positions outside of the grid count to the nearest cell.
    high: the upper corner; None for the largest position.

  Returns:
    ``int32 [n]`` in [0, product of parts), the last direction counting fastest;
    -1 where a position is not finite.

  Raises:
    ValueError: for positions that are not 2-D, and parts of another length.
    TypeError: for parts that are not Python integers.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> corners = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> print(ranger.regions.by_grid(corners, (2, 2)))
    [0 1 2 3]
  """
  if jnp.ndim(positions) != 2 or jnp.shape(positions)[1] != len(parts):
    raise ValueError(
      f"positions must have shape [n, {len(parts)}], one column for each of"
      f" parts = {tuple(parts)}, got {list(jnp.shape(positions))}."
    )
  for i, count in enumerate(parts):
    validate.static_count(f"parts[{i}]", count)
  places = jnp.asarray(positions).astype(jnp.float32)
  finite = jnp.isfinite(places).all(axis=1)
  if not places.shape[0]:
    return jnp.zeros([0], jnp.int32)
  inside = finite[:, None]
  least = jnp.where(inside, places, jnp.inf).min(axis=0) if low is None else low
  largest = jnp.where(inside, places, -jnp.inf).max(axis=0) if high is None else high
  shape = places.shape[1:]
  least, largest = (
    jnp.broadcast_to(jnp.asarray(edge).astype(jnp.float32), shape)
    for edge in (least, largest)
  )
  width = largest - least
  safe = jnp.where(width > 0, width, jnp.ones_like(width))
  share = jnp.where(inside, (places - least[None]) / safe[None], 0)
  counts = jnp.asarray(parts, jnp.float32)
  cells = jnp.clip(jnp.floor(share * counts[None]), 0, counts[None] - 1)
  region = jnp.zeros([places.shape[0]], jnp.int32)
  for i, count in enumerate(parts):
    region = region * count + cells[:, i].astype(jnp.int32)
  return jnp.where(finite, region, -1)


def by_time(
  times: ArrayLike, num_regions: int, *, low: Any = None, high: Any = None
) -> Array:
  """Splits moments in time into windows of equal length.

  Args:
    times: ``[n]``, in any unit and order.
    num_regions: how many windows; a static Python integer.
    low: where the first window begins; None for the earliest moment.
    high: where the last window ends; None for the latest.

  Returns:
    ``int32 [n]`` in [0, num_regions); -1 where a moment is not finite.

  Raises:
    ValueError: for times that are not a vector.
    TypeError: for a number of regions that is not a Python integer.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> print(ranger.regions.by_time(jnp.arange(6.0), 3))
    [0 0 1 1 2 2]
  """
  if jnp.ndim(times) != 1:
    raise ValueError(f"times must have shape [n], got {list(jnp.shape(times))}.")
  validate.static_count("num_regions", num_regions)
  column = jnp.asarray(times)[:, None]
  return by_grid(column, (num_regions,), low=low, high=high)


def by_graph(edges: ArrayLike, num_nodes: int, num_regions: int) -> Array:
  """Splits the nodes of a graph into regions of nearly equal size with few edges cut.

  METIS does it, on the host.

  Args:
    edges: ``int [m, 2]``, pairs of nodes; direction, repetition and edges from
      a node to itself do not matter.
    num_nodes: how many nodes there are.
    num_regions: how many regions, at most ``num_nodes``.

  Returns:
    ``int32 [num_nodes]`` in [0, num_regions).

  Raises:
    ImportError: without pymetis, which the extra ``regions`` installs.
    ValueError: for edges of another shape or to nodes that there are not, and
      for too many regions.
    TypeError: for counts that are not Python integers.

  Examples:
    >>> import numpy as np, optax_ranger as ranger
    >>> ring = np.array([[i, (i + 1) % 8] for i in range(8)])
    >>> print(np.bincount(ranger.regions.by_graph(ring, 8, 2)))  # balanced
    [4 4]

  References:
    Karypis, Kumar, `A Fast and High Quality Multilevel Scheme for Partitioning
    Irregular Graphs <https://doi.org/10.1137/S1064827595287997>`_, 1998.
  """
  validate.static_count("num_nodes", num_nodes)
  validate.static_count("num_regions", num_regions)
  if num_regions > num_nodes:
    raise ValueError(
      f"num_regions must be at most num_nodes = {num_nodes}, got {num_regions}."
    )
  if jnp.ndim(edges) != 2 or jnp.shape(edges)[1] != 2:
    raise ValueError(f"edges must have shape [m, 2], got {list(jnp.shape(edges))}.")
  validate.integers("edges", edges)
  pairs = np.asarray(edges).astype(np.int64)
  if pairs.size and (pairs.min() < 0 or pairs.max() >= num_nodes):
    raise ValueError(
      f"edges must join nodes in [0, {num_nodes}), got {pairs.min()} to {pairs.max()}."
    )
  try:
    import pymetis
  except ImportError as error:
    raise ImportError(
      "regions.by_graph needs pymetis: pip install 'optax-ranger[regions]'."
    ) from error
  pairs = pairs[pairs[:, 0] != pairs[:, 1]]
  pairs = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
  starts = np.searchsorted(pairs[:, 0], np.arange(num_nodes + 1))
  adjacency = pymetis.CSRAdjacency(starts.tolist(), pairs[:, 1].tolist())
  _, regions = pymetis.part_graph(num_regions, adjacency=adjacency)
  return jnp.asarray(np.asarray(regions, np.int32))

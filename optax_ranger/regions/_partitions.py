"""Partitions of data into regions, as ids: for `aggregate_by_regions` and layers."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import host
from optax_ranger._core import validate
from optax_ranger._core.types import Array
from optax_ranger._core.types import ArrayLike
from optax_ranger._core.types import Scalar


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
    features: ``[n, d]``, real. Arrays of NumPy are shifted in their own type before
      they are rounded to float32; the centers are rounded as they are.
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
  values = np.asarray(features)
  # Around a point of the data in their own type, so that float32 loses no digits.
  wide = host.is_wide(values)
  origin = host.nearest_zero(values) if wide else np.zeros(values.shape[1])
  with np.errstate(over="ignore"):
    rows = host.difference(values, origin) if wide else values
    rows = rows.astype(np.float32)
  finite = np.isfinite(rows).all(axis=1)
  if num_regions > finite.sum():
    raise ValueError(
      f"num_regions must be at most the {finite.sum()} examples with finite"
      f" features, got {num_regions}."
    )
  found = cluster.KMeans(num_regions, n_init=4, random_state=seed).fit(rows[finite])
  regions = np.full([len(rows)], -1, np.int32)
  regions[finite] = found.labels_
  centers = found.cluster_centers_.astype(np.float64) + origin.astype(np.float64)
  return Clusters(jnp.asarray(regions), jnp.asarray(centers.astype(np.float32)))


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
    positions: ``[n, d]``, where each example lies. 64-bit numbers of NumPy, such as
      map coordinates, are compared in their own type, on the host.
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
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> corners = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> print(jax.jit(ranger.regions.by_grid, static_argnums=1)(corners, (2, 2)))
    [0 1 2 3]
  """
  if jnp.ndim(positions) != 2 or jnp.shape(positions)[1] != len(parts):
    raise ValueError(
      f"positions must have shape [n, {len(parts)}], one column for each of"
      f" parts = {tuple(parts)}, got {list(jnp.shape(positions))}."
    )
  for i, count in enumerate(parts):
    validate.static_count(f"parts[{i}]", count)
  # On the host in their own type, where float32 would lose digits.
  xp: Any = np if host.is_wide(positions) and _are_known(low, high) else jnp
  places = xp.asarray(positions)
  if not places.shape[0]:
    return jnp.zeros([0], jnp.int32)
  finite = xp.isfinite(places).all(axis=1)
  least, largest = places, places
  if not jnp.issubdtype(places.dtype, jnp.integer):
    infinite = xp.asarray(np.inf, places.dtype)
    least = xp.where(finite[:, None], places, infinite)
    largest = xp.where(finite[:, None], places, -infinite)
  least = least.min(axis=0) if low is None else _edge(low, places, xp)
  largest = largest.max(axis=0) if high is None else _edge(high, places, xp)
  width = host.difference(largest, least)
  safe = xp.where(width > 0, width, xp.ones_like(width))
  away = host.difference(places, least[None])
  share = xp.where(finite[:, None], away, xp.zeros_like(away)) / safe[None]
  counts = xp.asarray(parts, share.dtype)[None]
  cells = xp.clip(xp.floor(share * counts), 0, counts - 1)
  region = xp.zeros([places.shape[0]], np.int32)
  for i, count in enumerate(parts):
    region = region * count + cells[:, i].astype(np.int32)
  return jnp.asarray(xp.where(finite, region, -1))


def _are_known(*edges: Any) -> bool:
  return all(edge is None or validate.is_known(edge) for edge in edges)


def _edge(edge: Any, places: Any, xp: Any) -> Any:
  """A corner of the grid, [d]: an integer among integers, where it is one."""
  edge = xp.broadcast_to(xp.asarray(edge), places.shape[1:])
  if all(jnp.issubdtype(x.dtype, jnp.integer) for x in (edge, places)):
    range_ = np.iinfo(places.dtype)
    if validate.is_known(edge) and (edge.min() < range_.min or edge.max() > range_.max):
      return edge.astype(np.float64 if xp is np else np.float32)
    return edge.astype(places.dtype)
  return edge if xp is np else edge.astype(jnp.float32)


def by_time(
  times: ArrayLike,
  num_regions: int,
  *,
  low: Scalar | None = None,
  high: Scalar | None = None,
) -> Array:
  """Splits moments in time into windows of equal length.

  Args:
    times: ``[n]``, in any unit and order. 64-bit numbers of NumPy, such as Unix
      times, are compared in their own type, on the host.
    num_regions: how many windows; a static Python integer.
    low: where the first window begins; None for the earliest moment.
    high: where the last window ends; None for the latest.

  Returns:
    ``int32 [n]`` in [0, num_regions); -1 where a moment is not finite.

  Raises:
    ValueError: for times that are not a vector.
    TypeError: for a number of regions that is not a Python integer.

  Examples:
    >>> import numpy as np, optax_ranger as ranger
    >>> minutes = 1_700_000_000 + 60 * np.arange(6)  # in Unix seconds
    >>> print(ranger.regions.by_time(minutes, 3))
    [0 0 1 1 2 2]
  """
  if jnp.ndim(times) != 1:
    raise ValueError(f"times must have shape [n], got {list(jnp.shape(times))}.")
  validate.static_count("num_regions", num_regions)
  column = (times if isinstance(times, jax.Array) else np.asarray(times))[:, None]
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

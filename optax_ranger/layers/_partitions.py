"""How a layer's input is split: what the local network sees of each region."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.types import Array
from optax_ranger._core.types import ArrayLike


@dataclasses.dataclass(frozen=True)
class Grid:
  """Cuts the axes after the batch into equal parts: a 2-D or 3-D grid, or any other.

  The local network sees ``[batch, *sizes of a cell, ...]``; further axes, such as
  channels, stay whole. Regions are numbered with the last axis counting fastest.

  Attributes:
    parts: into how many parts each axis is cut; it must divide the axis.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ranger import layers
    >>> (cells,), _ = layers.Grid((2, 2)).split(jnp.zeros([8, 28, 28, 3]))
    >>> print(cells.shape)
    (4, 8, 14, 14, 3)
  """

  parts: tuple[int, ...]

  def __post_init__(self):
    object.__setattr__(self, "parts", tuple(self.parts))
    for i, count in enumerate(self.parts):
      validate.static_count(f"parts[{i}]", count)

  @property
  def num_regions(self) -> int:
    return int(np.prod(self.parts))

  def split(self, inputs: Array) -> tuple[tuple[Any, ...], None]:
    axes = len(self.parts)
    if inputs.ndim < 1 + axes:
      raise ValueError(
        f"inputs must have a batch axis and {axes} axes to cut for parts ="
        f" {self.parts}, got shape {list(inputs.shape)}."
      )
    batch, sizes, rest = inputs.shape[0], inputs.shape[1 : 1 + axes], ()
    rest = inputs.shape[1 + axes :]
    for axis, (size, count) in enumerate(zip(sizes, self.parts, strict=True), start=1):
      if size % count:
        raise ValueError(
          f"parts = {self.parts} must divide the axes of the inputs, got size"
          f" {size} on axis {axis}; pad the inputs."
        )
    cells = [size // count for size, count in zip(sizes, self.parts, strict=True)]
    pairs = [n for pair in zip(self.parts, cells, strict=True) for n in pair]
    apart = inputs.reshape(batch, *pairs, *rest)
    order = [1 + 2 * i for i in range(axes)], [2 + 2 * i for i in range(axes)]
    rest_axes = range(1 + 2 * axes, apart.ndim)
    apart = apart.transpose(*order[0], 0, *order[1], *rest_axes)
    return (apart.reshape(self.num_regions, batch, *cells, *rest),), None


class TimeWindows(Grid):
  """Cuts the axis after the batch into windows of equal length.

  The local network sees ``[batch, time / num_regions, ...]``.

  Args:
    num_regions: how many windows; it must divide the axis.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ranger import layers
    >>> (windows,), _ = layers.TimeWindows(4).split(jnp.zeros([8, 1000, 3]))
    >>> print(windows.shape)
    (4, 8, 250, 3)
  """

  def __init__(self, num_regions: int):
    super().__init__((num_regions,))


class Centers:
  """Gives each point of an input to the nearest of some centers, of k-means say.

  Inputs are ``[batch, points, d]``; the local network is called with the points
  of a region and a mask, ``[batch, capacity, d]`` and ``bool [batch, capacity]``.
  Empty places are zeros. A region without points counts for nothing.

  Args:
    centers: ``[num_regions, d]``, such as ``regions.by_kmeans(...).centers``.
    capacity: how many points of a region are kept, the first ones; None for all,
      which runs the local network on arrays as long as the input.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ranger import layers
    >>> partition = layers.Centers(jnp.array([[0.0], [9.0]]), capacity=2)
    >>> (points, mask), _ = partition.split(jnp.array([[[1.0], [8.0], [2.0]]]))
    >>> print(points[:, 0, :, 0], mask[1, 0])
    [[1. 2.]
     [8. 0.]] [ True False]
  """

  def __init__(self, centers: ArrayLike, *, capacity: int | None = None):
    if np.ndim(centers) != 2:
      raise ValueError(
        f"centers must have shape [num_regions, d], got {list(np.shape(centers))}."
      )
    if capacity is not None:
      validate.static_count("capacity", capacity)
    # NumPy: no device is touched before the layer is called.
    self.centers = np.asarray(centers)
    self.capacity = capacity
    self.num_regions = self.centers.shape[0]

  def split(self, inputs: Array) -> tuple[tuple[Any, ...], Array]:
    width = self.centers.shape[1]
    if inputs.ndim != 3 or inputs.shape[2] != width:
      raise ValueError(
        f"inputs must have shape [batch, points, {width}], got {list(inputs.shape)}."
      )
    capacity = inputs.shape[1]
    if self.capacity is not None:
      capacity = min(self.capacity, capacity)
    real = jnp.issubdtype(inputs.dtype, jnp.floating)
    places = inputs.astype(numerics.wide(inputs.dtype) if real else jnp.float32)
    distances = jax.lax.map(
      lambda center: ((places - center[None, None]) ** 2).sum(axis=2),
      jnp.asarray(self.centers, places.dtype),
    )
    nearest = distances.argmin(axis=0)

    def one_region(region):
      members = nearest == region
      # Members first, in their order.
      order = jnp.argsort(jnp.logical_not(members), axis=1, stable=True)
      order = order[:, :capacity]
      mask = jnp.take_along_axis(members, order, axis=1)
      points = jnp.take_along_axis(inputs, order[:, :, None], axis=1)
      return jnp.where(mask[:, :, None], points, jnp.zeros_like(points)), mask

    points, mask = jax.vmap(one_region)(
      jnp.arange(self.num_regions, dtype=nearest.dtype)
    )
    return (points, mask), mask.any(axis=2)


class Graph:
  """Splits the nodes of a graph, the same for all inputs, into given regions.

  Inputs are ``[batch, nodes, ...]``; the local network is called with the nodes of
  a region, a mask and the edges within it: ``[batch, size, ...]``, ``bool [batch,
  size]``, ``float [size, size]``. The size is that of the largest region, so use
  balanced ones; empty places are zeros. Edges between regions are cut.

  Args:
    regions: ``int [nodes]``, such as ``regions.by_graph(edges, nodes, 8)``. A
      negative one is no region.
    edges: ``int [m, 2]``, pairs of nodes, both directions meant.

  Examples:
    >>> import numpy as np, jax.numpy as jnp
    >>> from optax_ranger import layers
    >>> partition = layers.Graph(np.array([0, 0, 1]), np.array([[0, 1], [1, 2]]))
    >>> (nodes, mask, adjacency), _ = partition.split(jnp.ones([1, 3, 1]))
    >>> print(nodes.shape, adjacency[0].tolist(), adjacency[1].tolist())
    (2, 1, 2, 1) [[0.0, 1.0], [1.0, 0.0]] [[0.0, 0.0], [0.0, 0.0]]
  """

  def __init__(self, regions: ArrayLike, edges: ArrayLike):
    regions, edges = np.asarray(regions), np.asarray(edges).reshape(-1, 2)
    validate.integers("regions", regions)
    validate.integers("edges", edges)
    if regions.ndim != 1 or not (regions >= 0).any():
      raise ValueError(
        "regions must have shape [nodes] and hold an id of 0 or more, got shape"
        f" {list(regions.shape)}."
      )
    if edges.size and (edges.min() < 0 or edges.max() >= len(regions)):
      raise ValueError(
        f"edges must join nodes in [0, {len(regions)}), got {edges.min()} to"
        f" {edges.max()}."
      )
    self.num_regions = int(regions.max()) + 1
    members = [np.flatnonzero(regions == r) for r in range(self.num_regions)]
    size = max(map(len, members))
    self.num_nodes = len(regions)
    self.places = np.zeros([self.num_regions, size], np.int32)
    self.mask = np.zeros([self.num_regions, size], bool)
    position = np.zeros(len(regions), np.int32)
    for region, nodes in enumerate(members):
      self.places[region, : len(nodes)] = nodes
      self.mask[region, : len(nodes)] = True
      position[nodes] = np.arange(len(nodes))
    self.adjacency = np.zeros([self.num_regions, size, size], np.float32)
    inside = edges[regions[edges[:, 0]] == regions[edges[:, 1]]]
    inside = inside[regions[inside[:, 0]] >= 0]
    for a, b in (inside.T, inside.T[::-1]):
      self.adjacency[regions[a], position[a], position[b]] = 1

  def split(self, inputs: Array) -> tuple[tuple[Any, ...], Array]:
    if inputs.ndim < 2 or inputs.shape[1] != self.num_nodes:
      raise ValueError(
        f"inputs must have shape [batch, {self.num_nodes}, ...], one row for each"
        f" node, got {list(inputs.shape)}."
      )
    batch = inputs.shape[0]
    nodes = jnp.moveaxis(inputs[:, self.places], 1, 0)
    mask = jnp.broadcast_to(
      jnp.asarray(self.mask)[:, None], (self.num_regions, batch, self.mask.shape[1])
    )
    wide = jnp.expand_dims(mask, tuple(range(3, nodes.ndim)))
    nodes = jnp.where(wide, nodes, jnp.zeros_like(nodes))
    adjacency = jnp.asarray(self.adjacency, inputs.dtype)
    return (nodes, mask, adjacency), mask.any(axis=2)


Partition = functools.reduce(lambda a, b: a | b, (Grid, Centers, Graph))

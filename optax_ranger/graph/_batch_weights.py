"""The weights of a batch in neighbor averaging over a whole graph, in three ways."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ranger._core import labels as _labels
from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.types import Array
from optax_ranger._core.types import ArrayLike
from optax_ranger._core.types import Neighbors
from optax_ranger.neighbors import _nearest

WAYS = ("fetched", "in_batch", "amortized")


class GraphWeights(NamedTuple):
  """A graph that is ready to be paid for; only arrays, so it may be an argument.

  Attributes:
    neighbors: ``[n, k]``.
    scale: one over twice the mean total weight of an example, a number:
      ``average_neighbors(normalize="graph")``.
    table: ``float [n]``, the weight of each example in the mean over the whole
      graph, times n: its own and what its neighbors give it.
  """

  neighbors: Neighbors
  scale: Array
  table: Array


class BatchWeights(NamedTuple):
  """Examples of a step and their weights: ``(weights * losses).sum()`` is the loss.

  Attributes:
    ids: ``int32 [m]``, which examples to compute; the batch comes first.
    weights: ``float [m]``.
  """

  ids: Array
  weights: Array


def graph_weights(neighbors: Neighbors) -> GraphWeights:
  r"""Prepares a graph for ``batch_weights``; after each change of its weights, once.

  .. math::
    \gamma = \frac{n}{2 \sum_{ij} w_{ij}}, \qquad
    c_i = \gamma \big( \textstyle\sum_j w_{ij} + \sum_{j : N(j, \cdot) = i} w_{ji} \big)

  Args:
    neighbors: ``[n, k]``, weighed; see ``neighbors.weigh``.

  Returns:
    ``GraphWeights(neighbors, scale, table)``.

  Guarantees:
    * The table is what ``example_weights`` gives for the whole graph with
      ``normalize="graph"``.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from optax_ranger import graph
    >>> points = jnp.array([[0.0], [1.0], [3.0]])
    >>> neighbors = graph.build(points, 1, backend="jax")
    >>> print(jax.jit(graph.graph_weights)(neighbors).table)
    [1.  1.5 0.5]
  """
  indices, weights = _usable(neighbors)
  own = weights.sum(axis=1)
  scale = numerics.divide(jnp.ones_like(own[0]), 2 * own.mean())
  received = jnp.zeros_like(own).at[indices].add(weights)
  clean = Neighbors(indices, jnp.asarray(neighbors.distances), weights)
  return GraphWeights(clean, scale, scale * (own + received))


def batch_weights(
  whole: GraphWeights,
  ids: ArrayLike,
  way: str,
  *,
  key: Array | None = None,
  k: int | None = None,
) -> BatchWeights:
  r"""Tells what to compute for a batch, so that neighbors are averaged in the mean.

  ======================  =================  ==================  ================
  way                     examples computed  spread of the step  when
  ======================  =================  ==================  ================
  ``"fetched"``           B (1 + k)          least               loading is cheap
  ``"in_batch"``          B                  large, unless the   B near n, or
                                             batch is a region   batches of
                                                                 neighbors
  ``"amortized"``         B                  between             nearly always
  ======================  =================  ==================  ================

  All have the same expectation over batches that are drawn uniformly without
  replacement: the mean over the whole graph of
  ``average_neighbors(normalize="graph")``. Shapes are static, so one compiled
  step serves them all, and every graph of the same shape.

  Args:
    whole: of ``graph_weights``.
    ids: ``int [B]``, the batch. An id outside [0, n) stands for no example: example
      0 takes its place, with weight zero.
    way: ``"fetched"``: each example brings k neighbors along, drawn at random;
      ``"in_batch"``: only neighbors that fall in the batch, their weights times
      (n - 1) / (B - 1); ``"amortized"``: nobody, weights are those of the graph.
    key: of the draw of ``"fetched"``.
    k: how many are fetched; None for all, which needs no key.

  Returns:
    ``BatchWeights(ids [m], weights [m])``.

  Guarantees:
    * The three have the same expectation, and another scaling is told apart from it.

  Raises:
    ValueError: for another way, no key where one is needed, k outside [1, K], a
      batch of one example for ``"in_batch"``.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from optax_ranger import graph
    >>> points = jnp.array([[0.0], [1.0], [3.0]])
    >>> whole = jax.jit(graph.graph_weights)(graph.build(points, 1, backend="jax"))
    >>> fetched = jax.jit(lambda whole, ids: graph.batch_weights(whole, ids, "fetched"))
    >>> ids, weights = fetched(whole, jnp.array([0, 2]))
    >>> print(ids, weights)
    [0 2 1 1] [0.25 0.25 0.25 0.25]
  """
  validate.choice("way", way, WAYS)
  ids = _labels.read_ids("ids", ids)
  n, size = whole.table.shape[0], ids.shape[0]
  share = whole.scale / size
  inside = jnp.logical_and(ids >= 0, ids < n)
  ids = jnp.where(inside, ids, jnp.zeros_like(ids))
  keep = lambda rows, inside: jnp.where(inside, rows, jnp.zeros_like(rows))
  if way == "amortized":
    return BatchWeights(ids, keep(whole.table[ids], inside) / size)
  own = jax.tree.map(lambda leaf: leaf[ids], whole.neighbors)
  own = own._replace(weights=keep(own.weights, inside[:, None]))
  if way == "fetched":
    if k is not None:
      if key is None:
        raise ValueError("way='fetched' with k= needs key=, a key of jax.random.")
      own = _nearest.sample(key, own, k)
    weights = jnp.concatenate([own.weights.sum(axis=1), own.weights.reshape(-1)])
    return BatchWeights(
      jnp.concatenate([ids, own.indices.reshape(-1)]), share * weights
    )
  if size < 2:
    raise ValueError(f"way='in_batch' needs at least 2 examples, got {size}.")
  # Nobody's neighbor is n, which stands for no example.
  matched = jnp.where(inside, ids, jnp.full_like(ids, n))
  order = jnp.argsort(matched)
  place = jnp.searchsorted(matched[order], own.indices)
  place = order[jnp.minimum(place, size - 1)]
  inside = matched[place] == own.indices
  weights = jnp.where(inside, own.weights, jnp.zeros_like(own.weights))
  weights = weights * ((n - 1) / (size - 1))
  received = jnp.zeros_like(weights[:, 0]).at[place].add(weights)
  return BatchWeights(ids, share * (weights.sum(axis=1) + received))


def _usable(neighbors: Neighbors) -> tuple[Array, Array]:
  """Empty places point at example 0 and weigh nothing."""
  indices = _labels.fit("neighbors.indices", neighbors.indices)
  weights = jnp.asarray(neighbors.weights)
  filled = (indices >= 0) & (indices < indices.shape[0]) & jnp.isfinite(weights)
  return (
    jnp.where(filled, indices, jnp.zeros_like(indices)),
    jnp.where(filled, weights, jnp.zeros_like(weights)),
  )

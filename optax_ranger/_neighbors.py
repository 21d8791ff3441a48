"""Nearest neighbors, what they weigh, and how far they back a label: arrays only."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ranger import _numerics
from optax_ranger import _search
from optax_ranger import _types
from optax_ranger import _validate

METRICS = ("euclidean", "cosine")
_KERNELS = ("uniform", "inverse_distance", "gaussian")


def nearest_neighbors(
  features: _types.ArrayLike,
  k: int,
  *,
  metric: str = "euclidean",
  block_size: int = 1024,
) -> _types.Neighbors:
  r"""Finds the k nearest other examples of each example, by trying them all.

  Tiles of products tell which may be near, and those are measured, nearest first;
  ties go to the lower index. An example that rounding leaves in doubt is measured
  against all others, which is slow where clusters lie thousands of radii apart
  (``optax_ranger.graph.build`` does that faster, and equal rows once). Differences
  below 1e-19 of the largest feature count as none. An example whose features are
  not finite has no neighbors and is nobody's neighbor.

  .. math::
    d_{ij} = \lVert x_i - x_j \rVert_2 \quad (\text{"euclidean"}), \qquad
    d_{ij} = 1 - \frac{\langle x_i, x_j \rangle}{\lVert x_i \rVert \lVert x_j \rVert}
    \quad (\text{"cosine"})

  Args:
    features: ``[n, d]``, of any real type; computed in float32 or better.
    k: how many, in [1, n - 1]; a static Python integer.
    metric: ``"euclidean"``: distances, not their squares. ``"cosine"``: an
      all-zero row is at distance 1 from every other.
    block_size: rows of a tile, and an eighth of its columns. Memory is
      O(n k + n d + block^2).

  Returns:
    ``Neighbors`` with arrays of ``[n, k]``; weights are ``1 / k``, the uniform
    ones. Places that could not be filled (rows that are not finite) have index
    -1, distance infinity and weight 0.

  Guarantees:
    * The same neighbors as a full sort (``test_neighbors_equal_a_full_sort``), for
      clusters far apart and at any scale too
      (``test_exact_where_rounding_is_worst``).
    * Ties go to the lower index (``test_ties_go_to_the_lower_index``).
    * Memory does not grow with n squared
      (``test_neighbor_memory_grows_linearly``).

  Raises:
    ValueError: for features that are not 2-D, k outside [1, n - 1], another
      metric.
    TypeError: for complex features, k that is not a Python integer.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> points = jnp.array([[0.0], [1.0], [3.0]])
    >>> neighbors = ranger.nearest_neighbors(points, k=1)
    >>> print(neighbors.indices[:, 0], neighbors.distances[:, 0])
    [1 0 1] [1. 1. 2.]
  """
  if jnp.ndim(features) != 2 or not jnp.shape(features)[1]:
    raise ValueError(
      "features must have shape [n, d], d at least 1, got"
      f" {list(jnp.shape(features))}; flatten each example first."
    )
  features = jnp.asarray(features)
  if jnp.issubdtype(features.dtype, jnp.complexfloating):
    raise TypeError(f"features must be real, got {features.dtype}.")
  n = features.shape[0]
  _validate.static_count("k", k)
  if k >= n:
    raise ValueError(
      f"k must be less than the number of examples, n = {n}, got {k}: an"
      " example is not its own neighbor."
    )
  _validate.choice("metric", metric, METRICS)
  _validate.static_count("block_size", block_size)
  distances, indices, _ = _search.search(
    features, k=k, metric=metric, block_size=block_size
  )
  return uniform(indices, distances)


def uniform(indices: _types.Array, distances: _types.Array) -> _types.Neighbors:
  """Neighbors that weigh alike, one over k each; empty places weigh nothing."""
  weights = jnp.full_like(distances, 1 / indices.shape[1])
  weights = jnp.where(indices >= 0, weights, jnp.zeros_like(weights))
  return _types.Neighbors(indices, distances, weights)


def sample_neighbors(
  key: _types.Array, neighbors: _types.Neighbors, k: int
) -> _types.Neighbors:
  """Draws k of each example's K neighbors at random, without replacement.

  Weights are multiplied by K / k, so that the sum over the drawn ones has the
  expectation of the sum over all; uniform weights stay uniform.

  Args:
    key: a key of ``jax.random``; the same key draws the same neighbors.
    neighbors: ``Neighbors`` with arrays of ``[n, K]``.
    k: how many, in [1, K]; a static Python integer.

  Returns:
    ``Neighbors`` with arrays of ``[n, k]``, in the order they had.

  Guarantees:
    * The expectation of the weights is kept (``test_sampling_keeps_the_sum``).

  Raises:
    ValueError: for k outside [1, K].
    TypeError: for k that is not a Python integer.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> neighbors = ranger.nearest_neighbors(jnp.eye(5), k=4)
    >>> drawn = ranger.sample_neighbors(jax.random.key(0), neighbors, k=2)
    >>> print(drawn.indices.shape, drawn.weights[0])
    (5, 2) [0.5 0.5]
  """
  indices = jnp.asarray(neighbors.indices)
  total = indices.shape[1]
  _validate.static_count("k", k)
  if k > total:
    raise ValueError(f"k must be at most the {total} neighbors given, got {k}.")
  draws = jax.random.uniform(key, indices.shape)
  _, places = jax.lax.top_k(draws, k)
  places = jnp.sort(places, axis=1)
  take = lambda array: jnp.take_along_axis(jnp.asarray(array), places, axis=1)
  indices, distances, weights = map(take, neighbors)
  return _types.Neighbors(indices, distances, weights * (total / k))


def weigh_neighbors(
  neighbors: _types.Neighbors,
  *,
  kernel: str = "uniform",
  bandwidth: Any = None,
  labels: _types.ArrayLike | None = None,
  beliefs: _types.ArrayLike | None = None,
) -> _types.Neighbors:
  r"""Weighs neighbors by their distance and by how far they agree.

  .. math:: w_{ij} = \tfrac1k \, K(d_{ij} / h) \, \mathrm{agreement}_{ij}

  Rows are not normalized: an example that nobody agrees with really loses its
  weight. That helps against wrong labels and hurts where neighbors rightly
  differ.

  Args:
    neighbors: ``Neighbors`` with arrays of ``[n, k]``; its weights are replaced.
    kernel: ``"uniform"``: 1; ``"inverse_distance"``: 1 / (1 + d / h);
      ``"gaussian"``: exp(-(d / h)^2 / 2).
    bandwidth: h, positive, in the unit of the distances; None for the mean
      distance. It does nothing with ``"uniform"``.
    labels: ``int [n]``; neighbors agree when their labels are equal.
    beliefs: ``float [n, C]``, probabilities of each example's class (a row of
      zeros is no belief). Alone: agreement is :math:`\langle b_i, b_j \rangle`.
      With labels too: :math:`b_j(y_i) \, b_i(y_j)`, how far each believes in
      the other's label.

  Returns:
    ``Neighbors`` with new weights, not negative, at most ``1 / k`` where
    beliefs are at most 1; empty places keep weight 0.

  Guarantees:
    * Weights are in [0, 1 / k] (``test_weights_are_bounded``).
    * An example that nobody agrees with has no weight
      (``test_disagreement_takes_weight``).

  Raises:
    ValueError: for another kernel, a bandwidth that is not positive, labels or
      beliefs of another length.
    TypeError: for labels that are not integers.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> points = jnp.array([[0.0], [1.0], [2.0]])
    >>> neighbors = ranger.nearest_neighbors(points, k=2)
    >>> weighed = ranger.weigh_neighbors(neighbors, labels=jnp.array([7, 7, 3]))
    >>> print(weighed.weights)
    [[0.5 0. ]
     [0.5 0. ]
     [0.  0. ]]
  """
  _validate.choice("kernel", kernel, _KERNELS)
  places, filled = _filled(neighbors.indices)
  k, distances = places.shape[1], jnp.asarray(neighbors.distances)
  distances = jnp.where(filled, distances, jnp.zeros_like(distances))
  if bandwidth is None:
    places_filled = filled.sum().astype(distances.dtype)
    bandwidth = _numerics.divide(distances.sum(), places_filled)
  else:
    _validate.in_range("bandwidth", bandwidth, 0, float("inf"), open_low=True)
  bandwidth = _numerics.scalar(bandwidth, distances.dtype)
  scaled = _numerics.divide(distances, bandwidth)
  if kernel == "inverse_distance":
    weights = 1 / (1 + scaled)
  elif kernel == "gaussian":
    weights = jnp.exp(-scaled * scaled / 2)
  else:
    weights = jnp.ones_like(scaled)
  weights = weights / k * _agreement(places, labels, beliefs, weights.dtype)
  usable = jnp.logical_and(filled, jnp.isfinite(weights))
  return neighbors._replace(weights=jnp.where(usable, weights, jnp.zeros_like(weights)))


def label_support(
  neighbors: _types.Neighbors, labels: _types.ArrayLike
) -> _types.Array:
  r"""Tells how far each example's neighborhood backs its label.

  .. math::
    \mathrm{support}_i = \sum_j w_{ij} [y_{N(i, j)} = y_i] \, / \, \sum_j w_{ij}

  Low support marks suspicious labels: sort by it.

  Args:
    neighbors: ``Neighbors`` with arrays of ``[n, k]``.
    labels: ``int [n]``.

  Returns:
    ``float [n]`` in [0, 1]; 0 where an example has no neighbors.

  Raises:
    ValueError: for labels of another length.
    TypeError: for labels that are not integers.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> points = jnp.array([[0.0], [1.0], [2.0]])
    >>> neighbors = ranger.nearest_neighbors(points, k=2)
    >>> print(ranger.label_support(neighbors, jnp.array([7, 7, 3])))
    [0.5 0.5 0. ]
  """
  n, dtype = len(neighbors.indices), jnp.result_type(neighbors.weights)
  places, weights = usable(neighbors, n, dtype)
  same = _agreement(places, labels, None, weights.dtype)
  return _numerics.divide((weights * same).sum(axis=1), weights.sum(axis=1))


def usable(
  neighbors: _types.Neighbors, n: int, dtype: Any
) -> tuple[_types.Array, _types.Array]:
  """Indices within range, and weights: zero in empty places and where they are bad."""
  indices, weights = jnp.asarray(neighbors.indices), jnp.asarray(neighbors.weights)
  _validate.integers("neighbors.indices", indices)
  if indices.ndim != 2 or indices.shape[0] != n:
    raise ValueError(
      f"neighbors.indices must have shape [{n}, k], one row for each of the"
      f" {n} examples, got {list(indices.shape)}."
    )
  _validate.shape("neighbors.weights", weights, indices.shape)
  places, filled = _filled(indices)
  weights = weights.astype(dtype)
  # Both comparisons are False for NaN.
  positive = jnp.logical_and(weights > 0, weights < jnp.inf)
  used = jnp.logical_and(positive, filled)
  return places, jnp.where(used, weights, jnp.zeros_like(weights))


def add_neighbors(
  start: _types.Array, rows: _types.Array, places: _types.Array, weights: _types.Array
) -> _types.Array:
  """Adds to `start` the weighted rows ``[n, ...]`` of each example's neighbors.

  One neighbor at a time, so that memory does not grow with k.
  """

  def add(total, column):
    place, weight = column
    weight = _numerics.per_row(weight, rows).astype(rows.dtype)
    return total + weight * _numerics.take_rows(rows, place), None

  return jax.lax.scan(add, start, (places.T, weights.T))[0]


def _filled(indices: _types.ArrayLike) -> tuple[_types.Array, _types.Array]:
  """Indices with empty places at 0, and which places are filled."""
  indices = jnp.asarray(indices).astype(jnp.int32)
  filled = jnp.logical_and(indices >= 0, indices < indices.shape[0])
  return jnp.where(filled, indices, jnp.zeros_like(indices)), filled


def _agreement(
  places: _types.Array, labels: Any, beliefs: Any, dtype: Any
) -> _types.Array:
  """How far each example and each of its neighbors agree, [n, k]."""
  n = places.shape[0]
  if labels is not None:
    labels = jnp.asarray(labels)
    _validate.integers("labels", labels)
    _validate.shape("labels", labels, (n,))
  if beliefs is not None:
    beliefs = jnp.asarray(beliefs)
    if beliefs.ndim != 2 or beliefs.shape[0] != n:
      raise ValueError(f"beliefs must have shape [{n}, C], got {list(beliefs.shape)}.")
    beliefs = beliefs.astype(dtype)

  if labels is None and beliefs is None:
    return jnp.ones(places.shape, dtype)

  def agree(places, labels, beliefs):
    def one_place(column):
      if beliefs is None:
        return (labels == labels[column]).astype(dtype)
      if labels is None:
        return (beliefs * beliefs[column]).sum(axis=1)
      own = jnp.take_along_axis(beliefs, labels[column][:, None], axis=1)
      other = jnp.take_along_axis(beliefs[column], labels[:, None], axis=1)
      return (own * other)[:, 0]

    # One place at a time: [n, k, C] would be k times the table of beliefs.
    return jax.lax.map(one_place, places.T).T

  on = _numerics.first_sharded(places, labels, beliefs)
  return _numerics.automatic(agree, on, on)(places, labels, beliefs)


class WeightReport(NamedTuple):
  r"""How evenly weights are spread over examples.

  Attributes:
    effective_sample_size: as many examples of equal weight would average as
      well: :math:`(\sum w)^2 / \sum w^2`, in [1, n]; 0 when all are zero.
    top_share: the share of the weight that the 1 % heaviest have, at least one
      example: hubs, that many others have as their neighbor.
    zero_share: the share of examples that have no weight.
  """

  effective_sample_size: _types.Array
  top_share: _types.Array
  zero_share: _types.Array


def weight_report(weights: _types.ArrayLike) -> WeightReport:
  r"""Tells how evenly weights are spread: what averaging loses, and hubs.

  Args:
    weights: ``float [n]``, not negative; those of ``example_weights``, say.

  Returns:
    ``WeightReport(effective_sample_size, top_share, zero_share)``, scalars.

  Guarantees:
    * Uniform weights have n effective examples, and one example with all the
      weight has one (``test_weight_report_limits``).

  Raises:
    ValueError: for weights that are not ``[n]``.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> report = ranger.weight_report(jnp.array([1.0, 1.0, 0.0, 2.0]))
    >>> print(*(round(float(number), 3) for number in report))
    2.667 0.5 0.25
  """
  weights = jnp.asarray(weights)
  if weights.ndim != 1 or not weights.shape[0]:
    raise ValueError(f"weights must have shape [n], got {list(weights.shape)}.")
  weights = weights.astype(_numerics.wide(weights.dtype))
  # Around one, so that squares stay in range.
  weights = _numerics.divide(weights, weights.max())
  total = weights.sum()
  heaviest, _ = jax.lax.top_k(weights, -(-weights.shape[0] // 100))
  return WeightReport(
    _numerics.divide(total * total, (weights * weights).sum()),
    _numerics.divide(heaviest.sum(), total),
    (weights == 0).mean(dtype=weights.dtype),
  )

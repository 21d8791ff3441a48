"""Neighbor weights from distances, labels and beliefs, and a report on weights."""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ranger._core import labels as _labels
from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.sharding import automatic
from optax_ranger._core.sharding import first_sharded
from optax_ranger._core.sharding import per_row
from optax_ranger._core.sharding import take_rows
from optax_ranger._core.types import Array
from optax_ranger._core.types import ArrayLike
from optax_ranger._core.types import Neighbors
from optax_ranger._core.types import Scalar

_KERNELS = ("uniform", "inverse_distance", "gaussian")


def weigh(
  neighbors: Neighbors,
  *,
  kernel: str = "uniform",
  bandwidth: Scalar | None = None,
  labels: ArrayLike | None = None,
  beliefs: ArrayLike | None = None,
) -> Neighbors:
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
    labels: ``[n]``, integers or names, of NumPy, JAX, pandas or Arrow, or a list;
      neighbors agree when their labels are equal. An example without a label (-1
      or a missing value) agrees with nobody, and has weight zero.
    beliefs: ``float [n, C]``, probabilities of each example's class (a row of
      zeros is no belief). Alone: agreement is :math:`\langle b_i, b_j \rangle`.
      With labels too: :math:`b_j(y_i) \, b_i(y_j)`, how far each believes in
      the other's label; a label that is not in [0, C) is none.

  Returns:
    ``Neighbors`` with new weights, not negative, at most ``1 / k`` where
    beliefs are at most 1; empty places keep weight 0.

  Guarantees:
    * Weights are in [0, 1 / k].
    * An example whose neighbors all disagree with it has no weight.
    * It compiles itself, once for each shape.

  Raises:
    ValueError: for another kernel, a bandwidth that is not positive, labels or
      beliefs of another length, labels below -1 and, with beliefs, labels that
      do not fit int32, where they are known.
    TypeError: for labels that are neither integers nor names.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> points = jnp.array([[0.0], [1.0], [2.0]])
    >>> neighbors = ranger.neighbors.nearest(points, k=2)
    >>> weighed = ranger.neighbors.weigh(neighbors, labels=jnp.array([7, 7, 3]))
    >>> print(weighed.weights)
    [[0.5 0. ]
     [0.5 0. ]
     [0.  0. ]]
  """
  validate.choice("kernel", kernel, _KERNELS)
  if bandwidth is not None:
    validate.in_range("bandwidth", bandwidth, 0, float("inf"), open_low=True)
  indices = _labels.fit("neighbors.indices", neighbors.indices)
  if labels is not None:
    # With beliefs, a label names a column; alone, it is compared only.
    alone = beliefs is None
    labels = _labels.read("labels", labels, indices.shape[0], compared=alone).ids
  if beliefs is not None:
    beliefs = jnp.asarray(beliefs)
    if beliefs.ndim != 2 or beliefs.shape[0] != indices.shape[0]:
      raise ValueError(
        f"beliefs must have shape [{indices.shape[0]}, C], got {list(beliefs.shape)}."
      )
  weights = _weights(indices, neighbors.distances, bandwidth, labels, beliefs, kernel)
  return neighbors._replace(weights=weights)


# Compiled whole: loops would be compiled anew at each call outside of jit.
@functools.partial(jax.jit, static_argnames="kernel", inline=True)
def _weights(
  indices: Array,
  distances: ArrayLike,
  bandwidth: Any,
  labels: Array | None,
  beliefs: Array | None,
  kernel: str,
) -> Array:
  """The weights of checked arguments, [n, k]."""
  places, filled = _filled(indices)
  k, distances = places.shape[1], jnp.asarray(distances)
  distances = jnp.where(filled, distances, jnp.zeros_like(distances))
  if bandwidth is None:
    places_filled = filled.sum().astype(distances.dtype)
    bandwidth = numerics.divide(distances.sum(), places_filled)
  bandwidth = numerics.scalar(bandwidth, distances.dtype)
  scaled = numerics.divide(distances, bandwidth)
  if kernel == "inverse_distance":
    weights = 1 / (1 + scaled)
  elif kernel == "gaussian":
    weights = jnp.exp(-scaled * scaled / 2)
  else:
    weights = jnp.ones_like(scaled)
  weights = weights / k * agreement(places, labels, beliefs, weights.dtype)
  usable = jnp.logical_and(filled, jnp.isfinite(weights))
  return jnp.where(usable, weights, jnp.zeros_like(weights))


def usable(neighbors: Neighbors, n: int, dtype: Any) -> tuple[Array, Array]:
  """Indices within range, and weights: zero in empty places and where they are bad."""
  indices = _labels.fit("neighbors.indices", neighbors.indices)
  weights = jnp.asarray(neighbors.weights)
  if indices.ndim != 2 or indices.shape[0] != n:
    raise ValueError(
      f"neighbors.indices must have shape [{n}, k], one row for each of the"
      f" {n} examples, got {list(indices.shape)}."
    )
  validate.shape("neighbors.weights", weights, indices.shape)
  places, filled = _filled(indices)
  weights = weights.astype(dtype)
  # Both comparisons are False for NaN.
  positive = jnp.logical_and(weights > 0, weights < jnp.inf)
  used = jnp.logical_and(positive, filled)
  return places, jnp.where(used, weights, jnp.zeros_like(weights))


@functools.partial(jax.jit, inline=True)
def add_neighbors(start: Array, rows: Array, places: Array, weights: Array) -> Array:
  """Adds to `start` the weighted rows ``[n, ...]`` of each example's neighbors.

  One neighbor at a time, so that memory does not grow with k.
  """

  def add(total, column):
    place, weight = column
    weight = per_row(weight, rows).astype(rows.dtype)
    return total + weight * take_rows(rows, place), None

  return jax.lax.scan(add, start, (places.T, weights.T))[0]


def _filled(indices: Array) -> tuple[Array, Array]:
  """Indices with empty places at 0, and which places are filled."""
  filled = jnp.logical_and(indices >= 0, indices < indices.shape[0])
  return jnp.where(filled, indices, jnp.zeros_like(indices)), filled


def agreement(
  places: Array, labels: ArrayLike | None, beliefs: ArrayLike | None, dtype: Any
) -> Array:
  """How far each example and each of its neighbors agree, [n, k].

  An example without a label (-1, or one that beliefs have no column for) agrees
  with nobody.
  """
  if labels is None and beliefs is None:
    return jnp.ones(places.shape, dtype)
  labels = None if labels is None else jnp.asarray(labels)
  beliefs = None if beliefs is None else jnp.asarray(beliefs).astype(dtype)

  def agree(places, labels, beliefs):
    def one_place(column):
      if beliefs is None:
        same = jnp.logical_and(labels == labels[column], labels >= 0)
        return same.astype(dtype)
      if labels is None:
        return (beliefs * beliefs[column]).sum(axis=1)
      return _at(beliefs, labels[column]) * _at(beliefs[column], labels)

    # One place at a time: [n, k, C] would be k times the table of beliefs.
    return jax.lax.map(one_place, places.T).T

  on = first_sharded(places, labels, beliefs)
  return automatic(agree, on, on)(places, labels, beliefs)


def _at(rows: Array, columns: Array) -> Array:
  """One entry of each row; zero where there is no such column."""
  exists = jnp.logical_and(columns >= 0, columns < rows.shape[1])
  columns = jnp.where(exists, columns, jnp.zeros_like(columns))
  entries = jnp.take_along_axis(rows, columns[:, None], axis=1)[:, 0]
  return jnp.where(exists, entries, jnp.zeros_like(entries))


class WeightReport(NamedTuple):
  r"""How evenly weights are spread over examples.

  Attributes:
    effective_sample_size: as many examples of equal weight would average as
      well: :math:`(\sum w)^2 / \sum w^2`, in [1, n]; 0 when all are zero.
    top_share: the share of the weight that the 1 % heaviest have, at least one
      example: hubs, that many others have as their neighbor.
    zero_share: the share of examples that have no weight.
  """

  effective_sample_size: Array
  top_share: Array
  zero_share: Array


def weight_report(weights: ArrayLike) -> WeightReport:
  r"""Tells how evenly weights are spread: what averaging loses, and hubs.

  Args:
    weights: ``float [n]``, not negative; those of ``example_weights``, say.

  Returns:
    ``WeightReport(effective_sample_size, top_share, zero_share)``, scalars.

  Guarantees:
    * Uniform weights have n effective examples, and one example with all the weight has
      one.

  Raises:
    ValueError: for weights that are not ``[n]``.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> report = ranger.neighbors.weight_report(jnp.array([1.0, 1.0, 0.0, 2.0]))
    >>> print(*(round(float(number), 3) for number in report))
    2.667 0.5 0.25
  """
  weights = jnp.asarray(weights)
  if weights.ndim != 1 or not weights.shape[0]:
    raise ValueError(f"weights must have shape [n], got {list(weights.shape)}.")
  weights = weights.astype(numerics.wide(weights.dtype))
  # Around one, so that squares stay in range.
  weights = numerics.divide(weights, weights.max())
  total = weights.sum()
  heaviest, _ = jax.lax.top_k(weights, -(-weights.shape[0] // 100))
  return WeightReport(
    numerics.divide(total * total, (weights * weights).sum()),
    numerics.divide(heaviest.sum(), total),
    (weights == 0).mean(dtype=weights.dtype),
  )

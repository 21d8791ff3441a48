"""Label support: the share of the neighborhood that has the same label."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from optax_ranger._core import labels as _labels
from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.sharding import automatic
from optax_ranger._core.sharding import first_sharded
from optax_ranger._core.types import Array
from optax_ranger._core.types import Neighbors
from optax_ranger.labels import _rows
from optax_ranger.neighbors import _weights


def label_support(neighbors: Neighbors, labels: Any) -> Array:
  r"""Tells how far each example's neighborhood backs its label.

  .. math::
    \mathrm{support}_i = \sum_j w_{ij} [y_{N(i, j)} = y_i] \, / \, \sum_j w_{ij}

  Low support marks suspicious labels: sort by it. A neighbor without a label has
  no vote: it is in neither sum.

  Of soft labels r, such as the shares of the votes of several raters, it is the
  part that the mean of the neighbors covers (one minus the total variation), and the
  same for one-hot rows. So raters who disagree as the neighbors' raters do are
  backed.

  .. math::
    \mathrm{support}_i = \sum_y \min \Big( r_i(y), \;
    \sum_j w_{ij} r_{N(i, j)}(y) \, / \, \sum_j w_{ij} \Big)

  Args:
    neighbors: ``Neighbors`` with arrays of ``[n, k]``.
    labels: ``[n]``, integers or names, of NumPy, JAX, pandas or Arrow, or a list.
      -1 and missing values stand for no label. Or soft labels, ``float [n, C]``, as
      in ``forward_corrected_loss``.

  Returns:
    ``float [n]`` in [0, 1]; 0 where an example has no label, or no neighbor that
    has one.

  Guarantees:
    * Neighbors without a label do not lower it.
    * One-hot rows are integers, and soft labels like their neighbors' mean have support
      one.

  Raises:
    ValueError: for labels of another length, or below -1 where they are known, and
      soft labels that don't sum to 1.
    TypeError: for labels that are neither integers nor names.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> points = jnp.array([[0.0], [1.0], [2.0]])
    >>> neighbors = ranger.neighbors.nearest(points, k=2)
    >>> print(ranger.labels.label_support(neighbors, jnp.array([7, 7, 3])))
    [0.5 0.5 0. ]
  """
  n, dtype = len(neighbors.indices), jnp.result_type(neighbors.weights)
  if _rows.is_soft(labels, 1):
    rows = _rows.soft(labels).astype(dtype)
    validate.shape("labels", rows, (n, rows.shape[1]))
    return _overlap(*_weights.usable(neighbors, n, dtype), rows)
  ids = jnp.asarray(_labels.read("labels", labels, n, compared=True).ids)
  return _support(*_weights.usable(neighbors, n, dtype), ids)


@functools.partial(jax.jit, inline=True)
def _support(places: Array, weights: Array, labels: Array) -> Array:
  same = _weights.agreement(places, labels, None, weights.dtype)
  on = first_sharded(places, labels)
  votes = automatic(lambda places, labels: labels[places] >= 0, on, on)(places, labels)
  weights = jnp.where(votes, weights, jnp.zeros_like(weights))
  return numerics.divide((weights * same).sum(axis=1), weights.sum(axis=1))


@functools.partial(jax.jit, inline=True)
def _overlap(places: Array, weights: Array, rows: Array) -> Array:
  on = first_sharded(rows, places)
  add = automatic(_weights.add_neighbors, on, on)
  # Of rows that sum to one or to zero, so neighbors without a label don't vote.
  total = add(jnp.zeros_like(rows), rows, places, numerics.to_peak(weights))
  return jnp.minimum(rows, _rows.normalized(total)).sum(axis=1)

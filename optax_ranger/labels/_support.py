"""Label support: the share of the neighborhood that has the same label."""

import jax.numpy as jnp

from optax_ranger._core import numerics
from optax_ranger._core.types import Array
from optax_ranger._core.types import ArrayLike
from optax_ranger._core.types import Neighbors
from optax_ranger.neighbors import _weights


def label_support(neighbors: Neighbors, labels: ArrayLike) -> Array:
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
    >>> neighbors = ranger.neighbors.nearest(points, k=2)
    >>> print(ranger.labels.label_support(neighbors, jnp.array([7, 7, 3])))
    [0.5 0.5 0. ]
  """
  n, dtype = len(neighbors.indices), jnp.result_type(neighbors.weights)
  places, weights = _weights.usable(neighbors, n, dtype)
  same = _weights.agreement(places, labels, None, weights.dtype)
  return numerics.divide((weights * same).sum(axis=1), weights.sum(axis=1))

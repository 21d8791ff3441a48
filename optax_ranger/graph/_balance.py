"""Weights that don't depend on how common a class is."""

from typing import Any

import jax.numpy as jnp

from optax_ranger._core import labels as _labels
from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.types import Neighbors


def balance_classes(neighbors: Neighbors, labels: Any, num_classes: int) -> Neighbors:
  r"""Gives every class the same mean weight, whatever share of the data it has.

  A rare class has fewer neighbors of its own, even where all labels are right,
  so that agreement takes more of its weight than of a common one's. Apply it to
  what ``neighbors.weigh`` returns. It hurts where a class is rightly distrusted.

  .. math::
    w_{ij} \leftarrow w_{ij} \, \bar s \, / \, \bar s_{y_i}, \qquad
    s_i = \textstyle\sum_j w_{ij}

  Args:
    neighbors: ``[n, k]``, weighed.
    labels: ``[n]``, integers in [0, num_classes) or names, of NumPy, JAX, pandas or
      Arrow, or a list. Examples without a label (-1 or a missing value) keep their
      weights, and count for no mean.
    num_classes: a static Python integer.

  Returns:
    ``Neighbors`` in which each class that has any weight has the mean total weight
    that labeled examples had before.

  Guarantees:
    * The mean total weight is the same for all classes.
    * Examples without a label change nothing.

  Raises:
    ValueError: for labels of another length and, where they are known, for labels
      outside [-1, num_classes).
    TypeError: for labels that are neither integers nor names.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from optax_ranger import graph
    >>> neighbors = graph.build(jnp.array([[0.0], [1.0], [3.0]]), 1, backend="jax")
    >>> weighed = neighbors._replace(weights=jnp.array([[1.0], [1.0], [0.25]]))
    >>> balance = jax.jit(graph.balance_classes, static_argnums=2)
    >>> print(balance(weighed, jnp.array([0, 0, 1]), 2).weights.tolist())
    [[0.75], [0.75], [0.75]]
  """
  validate.static_count("num_classes", num_classes)
  weights = jnp.asarray(neighbors.weights)
  ids = _labels.read("labels", labels, weights.shape[0], num_classes=num_classes).ids
  ids = jnp.asarray(ids)
  labeled = jnp.logical_and(ids >= 0, ids < num_classes)
  # Past the end, where additions are dropped; -1 would count from there.
  ids = jnp.where(labeled, ids, num_classes)
  total = weights.sum(axis=1)
  zeros = jnp.zeros([num_classes], total.dtype)
  count = zeros.at[ids].add(jnp.ones_like(total), mode="drop")
  sums = zeros.at[ids].add(total, mode="drop")
  mean = numerics.divide(sums, count)
  overall = numerics.divide(sums.sum(), count.sum())
  factor = numerics.divide(jnp.full_like(mean, overall), mean)
  factor = factor.at[ids].get(mode="fill", fill_value=1)
  return neighbors._replace(weights=weights * factor[:, None])

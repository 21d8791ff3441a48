"""Weights that don't depend on how common a class is."""

import jax.numpy as jnp

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.types import ArrayLike
from optax_ranger._core.types import Neighbors


def balance_classes(
  neighbors: Neighbors, labels: ArrayLike, num_classes: int
) -> Neighbors:
  r"""Gives every class the same mean weight, whatever share of the data it has.

  A rare class has fewer neighbors of its own, even where all labels are right,
  so that agreement takes more of its weight than of a common one's. Apply it to
  what ``neighbors.weigh`` returns. It hurts where a class is rightly distrusted.

  .. math::
    w_{ij} \leftarrow w_{ij} \, \bar s \, / \, \bar s_{y_i}, \qquad
    s_i = \textstyle\sum_j w_{ij}

  Args:
    neighbors: ``[n, k]``, weighed.
    labels: ``int [n]`` in [0, num_classes).
    num_classes: a static Python integer.

  Returns:
    ``Neighbors`` whose mean total weight, of all examples and of each class that
    has any, is that of before.

  Guarantees:
    * Classes have one mean total weight (``test_balanced_classes_weigh_alike``).

  Raises:
    ValueError: for labels of another length.
    TypeError: for labels that are not integers.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ranger import graph
    >>> neighbors = graph.build(jnp.array([[0.0], [1.0], [3.0]]), 1, backend="jax")
    >>> weighed = neighbors._replace(weights=jnp.array([[1.0], [1.0], [0.25]]))
    >>> print(graph.balance_classes(weighed, jnp.array([0, 0, 1]), 2).weights[:, 0])
    [0.75 0.75 0.75]
  """
  validate.static_count("num_classes", num_classes)
  labels, weights = jnp.asarray(labels), jnp.asarray(neighbors.weights)
  validate.integers("labels", labels)
  validate.shape("labels", labels, weights.shape[:1])
  total = weights.sum(axis=1)
  zeros = jnp.zeros([num_classes], total.dtype)
  count = zeros.at[labels].add(jnp.ones_like(total))
  mean = numerics.divide(zeros.at[labels].add(total), count)
  factor = numerics.divide(jnp.full_like(mean, total.mean()), mean)
  return neighbors._replace(weights=weights * factor[labels][:, None])

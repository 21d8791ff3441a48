"""The k nearest neighbors of each example, and a random choice among neighbors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import labels as _labels
from optax_ranger._core import validate
from optax_ranger._core.types import Array
from optax_ranger._core.types import ArrayLike
from optax_ranger._core.types import Neighbors
from optax_ranger.neighbors import _double
from optax_ranger.neighbors import _search

METRICS = ("euclidean", "cosine")


def nearest(
  features: ArrayLike,
  k: int,
  *,
  metric: str = "euclidean",
  block_size: int = 1024,
) -> Neighbors:
  r"""Finds the k nearest other examples of each example, by trying them all.

  Tiles of products tell which may be near, and those are measured, nearest first;
  ties go to the lower index. An example that rounding leaves in doubt is measured
  against all others, which is slow where clusters lie thousands of radii apart
  (``optax_ranger.graph.build`` does that faster, and equal rows once). Differences
  below 1e-19 of the largest feature count as none. An example whose features are
  not finite in float32 has no neighbors and is nobody's neighbor.

  64-bit numbers of NumPy are shifted in their own type before they are rounded to
  float32. Where that loses digits, the neighbors that it finds are measured again
  on the host in float64, and examples that it cannot tell are compared with all
  others there. Under ``jax.jit`` there is no host: they are shifted and rounded.

  .. math::
    d_{ij} = \lVert x_i - x_j \rVert_2 \quad (\text{"euclidean"}), \qquad
    d_{ij} = 1 - \frac{\langle x_i, x_j \rangle}{\lVert x_i \rVert \lVert x_j \rVert}
    \quad (\text{"cosine"})

  Args:
    features: ``[n, d]``, of any real type. Arrays of JAX are computed in float32, or
      in float64 where they are that.
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
    * The same neighbors as a full sort, for clusters far apart and at any scale too.
    * Ties go to the lower index.
    * Memory does not grow with n squared.

  Raises:
    ValueError: for features that are not 2-D, k outside [1, n - 1], another
      metric.
    TypeError: for complex features, k that is not a Python integer.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> points = jnp.array([[0.0], [1.0], [3.0]])
    >>> neighbors = ranger.neighbors.nearest(points, k=2)
    >>> print(neighbors.indices.tolist(), neighbors.distances.tolist())
    [[1, 2], [0, 2], [1, 0]] [[1.0, 3.0], [1.0, 2.0], [2.0, 3.0]]
  """
  if jnp.ndim(features) != 2 or not jnp.shape(features)[1]:
    raise ValueError(
      "features must have shape [n, d], d at least 1, got"
      f" {list(jnp.shape(features))}; flatten each example first."
    )
  if not isinstance(features, jax.Array):
    features = np.asarray(features)
  if jnp.issubdtype(features.dtype, jnp.complexfloating):
    raise TypeError(f"features must be real, got {features.dtype}.")
  n = features.shape[0]
  validate.static_count("k", k)
  if k >= n:
    raise ValueError(
      f"k must be less than the number of examples, n = {n}, got {k}: an"
      " example is not its own neighbor."
    )
  validate.choice("metric", metric, METRICS)
  validate.static_count("block_size", block_size)
  features, own = _double.narrow(features, metric)
  # Where float32 does not hold the features, more candidates are measured again.
  more = k if own is None else min(k + _double.SPARE, n - 1)
  distances, indices, sure = _search.search(
    jnp.asarray(features), k=more, metric=metric, block_size=block_size
  )
  if own is not None and validate.is_known(indices):
    found = np.asarray(distances), np.asarray(indices), np.asarray(sure)
    distances, indices, _ = _double.settle(own, own, np.arange(n), found, k, metric)
  return uniform(jnp.asarray(indices[:, :k]), jnp.asarray(distances[:, :k]))


@functools.partial(jax.jit, inline=True)
def uniform(indices: Array, distances: Array) -> Neighbors:
  """Neighbors that weigh alike, one over k each; empty places weigh nothing."""
  weights = jnp.full_like(distances, 1 / indices.shape[1])
  weights = jnp.where(indices >= 0, weights, jnp.zeros_like(weights))
  return Neighbors(indices, distances, weights)


def sample(key: Array, neighbors: Neighbors, k: int) -> Neighbors:
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
    * The expectation of the weights is kept.

  Raises:
    ValueError: for k outside [1, K].
    TypeError: for k that is not a Python integer.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> neighbors = ranger.neighbors.nearest(jnp.eye(5), k=4)
    >>> draw = jax.jit(ranger.neighbors.sample, static_argnames="k")
    >>> drawn = draw(jax.random.key(0), neighbors, k=2)
    >>> print(drawn.indices.shape, drawn.weights[0])
    (5, 2) [0.5 0.5]
  """
  indices = _labels.fit("neighbors.indices", neighbors.indices)
  total = indices.shape[1]
  validate.static_count("k", k)
  if k > total:
    raise ValueError(f"k must be at most the {total} neighbors given, got {k}.")
  draws = jax.random.uniform(key, indices.shape)
  _, places = jax.lax.top_k(draws, k)
  places = jnp.sort(places, axis=1)
  take = lambda array: jnp.take_along_axis(jnp.asarray(array), places, axis=1)
  indices, distances, weights = map(take, (indices, *neighbors[1:]))
  return Neighbors(indices, distances, weights * (total / k))

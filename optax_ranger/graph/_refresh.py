"""Graphs in the space that the model learns, refreshed while it learns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import progress as _progress
from optax_ranger._core import validate
from optax_ranger._core.types import Array
from optax_ranger._core.types import Neighbors
from optax_ranger._core.types import PyTree
from optax_ranger.graph import _build


def embed(
  features_of: Callable[[PyTree, Any], Array],
  params: PyTree,
  data: PyTree,
  *,
  batch_size: int = 1024,
  progress: bool = True,
) -> np.ndarray:
  """Computes the features of all examples in batches of one shape.

  Args:
    features_of: ``features_of(params, batch)`` gives ``[batch_size, d]``. Pass
      the same function every time, and it is compiled once.
    params: for example ``eval_params(state, params)``, the smoothed ones.
    data: a tree of arrays ``[n, ...]``; batches are cut from it on the host.
    batch_size: how many at a time; the last batch is filled up.
    progress: a bar on what takes more than two seconds.

  Returns:
    ``[n, d]``, on the host.

  Examples:
    >>> import numpy as np
    >>> from optax_ranger import graph
    >>> double = lambda params, batch: params * batch
    >>> print(graph.embed(double, 2.0, np.ones([3, 1]), batch_size=2)[:, 0])
    [2. 2. 2.]
  """
  validate.static_count("batch_size", batch_size)
  n = validate.leading_axis("data", data)
  if not n:
    raise ValueError("data must have at least one array of at least one example.")
  compiled = jax.jit(features_of)
  parts = []
  for start in _progress.bar(range(0, n, batch_size), "features", progress):
    places = np.minimum(np.arange(start, start + batch_size), n - 1)
    batch = jax.tree.map(lambda leaf, at=places: leaf[at], data)
    parts.append(np.asarray(compiled(params, batch)))
  return np.concatenate(parts)[:n]


def refresh(
  features_of: Callable[[PyTree, Any], Array],
  params: PyTree,
  data: PyTree,
  previous: Neighbors,
  *,
  weigh: Callable[[Neighbors], Neighbors] | None = None,
  batch_size: int = 1024,
  progress: bool = True,
  **options: Any,
) -> Neighbors:
  """Rebuilds a graph from the model's own features, for the same compiled step.

  Neighbors in pixels find labels that were flipped at random, but not those of
  classes that look alike; the model's features, once it has learned something,
  are better, and get better. It hurts when the model has begun to memorize
  wrong labels: use smoothed parameters.

  What it costs: one forward pass over the data, and one ``build``, for which
  docs/graph.md has figures; choose how often from its share of an epoch.

  Args:
    features_of: as in ``embed``; the same function every time.
    params: as in ``embed``.
    data: as in ``embed``.
    previous: the graph that it replaces; its k, shapes, types and shardings are
      kept.
    weigh: weighs the new neighbors, for example by agreement with smoothed
      predictions (``neighbors.weigh``); None for uniform weights.
    batch_size: as in ``embed``.
    progress: as in ``embed``.
    **options: of ``build``, ``metric="cosine"`` for example.

  Returns:
    ``Neighbors``, like `previous` in everything but its values.

  Guarantees:
    * A step that takes neighbors as an argument is traced once.

  Raises:
    ValueError: for data of another number of examples, and what ``build``
      refuses.

  Examples:
    >>> import numpy as np
    >>> from optax_ranger import graph
    >>> data = np.array([[0.0, 5.0], [1.0, 1.0], [3.0, 6.0]])
    >>> first = graph.build(data[:, :1], 1, backend="jax")
    >>> column = lambda params, batch: batch * params
    >>> second = graph.refresh(column, np.array([[0.0, 1.0]]), data, first)
    >>> print(first.indices.tolist(), second.indices.tolist())
    [[1], [0], [1]] [[2], [0], [0]]
  """
  n, k = previous.indices.shape
  features = embed(features_of, params, data, batch_size=batch_size, progress=progress)
  if len(features) != n:
    raise ValueError(f"data has {len(features)} examples, and previous has {n}.")
  found = _build.build(features, k, progress=progress, **options)
  if weigh is not None:
    found = weigh(found)

  def like(new: Any, old: Any) -> Any:
    new = jnp.asarray(new).astype(jnp.asarray(old).dtype)
    return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new

  return jax.tree.map(like, found, previous)

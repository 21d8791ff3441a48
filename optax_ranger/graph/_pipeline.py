"""Neighbors in the data pipeline: for a plain iterator, and for Grain."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from optax_ranger._core import validate
from optax_ranger._core.types import Neighbors


class NeighborBatches(Iterator[dict[str, np.ndarray]]):
  """Shuffled batches of ids with their neighbors, for ever; NumPy only.

  Each epoch is a new order, a function of the seed and the epoch, and each
  batch's neighbors are a function of the seed, the epoch and the batch: so a
  state is two numbers. The remainder of an epoch is left out.

  Args:
    neighbors: ``[n, k]``.
    batch_size: how many ids, in [1, n].
    k: how many neighbors are drawn for each, without replacement; their weights
      are multiplied so that sums keep their expectation. None for all.
    seed: of the order and the draws.

  Yields:
    ``{"id": [B], "neighbor_id": [B, k], "neighbor_weight": [B, k]}``; empty
    places have id -1 and weight 0.

  Guarantees:
    * Every id comes once in an epoch.
    * A pipeline that is restored from a checkpoint continues with the same batches.

  Raises:
    ValueError: for a batch size outside [1, n], k outside [1, K].

  Examples:
    >>> import numpy as np
    >>> from optax_ranger import graph
    >>> points = np.arange(6.0)[:, None]
    >>> batches = graph.NeighborBatches(graph.build(points, 2, backend="jax"), 3, k=1)
    >>> state = batches.get_state()
    >>> first = next(batches)
    >>> batches.set_state(state)
    >>> print(first["neighbor_id"].shape, (next(batches)["id"] == first["id"]).all())
    (3, 1) True
  """

  def __init__(
    self,
    neighbors: Neighbors,
    batch_size: int,
    *,
    k: int | None = None,
    seed: int = 0,
  ):
    self._draw = _Draw(neighbors, k)
    validate.static_count("batch_size", batch_size)
    self._n = len(neighbors.indices)
    if batch_size > self._n:
      raise ValueError(f"batch_size must be at most n = {self._n}, got {batch_size}.")
    self._size, self._seed = batch_size, seed
    self._epoch = self._batch = 0
    self._order: tuple[int, np.ndarray] | None = None

  def __next__(self) -> dict[str, np.ndarray]:
    if (self._batch + 1) * self._size > self._n:
      self._epoch, self._batch = self._epoch + 1, 0
    epoch, batch = self._epoch, self._batch
    if self._order is None or self._order[0] != epoch:
      order = np.random.default_rng([self._seed, epoch]).permutation(self._n)
      self._order = epoch, order
    ids = self._order[1][batch * self._size : (batch + 1) * self._size]
    rng = np.random.default_rng([self._seed, epoch, batch])
    self._batch += 1
    return {"id": ids, **self._draw(ids, rng)}

  def get_state(self) -> dict[str, int]:
    return {"epoch": self._epoch, "batch": self._batch, "seed": self._seed}

  def set_state(self, state: dict[str, int]) -> None:
    if state["seed"] != self._seed:
      raise ValueError(f"state['seed'] must be {self._seed}, got {state['seed']}.")
    self._epoch, self._batch = state["epoch"], state["batch"]


def add_neighbors(
  neighbors: Neighbors, *, k: int | None = None, id_key: str = "id"
) -> Any:
  """A Grain transformation that adds neighbors to elements, or batches, with ids.

  Put it behind ``shuffle``, with ``random_map``: Grain gives each element its
  own random numbers, so that checkpoints of its iterators bring back the draws.

  Args:
    neighbors: ``[n, k]``, kept on the host.
    k: how many are drawn; None for all.
    id_key: where an element, a dict, has its position among the n examples.

  Returns:
    A ``grain.transforms.RandomMap``: elements gain ``"neighbor_id"`` and
    ``"neighbor_weight"``, of the shape of the ids and one axis of k more.

  Guarantees:
    * A pipeline that is restored from a checkpoint continues with the same elements,
      shuffled or batched.

  Raises:
    ImportError: without Grain, which the extra ``grain`` installs.
    ValueError: for k outside [1, K].

  Examples:
    >>> import grain, numpy as np
    >>> from optax_ranger import graph
    >>> neighbors = graph.build(np.arange(6.0)[:, None], 2, backend="jax")
    >>> data = grain.MapDataset.range(6).seed(0).shuffle().map(lambda i: {"id": i})
    >>> data = data.batch(3).random_map(graph.add_neighbors(neighbors))
    >>> print(data[0]["neighbor_id"].shape, data[0]["neighbor_weight"][0])
    (3, 2) [0.5 0.5]
  """
  try:
    from grain import transforms
  except ImportError as error:
    raise ImportError(
      "add_neighbors needs Grain: pip install 'optax-ranger[grain]'; or use"
      " NeighborBatches."
    ) from error
  draw = _Draw(neighbors, k)

  class AddNeighbors(transforms.RandomMap):
    """Adds the neighbors of the examples that an element names."""

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
      return {**element, **draw(np.asarray(element[id_key]), rng)}

  return AddNeighbors()


class _Draw:
  """Draws k of the K neighbors of some examples, on the host."""

  def __init__(self, neighbors: Neighbors, k: int | None):
    self._indices = np.asarray(neighbors.indices)
    self._weights = np.asarray(neighbors.weights)
    total = self._indices.shape[1]
    if k is not None:
      validate.static_count("k", k)
      if k > total:
        raise ValueError(f"k must be at most the {total} neighbors given, got {k}.")
    self._k = None if k == total else k

  def __call__(
    self, ids: np.ndarray, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    indices, weights = self._indices[ids], self._weights[ids]
    if self._k is not None:
      total = indices.shape[-1]
      places = np.argsort(rng.random(indices.shape), axis=-1)[..., : self._k]
      places = np.sort(places, axis=-1)
      indices = np.take_along_axis(indices, places, axis=-1)
      weights = np.take_along_axis(weights, places, axis=-1)
      weights = weights * weights.dtype.type(total / self._k)
    return {"neighbor_id": indices, "neighbor_weight": weights}

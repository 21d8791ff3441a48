"""The exact search over a mesh: each device keeps its own rows, blocks travel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from optax_ranger._core.types import Neighbors
from optax_ranger.neighbors import _nearest
from optax_ranger.neighbors import _points
from optax_ranger.neighbors import _search

_BLOCK = 1024


def build(
  features: Any, k: int, metric: str, mesh: jax.sharding.Mesh, axis_name: str
) -> tuple[Neighbors, int]:
  """Neighbors whose arrays are split by rows, and how many rows were repaired."""
  n, size = features.shape[0], mesh.shape[axis_name]
  split = NamedSharding(mesh, PartitionSpec(axis_name))
  rows = features
  if not isinstance(rows, jax.Array) or (rows.is_fully_addressable and n % size):
    host = _padded(np.asarray(rows), -n % size)
    rows = jax.make_array_from_callback(host.shape, split, lambda index: host[index])
  elif n % size:
    raise ValueError(
      f"features of several processes must be split evenly: n = {n} rows over"
      f" {size} devices. Add rows of NaN, which are nobody's neighbors."
    )
  distances, indices, repaired = _search_of(mesh, axis_name, k, metric, n)(
    jax.device_put(rows, split)
  )
  found = _nearest.uniform(indices, distances)
  if n % size:
    # The devices can't share n rows evenly: return them to the host.
    found = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[:n]), found)
  return found, int(repaired)


@functools.lru_cache(maxsize=32)
def _search_of(
  mesh: jax.sharding.Mesh, axis_name: str, k: int, metric: str, n: int
) -> Any:
  add = functools.partial(jax.lax.psum, axis_name=axis_name)
  most = functools.partial(jax.lax.pmax, axis_name=axis_name)

  def search(features):
    rows = features.shape[0]
    queries, keys, padded = _points.sizes(rows, _BLOCK)
    points = _points.prepare(features, metric, n, padded, add=add, most=most)
    me, parts = jax.lax.axis_index(axis_name), padded // keys

    def fetch(block):
      owner, part = block // parts, block % parts
      mine = _points.cut(points, part * keys, keys)
      # A sum with zeros works on every platform. Only one collective at a time:
      # two independent ones may start in another order on another device.
      both = jnp.concatenate([mine.rows, mine.term[:, None]], axis=1)
      both = add(jnp.where(me == owner, both, jnp.zeros_like(both)))
      arrived = mine._replace(rows=both[:, :-1], term=both[:, -1])
      return arrived, owner * rows + part * keys

    over = _search.Sweep(fetch, parts * mesh.shape[axis_name], metric, n)
    ids = me * rows + jnp.arange(padded, dtype=jnp.int32)
    found = _search.look_everywhere(points, ids, over, k, queries)
    sure = _search.is_sure(found, points, n)
    found, after = _search.repair(found, sure, points, ids, over, most)
    repaired = add((after & ~sure).sum())
    distances, indices = _search.finish(found, points.scale, metric, n)
    return distances[:rows], indices[:rows], repaired

  split = PartitionSpec(axis_name)
  return jax.jit(
    jax.shard_map(
      search, mesh=mesh, in_specs=split, out_specs=(split, split, PartitionSpec())
    )
  )


def _padded(rows: np.ndarray, more: int) -> np.ndarray:
  """With rows of NaN at the end, which are nobody's neighbors."""
  if not more:
    return rows
  wide = np.promote_types(rows.dtype, np.float32)
  return np.pad(rows.astype(wide), ((0, more), (0, 0)), constant_values=np.nan)

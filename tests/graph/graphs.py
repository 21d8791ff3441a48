"""What graph tests share, and one of two processes that build a graph together.

As a program: `python -m tests.graph.graphs <port> <process> <devices of each>...`.
"""

import hashlib
import json
import os
import sys
from typing import Any

if __name__ == "__main__":
  _MINE = sys.argv[3:][int(sys.argv[2])]
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={_MINE}"

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from optax_ranger import graph


def points(n: int = 400, d: int = 12, seed: int = 0) -> np.ndarray:
  """Normal points, with some copies and some rows that are not finite."""
  rng = np.random.default_rng(seed)
  rows = rng.standard_normal([n, d]).astype(np.float32)
  rows[n // 2 : n // 2 + n // 10] = rows[rng.integers(0, 10, n // 10)]
  rows[n // 3] = np.nan
  rows[n // 5, 1] = np.inf
  return rows


def clusters(ratio: float, seed: int = 0, n: int = 400, d: int = 12) -> np.ndarray:
  """Five clusters that lie `ratio` of their radii apart."""
  rng = np.random.default_rng(seed)
  centers = ratio * np.eye(5, d)
  rows = centers[np.arange(n) * 5 // n] + rng.standard_normal([n, d])
  return rows.astype(np.float32)


def data() -> dict[str, np.ndarray]:
  """Data sets whose graphs must not depend on who builds them."""
  return {
    "normal": points(),
    "integers": np.random.default_rng(0).integers(0, 3, [400, 12]).astype(np.float32),
    "clusters": clusters(1e4),
  }


def digest(array: Any) -> str:
  """Short, since a full pipe would stop a process that the other one waits for."""
  return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


def same(one: Any, other: Any) -> None:
  """Bit for bit."""
  for a, b in zip(one, other, strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def full_sort(rows: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
  """Distances and indices by a full sort of all pairs in float64."""
  rows = np.asarray(rows, np.float64)
  dead = ~np.isfinite(rows).all(axis=1)
  rows = np.where(dead[:, None], 0, rows)
  if metric == "cosine":
    lengths = np.linalg.norm(rows, axis=1)
    rows = rows / np.where(lengths > 0, lengths, 1)[:, None]
  distances = np.stack([((rows - row) ** 2).sum(axis=1) for row in rows])
  if metric == "cosine":
    empty = lengths == 0
    distances = distances / 2
    distances[empty] = 1
    distances[:, empty] = 1
  else:
    distances = np.sqrt(distances)
  distances[dead] = np.inf
  distances[:, dead] = np.inf
  np.fill_diagonal(distances, np.inf)
  indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
  distances = np.take_along_axis(distances, indices, axis=1)
  return distances, np.where(np.isfinite(distances), indices, -1)


def main() -> None:
  port, process, *devices = sys.argv[1:]
  jax.distributed.initialize(f"localhost:{port}", len(devices), int(process))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec("data"))
  results = {}
  for name, rows in data().items():
    place = lambda index, rows=rows: rows[index]
    features = jax.make_array_from_callback(rows.shape, split, place)
    found = graph.build(features, 5, mesh=mesh)
    results[name] = sorted(
      (shard.index[0].start or 0, i, digest(shard.data))
      for i, leaf in enumerate(found[:2])
      for shard in leaf.addressable_shards
    )
  print(json.dumps(results))


if __name__ == "__main__":
  main()

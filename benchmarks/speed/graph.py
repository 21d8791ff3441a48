"""Neighbor graphs: `python -m benchmarks.speed.graph`.

Of Fashion-MNIST, where Debian's package dataset-fashion-mnist is installed, else of
random numbers of the same shape.
"""

import argparse
from collections.abc import Sequence
import itertools
import pathlib
import subprocess
import sys
import time

import faiss
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _fashion
from benchmarks.speed import _measure
from optax_ranger import graph

_K = 10
_IMAGES = _fashion.FOLDER / "train-images-idx3-ubyte.gz"


def features(n: int) -> np.ndarray:
  """Rows of 784 numbers."""
  if _IMAGES.exists():
    images = _fashion.read_idx(_IMAGES)
    rows = images.reshape(len(images), -1)[:n].astype(np.float32)
    rows /= 255  # in place, so that a peak of memory is not this one
    return rows
  return np.random.default_rng(0).random([n, 784], np.float32)


def flat(rows: np.ndarray) -> np.ndarray:
  """FAISS's flat index alone; a row is among its own neighbors."""
  index = faiss.IndexFlatL2(rows.shape[1])
  index.add(rows)
  return index.search(rows, _K + 1)[1]


_BACKENDS = ("faiss", "jax", "hnsw", "ivf")


def speed_rows(n: int, rounds: int, names: Sequence[str]) -> list[_measure.Row]:
  """Exact and approximate graphs against FAISS's flat index."""
  rows = features(n)
  found = {}

  def build(backend):
    found[backend] = graph.build(
      rows, _K, backend=backend, recall_sample=0, progress=False
    )

  contenders = [_measure.Contender(lambda: flat(rows), 0)]
  contenders += [_measure.Contender(lambda name=name: build(name), 0) for name in names]
  theirs, *ours = _measure.measure("graphs", contenders, rounds)
  recalls = {name: graph.measure_recall(found[name], rows) for name in names}
  reach = {"faiss": "1.1, recall 1", "jax": "3, recall 1"}
  data = "Fashion-MNIST" if _IMAGES.exists() else "random numbers"
  return [
    _measure.Row(
      f"graph of {data}, {name}, {n} x 784, k = {_K}, recall {recalls[name]:.4f}",
      "IndexFlatL2",
      seconds,
      theirs,
      reach.get(name, "-"),
    )
    for name, seconds in zip(names, ours, strict=True)
  ]


def exact_rows(n: int = 60_000, rounds: int = 3) -> list[_measure.Row]:
  """Exact graphs; temporaries are the peak of a process, beside the features."""
  names = ("faiss", "jax")
  theirs = peak("flat", n)
  return [
    row._replace(temporaries=peak(name, n), rival_temporaries=theirs)
    for name, row in zip(names, speed_rows(n, rounds, names), strict=True)
  ]


def peak(backend: str, n: int) -> int:
  """Bytes that a process gains at most while it builds a graph, by itself."""
  code = f"from benchmarks.speed import graph; graph.print_peak({backend!r}, {n})"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  return int(done.stdout.splitlines()[-1])


def print_peak(backend: str, n: int) -> None:
  def build(rows):
    if backend == "flat":
      flat(rows)
    else:
      graph.build(rows, _K, backend=backend, progress=False)

  rows = features(n)
  build(rows[:2000])
  # Not ru_maxrss, which a process inherits from the one that starts it.
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew.
  before = _measure.status("VmRSS")
  build(rows)
  after = _measure.status("VmHWM")
  print(after - before)


def refresh_row(examples: int = 10_000) -> str:
  """What a refresh costs, in epochs of MLP 784-256-256-10, batch 128."""
  rows, labels = features(examples), np.arange(examples, dtype=np.int32) % 10
  rng = np.random.default_rng(0)
  widths = (784, 256, 256, 10)
  params = [
    jnp.asarray(rng.standard_normal([i, o]) / np.sqrt(i), jnp.float32)
    for i, o in itertools.pairwise(widths)
  ]

  def features_of(params, batch):
    for kernel in params[:-1]:
      batch = jax.nn.relu(batch @ kernel)
    return batch

  @jax.jit
  def step(params, ids):
    def loss(params):
      logits = features_of(params, data[ids]) @ params[-1]
      chosen = jax.nn.log_softmax(logits)[jnp.arange(128), given[ids]]
      return -chosen.mean()

    grads = jax.grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

  data, given = jnp.asarray(rows), jnp.asarray(labels)
  neighbors = graph.build(features_of(params, rows), 20)
  seconds = {"epoch": [], "refresh": []}
  for _ in range(4):
    start = time.perf_counter()
    order = rng.permutation(examples)
    for i in range(examples // 128):
      params = step(params, order[i * 128 : (i + 1) * 128])
    jax.block_until_ready(params)
    seconds["epoch"].append(time.perf_counter() - start)
    start = time.perf_counter()
    neighbors = graph.refresh(features_of, params, rows, neighbors)
    seconds["refresh"].append(time.perf_counter() - start)
  epoch, refresh = (np.median(seconds[name][1:]) for name in ("epoch", "refresh"))
  return (
    f"refresh of {examples} examples in 256 features: {refresh:.2f} s, an epoch of"
    f" training: {epoch:.2f} s; every other epoch it is"
    f" {refresh / (2 * epoch + refresh):.0%} of the time"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--n", type=int, default=60_000)
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--only", choices=("speed", "memory", "refresh"))
  parser.add_argument("--backends", nargs="+", choices=_BACKENDS, default=_BACKENDS)
  args = parser.parse_args()
  print(_measure.machine())
  if args.only in (None, "speed"):
    print(_measure.table(speed_rows(args.n, args.rounds, args.backends)))
  if args.only in (None, "memory"):
    for backend in ("flat", "faiss", "jax"):
      print(
        f"peak of {backend} beside the features: {peak(backend, args.n) / 1e6:.0f} MB"
      )
  if args.only in (None, "refresh"):
    print(refresh_row())


if __name__ == "__main__":
  main()

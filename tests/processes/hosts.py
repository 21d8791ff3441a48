"""`examples/multi_host.py` as a program that tells what it did, and dies if told to.

`python -m tests.processes.hosts --results FILE [--die-at POSITION] [--signal NAME]
[--once-there FOLDER] [--share-rows]` and the arguments of the example.
"""

import argparse
import json
import os
import pathlib
import signal
import time
from typing import Any

import jax
from jax.sharding import AxisType
import numpy as np

from examples import multi_host
import optax_ranger as ranger

# Five batches, the last of 96 rows, in windows of two: the end closes the third one.
ARGUMENTS = ["--epochs", "1", "--batch-size", "336"]
# The window of two is open then, and the epoch is not over.
SAVED_AT = 3


def main() -> None:
  """Runs the example's own `main`, with what it calls made to tell."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--results", type=pathlib.Path, required=True)
  parser.add_argument("--die-at", type=int)
  parser.add_argument("--signal", default="SIGKILL")
  parser.add_argument("--once-there", type=pathlib.Path)
  parser.add_argument("--share-rows", action="store_true")
  told, arguments = parser.parse_known_args()
  make_step, train, batch_ids, parse = (
    multi_host.make_step,
    multi_host.train,
    multi_host.batch_ids,
    multi_host.parse,
  )
  updates = []

  def make_and_keep(*args):
    updates.append(make_step(*args))
    return updates[-1]

  def train_and_tell(options, mesh):
    if told.share_rows:
      kinds = (AxisType.Auto,) * 2
      mesh = jax.make_mesh((2, 4), ("model", "data"), axis_types=kinds)
    params, state, accuracy = train(options, mesh)
    np.savez(told.results, *whole(params, state))
    ids = multi_host.own_part(batch_ids(0, options))
    images, labels, *_ = multi_host.load_digits(options.noise)
    batch = {"image": images[ids], "label": labels[ids]}
    lowered = updates[0].lower(params, state, batch, example_ids=ids, last=False)
    kinds = {one.kind for one in ranger.training.collectives(lowered)}
    told.results.with_suffix(".json").write_text(json.dumps(sorted(kinds)))
    return params, state, accuracy

  def batch_ids_or_death(position, options):
    if position == told.die_at:
      while told.once_there and not told.once_there.exists():
        time.sleep(0.01)
      os.kill(os.getpid(), signal.Signals[told.signal])
    return batch_ids(position, options)

  multi_host.parse = lambda: parse(arguments)
  multi_host.make_step = make_and_keep
  multi_host.train = train_and_tell
  multi_host.batch_ids = batch_ids_or_death
  multi_host.own_part = (lambda ids: ids) if told.share_rows else own_part
  multi_host.main()


def whole(params: Any, state: Any) -> list[np.ndarray]:
  """Parameters and state, once they are seen to be the same on all devices."""
  sharding = jax.tree.leaves(params)[0].sharding
  gathered = jax.jit(lambda tree: tree, out_shardings=sharding)((params, state))
  for leaf, replica in zip(
    jax.tree.leaves(gathered), jax.tree.leaves((params, state)), strict=True
  ):
    first = np.asarray(leaf.addressable_data(0))
    if replica.is_fully_replicated:
      for shard in replica.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), first)
  return [np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(gathered)]


def own_part(ids: np.ndarray) -> np.ndarray:
  """The data of the first of two processes end before the last batch."""
  if jax.process_count() == 2 and len(ids) == 96:
    return np.split(ids, [0])[jax.process_index()]
  return np.array_split(ids, jax.process_count())[jax.process_index()]


if __name__ == "__main__":
  main()

"""Memory and time of each way to accumulate: `python -m benchmarks.speed.windows`.

Two devices: accelerators where there are two, else two simulated on the CPU.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

from benchmarks.speed import _measure
from benchmarks.speed import training
import optax_ranger as ranger

EVERY = 8
# What accumulate is given, and what train_step is.
_WAYS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
  "float32": (EVERY, {}, {}),
  "bfloat16": (EVERY, {"accumulator_dtype": "bfloat16"}, {}),
  "every=1": (1, {}, {}),
  "shard_state": (EVERY, {}, {"shard_state": True}),
  "bfloat16, shard_state": (
    EVERY,
    {"accumulator_dtype": "bfloat16"},
    {"shard_state": True},
  ),
  'reduce="on_emission"': (EVERY, {}, {"reduce": "on_emission"}),
  "by_noise_scale": (ranger.by_noise_scale(EVERY, min_every=EVERY), {}, {}),
}


def table(size: int = 256, rounds: int = 20) -> str:
  """Bytes a parameter that the sums take on a device, and the time of a call."""
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
  split, whole = (
    NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ())
  )
  batch = jax.device_put(training._batch(size)[0], split)
  contenders, bytes_each = [], []
  num_params = sum(leaf.size for leaf in jax.tree.leaves(training._start()))
  for every, options, ways in _WAYS.values():
    tx = ranger.accumulate(optax.adamw(1e-3), every, **options)
    update = ranger.train_step(training._losses, tx, mesh=mesh, **ways)
    params = training._start()
    state = update.init(params)
    sums = jax.tree.leaves(state.optimizer.accumulated)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in sums)
    bytes_each.append(held / num_params)
    contenders.append(
      training._contender(update, update.lower, params, state, (batch,), {})
    )
  tx = optax.MultiSteps(optax.adamw(1e-3), EVERY)
  hand = training._by_hand(mesh, tx)
  start = jax.device_put(training._start(), whole)
  moments = jax.device_put(tx.init(start), whole)
  contenders.append(training._contender(hand, hand.lower, start, moments, (batch,), {}))
  names = (*_WAYS, "optax.MultiSteps, data-parallel, by hand")
  bytes_each.append(4.0)
  seconds = _measure.measure("ways", contenders, rounds, calls=EVERY)
  lines = ["| accumulate | bytes a parameter | a call, ms | times the first |"]
  lines.append("| --- | --- | --- | --- |")
  for name, held, own in zip(names, bytes_each, seconds, strict=True):
    ratio = np.median(own / seconds[0])
    lines.append(f"| {name} | {held:.2f} | {1e3 * np.median(own):.3g} | {ratio:.2f} |")
  return "\n".join(lines)


def main() -> None:
  print(_measure.machine())
  print(table())


if __name__ == "__main__":
  main()

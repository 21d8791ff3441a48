"""Digits on devices of which some send gradients of opposite sign, times a hundred.

As a program, one of several processes:
`python -m tests.processes.liars <port> <process> <devices of each process>...`;
the devices of the last process lie.
"""

import json
import os
import sys
from typing import Any

if __name__ == "__main__":
  _MINE = sys.argv[3:][int(sys.argv[2])]
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={_MINE}"

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
from sklearn import datasets

import optax_ranger as ranger

NUM_DEVICES = 8
NUM_LIARS = 2
STEPS = 300
BATCH = 64  # of each device
AGGREGATORS = {
  "mean": ranger.aggregate_by_mean(),
  "median": ranger.aggregate_by_median(),
  "trimmed mean": ranger.aggregate_by_trimmed_mean(0.25),
  "geometric median": ranger.aggregate_by_geometric_median(),
  "krum": ranger.aggregate_by_krum(NUM_LIARS),
}


def load() -> tuple[np.ndarray, ...]:
  """Returns training images and labels, test images and labels."""
  images, labels = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(labels))
  images, labels = images[order].astype(np.float32) / 16, labels[order]
  return images[360:], labels[360:], images[:360], labels[:360]


def start() -> dict[str, jax.Array]:
  rng = np.random.default_rng(1)
  normal = lambda i, o: jnp.asarray(rng.standard_normal([i, o]) / np.sqrt(i), "float32")
  return {
    "hidden": normal(64, 64),
    "hidden_bias": jnp.zeros([64]),
    "out": normal(64, 10),
    "out_bias": jnp.zeros([10]),
  }


def logits_of(params: Any, images: jax.Array) -> jax.Array:
  hidden = jax.nn.relu(images @ params["hidden"] + params["hidden_bias"][None])
  return hidden @ params["out"] + params["out_bias"][None]


def accuracy(name: str, liars: int) -> float:
  """Trains over all devices of all processes; the last `liars` lie."""
  images, labels, test_images, test_labels = load()
  mesh = jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(AxisType.Auto,))
  tx = optax.chain(
    ranger.across_devices(AGGREGATORS[name], "data"),
    optax.sgd(optax.linear_schedule(0.2, 0.0, STEPS), momentum=0.9),
  )

  def losses(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
      logits_of(params, batch["image"]), batch["label"]
    )

  grad_fn = ranger.value_and_grad(losses, ranger.aggregate_by_mean())

  def step(params, state, batch):
    apart = jax.lax.pcast(params, "data", to="varying")
    _, grads = grad_fn(apart, batch)
    lies = jax.lax.axis_index("data") >= NUM_DEVICES - liars
    grads = jax.tree.map(lambda leaf: jnp.where(lies, -100 * leaf, leaf), grads)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  whole, split = PartitionSpec(), PartitionSpec("data")
  train = jax.jit(
    jax.shard_map(step, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole)
  )
  place = lambda leaf: jax.make_array_from_callback(
    leaf.shape, NamedSharding(mesh, split), lambda index: leaf[index]
  )
  replicate = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, whole))
  params, state = replicate((start(), tx.init(start())))
  rng = np.random.default_rng(2)
  for _ in range(STEPS):
    ids = rng.integers(0, len(labels), NUM_DEVICES * BATCH)
    batch = {"image": place(images[ids]), "label": place(labels[ids])}
    # Steps that queue up starve each other of threads on a small machine.
    params, state = jax.block_until_ready(train(params, state, batch))
  mine = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), params)
  for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(mine), strict=True):
    for shard in leaf.addressable_shards:
      np.testing.assert_array_equal(np.asarray(shard.data), other)
  guesses = np.asarray(logits_of(mine, test_images)).argmax(axis=1)
  return float((guesses == test_labels).mean())


def main() -> None:
  port, process, *devices = sys.argv[1:]
  jax.distributed.initialize(f"localhost:{port}", len(devices), int(process))
  assert jax.device_count() == NUM_DEVICES
  names = [*AGGREGATORS]
  results = {name: accuracy(name, NUM_LIARS) for name in names}
  results["honest"] = accuracy("mean", 0)
  print(json.dumps(results))


if __name__ == "__main__":
  main()

"""Trains the whole Ranger on one device, on several, and on several processes.

The model is Flax NNX; the training step is the same for all of them. One process
uses all devices that it has, or as many as it is told to simulate:

    python examples/multi_host.py --devices 8

Several are started once each, by hand or by a scheduler; here two on one machine:

    python examples/multi_host.py --processes 2 --process 0 --devices 4 &
    python examples/multi_host.py --processes 2 --process 1 --devices 4

With `--checkpoints DIR`, a folder that all processes share, training continues
where the last checkpoint was when it is started again with `--resume`, on as many
devices and processes as there are then. When a process dies, the others end with
an error; start them all again.
"""

import argparse
import os
import pathlib
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn import datasets
import tqdm

import optax_ranger as ranger

NUM_CLASSES = 10
NUM_NEIGHBORS = 10
# A number that devices divide, so that they share the table of predictions.
NUM_EXAMPLES = 1440


class Mlp(nnx.Module):
  """A network with one hidden layer, whose values are its features."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(64, 128, rngs=rngs)
    self.out = nnx.Linear(128, NUM_CLASSES, rngs=rngs)

  def features(self, images: jax.Array) -> jax.Array:
    return nnx.relu(self.hidden(images))

  def __call__(self, images: jax.Array) -> jax.Array:
    return self.out(self.features(images))


def make_step(graphdef: Any, mesh: Any, options: argparse.Namespace) -> Any:
  """The update: the part to lift into your own code."""

  def losses(params, batch, smoothed):
    model = nnx.merge(graphdef, params)
    features = model.features(batch["image"])
    logits = model.out(features)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    losses += 3 * ranger.labels.early_learning_regularizer(logits, smoothed)
    return losses, {"features": features, "predictions": nnx.softmax(logits)}

  def find_neighbors(features, label):
    # In the model's own space, among the examples of all devices.
    neighbors = ranger.neighbors.nearest(features, NUM_NEIGHBORS)
    return ranger.neighbors.weigh(neighbors, labels=label)

  tx = ranger.ranger(
    0.12,
    acceleration=1.0,
    hyper_rate=0.01,
    bounds=(0.5, 2.0),
    every=2,
    ema_decay=0.98,
    num_examples=NUM_EXAMPLES,
    num_classes=NUM_CLASSES,
    prediction_decay=0.5,
  )
  return ranger.train_step(
    losses,
    tx,
    step=ranger.ranger_head(),
    find_neighbors=find_neighbors,
    has_aux=True,
    mesh=mesh,
    reduce=options.reduce,
    batch_size=options.batch_size,  # the last batch of an epoch is smaller
  )


def load_digits(noise: float) -> tuple[np.ndarray, ...]:
  """Returns training images and labels, some of them wrong, and those of the test."""
  pixels, labels = datasets.load_digits(return_X_y=True)
  rng = np.random.default_rng(0)
  order = rng.permutation(len(labels))
  images, labels = pixels[order].astype(np.float32) / 16, labels[order].astype(np.int32)
  given = labels[:NUM_EXAMPLES].copy()
  wrong = rng.choice(NUM_EXAMPLES, round(noise * NUM_EXAMPLES), replace=False)
  given[wrong] += rng.integers(1, NUM_CLASSES, len(wrong), dtype=np.int32)
  train = images[:NUM_EXAMPLES], given % NUM_CLASSES
  return *train, images[NUM_EXAMPLES:], labels[NUM_EXAMPLES:]


def batch_ids(position: int, options: argparse.Namespace) -> np.ndarray:
  """The ids of a batch's examples: a function of its position alone."""
  epoch, i = divmod(position, batches_per_epoch(options))
  order = np.random.default_rng([options.seed, epoch]).permutation(NUM_EXAMPLES)
  return order[i * options.batch_size : (i + 1) * options.batch_size].astype(np.int32)


def own_part(ids: np.ndarray) -> np.ndarray:
  """Those that this process loads."""
  return np.array_split(ids, jax.process_count())[jax.process_index()]


def batches_per_epoch(options: argparse.Namespace) -> int:
  """Batches in an epoch; the last one may be smaller."""
  return -(-NUM_EXAMPLES // options.batch_size)


def open_checkpoints(options: argparse.Namespace) -> ocp.CheckpointManager | None:
  """All processes write into one folder; the newest two checkpoints are kept."""
  if options.checkpoints is None:
    return None
  return ocp.CheckpointManager(
    options.checkpoints.absolute(),
    item_handlers={
      "train": ocp.StandardCheckpointHandler(),
      "data": ocp.JsonCheckpointHandler(),
    },
    options=ocp.CheckpointManagerOptions(
      max_to_keep=2, save_interval_steps=options.save_every
    ),
  )


def restore(manager: ocp.CheckpointManager, step: int, params: Any, state: Any) -> Any:
  """Parameters, state and position of a checkpoint, on this run's mesh."""
  saved = jax.tree.leaves(manager.item_metadata(step)["train"].tree)
  shapes = {leaf.name: leaf.shape for leaf in saved}

  def like(path, leaf):
    shape = shapes[jax.tree_util.keystr(path, simple=True, separator=".")]
    sharding = leaf.sharding
    if shape != leaf.shape:
      # Parts of a sum, one for each device there was: the step adds them up.
      sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

  train = {"params": params, "state": state}
  train = jax.tree_util.tree_map_with_path(like, train)
  restored = manager.restore(
    step,
    args=ocp.args.Composite(
      train=ocp.args.StandardRestore(train), data=ocp.args.JsonRestore()
    ),
  )
  train = restored["train"]
  return train["params"], train["state"], restored["data"]["position"]


def train(options: argparse.Namespace, mesh: Any) -> tuple[Any, Any, float]:
  """Trains; returns parameters, state and the accuracy on test images."""
  images, labels, test_images, test_labels = load_digits(options.noise)
  graphdef, params = nnx.split(Mlp(rngs=nnx.Rngs(options.seed)))
  update = make_step(graphdef, mesh, options)
  state, first = update.init(params), 0
  manager = open_checkpoints(options)
  newest = manager.latest_step() if manager and options.resume else None
  if manager and newest is not None:
    params, state, first = restore(manager, newest, params, state)
  end = options.epochs * batches_per_epoch(options)
  progress = tqdm.tqdm(
    total=end, initial=first, unit="batch", disable=jax.process_index() != 0
  )
  for position in range(first, end):
    ids = own_part(batch_ids(position, options))
    batch = {"image": images[ids], "label": labels[ids]}
    params, state, metrics = update(
      params, state, batch, example_ids=ids, last=position + 1 == end
    )
    # Waits for the step: on CPU, those that queue up starve each other of threads.
    progress.set_postfix(loss=f"{float(metrics['loss']):.3f}", refresh=False)
    progress.update()
    if manager:
      items = ocp.args.Composite(
        train=ocp.args.StandardSave({"params": params, "state": state}),
        data=ocp.args.JsonSave({"position": position + 1}),
      )
      manager.save(position + 1, args=items)
  progress.close()
  if manager:
    manager.close()
  # Whole on every process, which evaluates on its own.
  smoothed = jax.tree.map(np.asarray, ranger.eval_params(state, params))
  model = nnx.merge(graphdef, smoothed)
  guesses = model(jnp.asarray(test_images)).argmax(axis=-1)
  return params, state, float((guesses == test_labels).mean())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--host", default="localhost", help="of process 0")
  parser.add_argument("--port", type=int, default=9911, help="of process 0")
  parser.add_argument("--process", type=int, default=0, help="which one this is")
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--devices", type=int, help="CPU devices of each process")
  parser.add_argument("--epochs", type=int, default=40)
  parser.add_argument("--batch-size", type=int, default=128, help="of all processes")
  parser.add_argument(
    "--reduce", default="every_call", help="or on_emission, which sends less"
  )
  parser.add_argument("--noise", type=float, default=0.4, help="share of wrong labels")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--checkpoints", type=pathlib.Path, help="folder, shared by all")
  parser.add_argument("--save-every", type=int, default=10, help="batches")
  parser.add_argument("--resume", action="store_true")
  parser.add_argument(
    "--patience", type=int, default=10, help="seconds that a silent process may live"
  )
  return parser.parse_args(arguments)


def main() -> None:
  """Joins the other processes, trains and prints the accuracy."""
  options = parse()
  if options.devices:
    jax.config.update("jax_num_cpu_devices", options.devices)
  if options.processes > 1:
    jax.distributed.initialize(
      f"{options.host}:{options.port}",
      options.processes,
      options.process,
      heartbeat_timeout_seconds=options.patience,
    )
  try:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    _, _, accuracy = train(options, mesh)
  except jax.errors.JaxRuntimeError as error:
    if options.processes == 1:
      raise
    reason = str(error).splitlines()[0]
    print(
      f"process {options.process} ends: another one is gone, or the network. Start"
      f" all of them again, with --resume. ({reason})",
      file=sys.stderr,
      flush=True,
    )
    # Without a farewell, which would wait for those that are gone.
    os._exit(1)
  if options.process == 0:
    print(f"{jax.device_count()} devices, test accuracy: {accuracy:.3f}")


if __name__ == "__main__":
  main()

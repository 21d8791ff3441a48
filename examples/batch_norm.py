"""Smoothed parameters and batch normalization: whose statistics to evaluate with.

Running statistics belong to the parameters that produced them. With smoothed
parameters, recompute them in a pass over training data, or smooth them too.
"""

import argparse

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn import model_selection
import tqdm

import optax_ranger as ranger

BATCH_SIZE = 64


class Mlp(nnx.Module):
  """A network that normalizes its hidden layer over the batch."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(64, 64, rngs=rngs)
    self.norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
    self.output = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    return self.output(nnx.relu(self.norm(self.hidden(images))))


@nnx.jit
def train_step(model, optimizer, images, labels):
  """An ordinary step; the smoothing is part of the optimizer's state."""

  def mean_loss(model):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  optimizer.update(model, nnx.grad(mean_loss)(model))


def smoothed_model(model, optimizer):
  """A copy of the model with smoothed parameters and the statistics as they are."""
  copy = nnx.clone(model)
  nnx.update(copy, ranger.eval_params(optimizer, nnx.state(model, nnx.Param)))
  return copy


def recompute_statistics(model, batches):
  """Sets the running statistics to those of these batches, in forward passes."""
  model.train()
  for i, images in enumerate(batches):
    # Momentum i / (i + 1) makes the running mean a plain one.
    model.norm.momentum = i / (i + 1)
    model(images)


def accuracy(model, images, labels) -> float:
  """The share of labels that the model gives in evaluation mode."""
  model.eval()
  return float((model(images).argmax(axis=-1) == labels).mean())


def main() -> None:
  """Trains on digits and prints four accuracies."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--epochs", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()

  pixels, labels = datasets.load_digits(return_X_y=True)
  split = model_selection.train_test_split(
    np.asarray(pixels) / 16, labels, test_size=360, random_state=0, stratify=labels
  )
  images, test_images = (jnp.asarray(part, jnp.float32) for part in split[:2])
  labels, test_labels = (jnp.asarray(part) for part in split[2:])

  model = Mlp(rngs=nnx.Rngs(options.seed))
  tx = optax.chain(optax.sgd(0.5, momentum=0.9), ranger.smooth_by_ema(0.99, warmup=10))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  # The same average for what is not trained: statistics as parameters, no updates.
  smoother = ranger.smooth_by_ema(0.99, warmup=10)
  statistics = nnx.state(model, nnx.BatchStat)
  smoother_state = smoother.init(statistics)

  key = jax.random.key(options.seed)
  for epoch in tqdm.trange(options.epochs):
    order = jax.random.permutation(jax.random.fold_in(key, epoch), len(images))
    for i in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
      ids = order[i : i + BATCH_SIZE]
      train_step(model, optimizer, images[ids], labels[ids])
      statistics = nnx.state(model, nnx.BatchStat)
      _, smoother_state = smoother.update(statistics, smoother_state, statistics)

  last, stale = nnx.clone(model), smoothed_model(model, optimizer)
  recomputed, smoothed = nnx.clone(stale), nnx.clone(stale)
  recompute_statistics(recomputed, jnp.array_split(images, 10))
  nnx.update(smoothed, ranger.eval_params(smoother_state, statistics))
  for name, one in {
    "last parameters, their statistics": last,
    "smoothed parameters, statistics of the last": stale,
    "smoothed parameters, recomputed statistics": recomputed,
    "smoothed parameters, smoothed statistics": smoothed,
  }.items():
    print(f"{name:45}{accuracy(one, test_images, test_labels):.3f}")


if __name__ == "__main__":
  main()

"""Averages of parameters with batch normalization: which statistics to evaluate with.

Running statistics belong to the parameters that they were computed with. If you
evaluate with an average of the parameters (`smooth_by_ema`), either keep the
statistics of the last parameters, compute them again in a pass over training data, or
average them too. The program trains a small network on digits with a large learning
rate, and compares all three with the last parameters.

`python examples/batch_norm.py` takes about a minute on two cores.
"""

import argparse
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn import datasets
from sklearn import model_selection
import tqdm

import optax_ranger as ranger

BATCH_SIZE = 64
LAST = "last parameters"
STALE = "EMA, statistics of the last parameters"
RECOMPUTED = "EMA, recomputed statistics"
SMOOTHED = "EMA, averaged statistics"


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
  """An ordinary step; the average is part of the optimizer's state."""

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


def train(data, seed: int, epochs: int, progress: tqdm.tqdm) -> dict[str, float]:
  """Trains one network; returns its test accuracy in each of the four ways."""
  images, test_images, labels, test_labels = data
  model = Mlp(rngs=nnx.Rngs(seed))
  tx = optax.chain(optax.sgd(0.5, momentum=0.9), ranger.smooth_by_ema(0.99, warmup=10))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  # The same average for what is not trained: statistics as parameters, no updates.
  smoother = ranger.smooth_by_ema(0.99, warmup=10)
  statistics = nnx.state(model, nnx.BatchStat)
  smoother_state = smoother.init(statistics)

  key = jax.random.key(seed)
  for epoch in range(epochs):
    order = jax.random.permutation(jax.random.fold_in(key, epoch), len(images))
    for i in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
      ids = order[i : i + BATCH_SIZE]
      train_step(model, optimizer, images[ids], labels[ids])
      statistics = nnx.state(model, nnx.BatchStat)
      _, smoother_state = smoother.update(statistics, smoother_state, statistics)
    progress.update()

  last, stale = nnx.clone(model), smoothed_model(model, optimizer)
  recomputed, smoothed = nnx.clone(stale), nnx.clone(stale)
  recompute_statistics(recomputed, jnp.array_split(images, 10))
  nnx.update(smoothed, ranger.eval_params(smoother_state, statistics))
  models = {LAST: last, STALE: stale, RECOMPUTED: recomputed, SMOOTHED: smoothed}
  return {name: accuracy(one, test_images, test_labels) for name, one in models.items()}


def main() -> None:
  """Trains on digits, prints the accuracies and draws them."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quick", action="store_true", help="one seed, few epochs")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  args = parser.parse_args()
  seeds, epochs = (1, 4) if args.quick else (10, 20)

  pixels, labels = datasets.load_digits(return_X_y=True)
  images = np.asarray(pixels, np.float32) / 16
  split = model_selection.train_test_split(
    images, labels, test_size=360, random_state=0, stratify=labels
  )
  data = tuple(jnp.asarray(part) for part in split)
  with tqdm.tqdm(total=seeds * epochs, unit="epoch") as progress:
    runs = [train(data, seed, epochs, progress) for seed in range(seeds)]
  results = {name: [run[name] for run in runs] for name in runs[0]}
  for name, values in results.items():
    error = np.std(values) / max(1, len(values) - 1) ** 0.5
    print(f"{name:40}{np.mean(values):.3f} ± {error:.3f}")

  args.out.mkdir(parents=True, exist_ok=True)
  measure = "test accuracy, last epoch"
  table = {"problem": "digits, batch normalization, a large learning rate"}
  table |= {"measure": measure, "better": "higher", "results": results}
  table |= {"baseline": LAST, "ours": RECOMPUTED}
  (args.out / "batch_norm.json").write_text(json.dumps(table, indent=1))
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
  axis.boxplot(list(results.values()), orientation="horizontal")
  axis.set_yticks(range(1, len(results) + 1), list(results))
  axis.set(xlabel=f"{measure}, {seeds} seeds")
  figure.savefig(args.out / "batch_norm.png", dpi=90)


if __name__ == "__main__":
  main()

"""Trains plain AdamW and Ranger on digits with wrong labels, and compares them.

Run it with `make demo`, or `python examples/noisy_labels.py --noise 0.6`.
"""

import argparse
import json
import pathlib
import time
from typing import Any

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

BATCH_SIZE = 128
NUM_CLASSES = 10
NUM_NEIGHBORS = 20
ASK_NEIGHBORS_AFTER = (10, 30)  # Epochs.


class Mlp(nnx.Module):
  """Two hidden layers of 256."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.hidden1 = nnx.Linear(64, 256, rngs=rngs)
    self.hidden2 = nnx.Linear(256, 256, rngs=rngs)
    self.out = nnx.Linear(256, NUM_CLASSES, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(self.hidden1(x))
    return self.out(jax.nn.relu(self.hidden2(x)))


def plain_step(graphdef, params, images, labels):
  """Plain AdamW: what most people run."""
  tx = optax.adamw(1e-3)

  def loss(params, ids):
    logits = nnx.merge(graphdef, params)(images[ids])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[ids])
    return losses.mean()

  @jax.jit
  def step(params, state, told, ids):
    del told
    updates, state = tx.update(jax.grad(loss)(params, ids), state, params)
    return optax.apply_updates(params, updates), state

  return step, tx.init(params), None, lambda state: None


def ranger_step(graphdef, params, images, labels):
  """Ranger: the part to lift into your own code."""
  n = len(images)
  # Steps 2, 3 and 5: accumulation, acceleration, smoothing.
  tx = ranger.ranger(
      0.12, acceleration=1.0, hyper_rate=0.01, bounds=(0.5, 2.0), weight_decay=0.003,
      ema_decay=0.99, num_examples=n, num_classes=NUM_CLASSES, prediction_decay=0.7,
  )  # fmt: skip
  neighbors = ranger.neighbors.nearest(images, k=NUM_NEIGHBORS)

  def losses(params, batch, confusion, exponent):
    logits = nnx.merge(graphdef, params)(batch["image"])
    losses = ranger.labels.forward_corrected_loss(
      logits, batch["label"], confusion, exponent=exponent, smoothing=0.05
    )
    return losses, jax.nn.softmax(logits)

  # Step 4: examples become one gradient.
  grad_fn = ranger.value_and_grad(losses, ranger.aggregate_by_mean(), has_aux=True)

  @jax.jit
  def step(params, state, told, ids):
    confusion, exponent, weights = told
    batch = {"image": images[ids], "label": labels[ids]}
    (_, probabilities), grads = grad_fn(
      params,
      batch,
      confusion=confusion,
      exponent=exponent,
      member_weights=weights[ids],
    )
    updates, state = tx.update(
      grads, state, params, predictions=probabilities, example_ids=ids
    )
    return optax.apply_updates(params, updates), state

  @jax.jit
  def ask_neighbors(state):
    """Step 1: which labels get confused, how robust to be, and whom to believe."""
    beliefs = ranger.labels.neighbor_beliefs(
      neighbors, ranger.smoothed_predictions(state, jnp.arange(n))
    )
    confusion = ranger.labels.label_confusion(labels, beliefs)
    spread = ranger.labels.confusion_spread(confusion)
    targets = ranger.labels.refine_targets(labels, beliefs, confusion=confusion)
    return confusion, 0.7 * spread, targets[jnp.arange(n), labels] ** spread

  # Until neighbors are asked, labels are taken as they are.
  told = jnp.eye(NUM_CLASSES), 0.7, jnp.ones(n)
  return step, tx.init(params), told, ask_neighbors


def load_digits(noise: float, seed: int):
  """Returns training images, given labels, true labels, test images and labels."""
  pixels, labels = datasets.load_digits(return_X_y=True)
  images = pixels.astype(np.float32) / 16
  train, test, true, test_labels = model_selection.train_test_split(
    images, labels, test_size=360, random_state=0, stratify=labels
  )
  rng = np.random.default_rng(seed)
  given = true.copy()
  wrong = rng.choice(len(true), round(noise * len(true)), replace=False)
  given[wrong] = (given[wrong] + rng.integers(1, NUM_CLASSES, len(wrong))) % NUM_CLASSES
  return train, given, true, test, test_labels


def train(make_step, data, epochs: int, seed: int, progress: tqdm.tqdm):
  """Trains one model; returns test accuracy after each epoch and seconds a step."""
  images, labels, _, test_images, test_labels = map(jnp.asarray, data)
  graphdef, params = nnx.split(Mlp(rngs=nnx.Rngs(seed)), nnx.Param)
  step, state, told, ask_neighbors = make_step(graphdef, params, images, labels)

  @jax.jit
  def accuracy(params, state):
    model = nnx.merge(graphdef, ranger.eval_params(state, params))
    return (model(test_images).argmax(axis=-1) == test_labels).mean()

  rng = np.random.default_rng(seed)
  accuracies, seconds = [], []
  for epoch in range(epochs):
    if epoch in ASK_NEIGHBORS_AFTER:
      told = ask_neighbors(state)
    order = rng.permutation(len(images))
    start = time.perf_counter()
    batches = [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]
    batches = [ids for ids in batches if len(ids) == BATCH_SIZE]
    for ids in batches:
      params, state = step(params, state, told, ids)
    jax.block_until_ready(params)
    seconds.append((time.perf_counter() - start) / len(batches))
    accuracies.append(float(accuracy(params, state)))
    progress.update()
  return accuracies, float(np.median(seconds))


def draw(path, results, noise, data):
  """Draws the accuracy curves and the twenty most suspicious training images."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure = plt.figure(figsize=(13, 5), layout="constrained")
  left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1), squeeze=False)[0]
  axis = left.subplots()
  colors = {"plain": "tab:gray", "ranger": "tab:green"}
  for name, result in results.items():
    curves = np.array(result["curves"])
    epochs = np.arange(1, curves.shape[1] + 1)
    axis.plot(epochs, curves.mean(axis=0), color=colors[name], label=result["label"])
    axis.fill_between(
      epochs, curves.min(axis=0), curves.max(axis=0), color=colors[name], alpha=0.2
    )
  axis.set(xlabel="epoch", ylabel="accuracy on clean test images", ylim=(0, 1))
  axis.set_title(f"digits, {noise:.0%} of the training labels wrong")
  axis.grid(alpha=0.3)
  axis.legend(loc="lower right")

  images, given, true, _, _ = data
  neighbors = ranger.neighbors.nearest(images, k=NUM_NEIGHBORS)
  support = np.asarray(ranger.labels.label_support(neighbors, given))
  suspicious = np.argsort(support, kind="stable")[:20]
  right.suptitle(
    "the twenty most suspicious labels: given \u2192 label of most neighbors,\n"
    "green where the neighbors are right"
  )
  for axis, i in zip(right.subplots(4, 5).flat, suspicious, strict=True):
    votes = np.bincount(given[neighbors.indices[i]], minlength=NUM_CLASSES)
    right_guess = votes.argmax() == true[i]
    axis.imshow(images[i].reshape(8, 8), cmap="gray_r")
    axis.set_title(
      f"{given[i]} \u2192 {votes.argmax()}",
      color="tab:green" if right_guess else "tab:red",
    )
    axis.axis("off")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def main():
  """Trains both methods on every seed, prints the table and draws the picture."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--noise", type=float, default=0.4, help="share of wrong labels")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--epochs", type=int, default=60)
  parser.add_argument("--out", type=pathlib.Path, help="picture to write")
  parser.add_argument("--json", type=pathlib.Path, help="table to write")
  args = parser.parse_args()
  if not 0 <= args.noise <= 1:
    parser.error(f"--noise must lie in [0, 1], got {args.noise}")

  makers = {"plain": ("AdamW", plain_step), "ranger": ("Ranger", ranger_step)}
  results: dict[str, dict[str, Any]] = {}
  total = len(makers) * args.seeds * args.epochs
  with tqdm.tqdm(total=total, unit="epoch") as progress:
    for name, (label, make_step) in makers.items():
      progress.set_description(f"{label:>6}")
      runs = [
        train(make_step, load_digits(args.noise, seed), args.epochs, seed, progress)
        for seed in range(args.seeds)
      ]
      curves = np.array([accuracies for accuracies, _ in runs])
      results[name] = {
        "label": label,
        "curves": curves.tolist(),
        "last_mean": float(curves[:, -1].mean()),
        "last_std": float(curves[:, -1].std()),
        "best_mean": float(curves.max(axis=1).mean()),
        "seconds_per_step": float(np.median([seconds for _, seconds in runs])),
      }

  print(f"digits, {args.noise:.0%} wrong labels, {args.seeds} seeds, test accuracy")
  print(f"{'':8}{'last epoch':>16}{'best epoch':>12}{'ms per step':>13}")
  for result in results.values():
    last = f"{result['last_mean']:.3f} \u00b1 {result['last_std']:.3f}"
    print(
      f"{result['label']:8}{last:>16}{result['best_mean']:>12.3f}"
      f"{1e3 * result['seconds_per_step']:>13.2f}"
    )
  if args.json:
    table = {
      name: {key: value for key, value in result.items() if key != "label"}
      for name, result in results.items()
    }
    args.json.write_text(json.dumps({"noise": args.noise, **table}, indent=2))
  if args.out:
    draw(args.out, results, args.noise, load_digits(args.noise, 0))
    print(f"picture: {args.out}")


if __name__ == "__main__":
  main()

"""Trains on digits with wrong labels, plainly and with `robust_labels`.

Both loops are the same but for the lines that the README shows as a diff. Run it with
`make demo`, or `python examples/noisy_labels.py --noise 0.6`.
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


class Mlp(nnx.Module):
  """Two hidden layers of 256."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.hidden1 = nnx.Linear(64, 256, rngs=rngs)
    self.hidden2 = nnx.Linear(256, 256, rngs=rngs)
    self.out = nnx.Linear(256, NUM_CLASSES, rngs=rngs)

  def features(self, x: jax.Array) -> jax.Array:
    return jax.nn.relu(self.hidden2(jax.nn.relu(self.hidden1(x))))

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.out(self.features(x))


def train_plainly(images, labels, seed: int, epochs: int):
  """What most people run; yields the model and seconds a step after each epoch."""
  model = Mlp(rngs=nnx.Rngs(seed))
  optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

  @nnx.jit
  def train_step(model, optimizer, x, y):
    def loss_fn(model):
      losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
      return losses.mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))

  for epoch in range(epochs):
    start = time.perf_counter()
    for ids in batches(len(images), seed, epoch):
      train_step(model, optimizer, images[ids], labels[ids])
    yield model, None, seconds_a_step(model, start, len(images))


def train_robustly(images, labels, seed: int, epochs: int):
  """The same with `robust_labels`; yields what is known of the labels too."""
  robust = ranger.robust_labels(NUM_CLASSES)
  known = robust.init(images, labels)
  model = Mlp(rngs=nnx.Rngs(seed))
  optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

  @nnx.jit
  def train_step(model, optimizer, known, x, y, ids):
    def loss_fn(model):
      losses = robust.losses(known, model(x), y, ids)
      return losses.mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))

  for epoch in range(epochs):
    if epoch % 10 == 9:
      known = robust.ask(known, model.features(images), labels)
    start = time.perf_counter()
    for ids in batches(len(images), seed, epoch):
      train_step(model, optimizer, known, images[ids], labels[ids], ids)
    yield model, known, seconds_a_step(model, start, len(images))


METHODS = {"plain": ("AdamW", train_plainly), "ranger": ("Ranger", train_robustly)}
HINDSIGHT = "AdamW, stopped at the best epoch with hindsight"
# Which of the five steps are on; the others are chained into the optimizer.
STEPS = {"plain": "none", "ranger": "robust_labels (Ranger's steps 1 and 5)"}


def batches(n: int, seed: int, epoch: int) -> list[np.ndarray]:
  """Positions of the examples of each batch of an epoch."""
  order = np.random.default_rng([seed, epoch]).permutation(n)
  return np.split(order[: n // BATCH_SIZE * BATCH_SIZE], n // BATCH_SIZE)


def seconds_a_step(model: nnx.Module, start: float, n: int) -> float:
  """The mean time of the steps since `start`."""
  jax.block_until_ready(nnx.state(model))
  return (time.perf_counter() - start) / (n // BATCH_SIZE)


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


def train(method, data, epochs: int, seed: int, progress: tqdm.tqdm):
  """Trains one model; returns test accuracies, seconds a step, and what is known."""
  images, labels, _, test_images, test_labels = map(jnp.asarray, data)
  accuracies, seconds, known = [], [], None
  for model, known, pace in method(images, labels, seed, epochs):  # noqa: B007
    hits = model(test_images).argmax(axis=-1) == test_labels
    accuracies.append(float(hits.mean()))
    seconds.append(pace)
    progress.update()
  return accuracies, float(np.median(seconds)), known


def draw(path, results, noise, data, known) -> None:
  """Draws curves, the estimated confusion matrix and the most suspicious images."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure = plt.figure(figsize=(17, 5), layout="constrained")
  left, middle, right = figure.subfigures(
    1, 3, width_ratios=(1, 0.9, 1.1), squeeze=False
  )[0]
  axis = left.subplots()
  colors = {"plain": "tab:gray", "ranger": "tab:green"}
  for name, result in results.items():
    curves = result["curves"]
    epochs = np.arange(1, curves.shape[1] + 1)
    axis.plot(epochs, curves.mean(axis=0), color=colors[name], label=result["label"])
    axis.fill_between(
      epochs, curves.min(axis=0), curves.max(axis=0), color=colors[name], alpha=0.2
    )
  axis.set(xlabel="epoch", ylabel="accuracy on clean test images", ylim=(0, 1))
  axis.set_title(f"digits, {noise:.0%} of the training labels wrong")
  axis.grid(alpha=0.3)
  axis.legend(loc="lower right")

  axis = middle.subplots()
  axis.imshow(known.confusion, vmin=0, vmax=1)
  axis.set(xlabel="given label", ylabel="class", xticks=range(10), yticks=range(10))
  axis.set_title(
    f"estimated: {float(known.noise):.0%} of the labels wrong,\n"
    "chance of each label given the class"
  )

  images, given, true, _, _ = data
  suspicious = np.argsort(known.trust, kind="stable")[:20]
  right.suptitle(
    "the twenty least trusted labels: given \u2192 believed,\n"
    "green where the belief is right"
  )
  for axis, i in zip(right.subplots(4, 5).flat, suspicious, strict=True):
    believed = int(known.beliefs[i].argmax())
    axis.imshow(images[i].reshape(8, 8), cmap="gray_r")
    axis.set_title(
      f"{given[i]} \u2192 {believed}",
      color="tab:green" if believed == true[i] else "tab:red",
    )
    axis.axis("off")
  figure.savefig(path, dpi=100)
  plt.close(figure)


def main() -> None:
  """Trains both methods on every seed, prints the table and draws the picture."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--noise", type=float, default=0.4, help="share of wrong labels")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--epochs", type=int, default=60)
  parser.add_argument("--quick", action="store_true", help="one seed, few epochs")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  args = parser.parse_args()
  if args.quick:
    args.seeds, args.epochs = 1, 10
  if not 0 <= args.noise <= 1:
    parser.error(f"--noise must lie in [0, 1], got {args.noise}")

  results: dict[str, dict[str, Any]] = {}
  first: Any = None
  total = len(METHODS) * args.seeds * args.epochs
  with tqdm.tqdm(total=total, unit="epoch") as progress:
    for name, (label, method) in METHODS.items():
      progress.set_description(f"{label:>6}")
      runs = [
        train(method, load_digits(args.noise, seed), args.epochs, seed, progress)
        for seed in range(args.seeds)
      ]
      first = runs[0][2]
      results[name] = {
        "label": label,
        "curves": np.array([accuracies for accuracies, _, _ in runs]),
        "pace": 1e3 * float(np.median([seconds for _, seconds, _ in runs])),
      }

  print(f"digits, {args.noise:.0%} wrong labels, {args.seeds} seeds, test accuracy")
  print(f"{'':8}{'last epoch':>16}{'best epoch':>12}{'ms per batch':>14}  uses")
  for name, result in results.items():
    last, best = result["curves"][:, -1], result["curves"].max(axis=1)
    print(
      f"{result['label']:8}{f'{last.mean():.3f} ± {last.std():.3f}':>16}"
      f"{best.mean():>12.3f}{result['pace']:>14.2f}  {STEPS[name]}"
    )
  args.out.mkdir(parents=True, exist_ok=True)
  plain, robust = (results[name] for name in METHODS)
  table = {
    "problem": f"digits, {args.noise:.0%} wrong labels",
    "measure": "test accuracy",
    "better": "higher",
    "results": {
      plain["label"]: plain["curves"][:, -1].tolist(),
      HINDSIGHT: plain["curves"].max(axis=1).tolist(),
      robust["label"]: robust["curves"][:, -1].tolist(),
    },
    "baseline": HINDSIGHT,
    "ours": robust["label"],
  }
  (args.out / "noisy_labels.json").write_text(json.dumps(table, indent=1))
  picture = args.out / "noisy_labels.png"
  draw(picture, results, args.noise, load_digits(args.noise, 0), first)
  print(f"picture: {picture}")


if __name__ == "__main__":
  main()

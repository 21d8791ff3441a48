"""A small CNN on clothes, many of them labeled as the class that they resemble.

Fashion-MNIST from Debian's package dataset-fashion-mnist, or scikit-learn's digits
without it: 10,000 training images, 2,000 for validation, 10,000 for the test. 40% of
five classes are labeled as a class that looks alike (`--kind asymmetric`), or 40% of
all images as any other class (`symmetric`). Only test labels are clean.

With the same network and optimizer, untuned, `robust_labels` reaches 0.85 (asymmetric),
symmetric cross-entropy (Wang et al., 2019) 0.78 and cross-entropy 0.76. With symmetric
noise all are within a point. Label smoothing and generalized cross-entropy were no
better. `python examples/images.py` takes three minutes on two cores.
"""

import argparse
import gzip
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
from matplotlib import figure
import numpy as np
import optax
from sklearn import datasets
import tqdm

import optax_ranger as ranger

KINDS = ("asymmetric", "symmetric")
METHODS = ("cross-entropy", "symmetric cross-entropy", "Ranger")
BATCH_SIZE = 128
# Dress to coat, coat to pullover, shirt to T-shirt, sneaker to sandal, boot to sneaker.
ALIKE = np.array([0, 1, 2, 4, 2, 5, 0, 5, 8, 7])
predict = nnx.jit(lambda model, images: model(images).argmax(axis=-1))


class Cnn(nnx.Module):
  """Two convolutions that halve the image, and a hidden layer of 64."""

  def __init__(self, side: int, *, rngs: nnx.Rngs):
    self.conv1 = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
    self.conv2 = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
    self.hidden = nnx.Linear((side // 4) ** 2 * 16, 64, rngs=rngs)
    self.out = nnx.Linear(64, 10, rngs=rngs)

  def features(self, images: jax.Array) -> jax.Array:
    x = nnx.relu(self.conv2(nnx.relu(self.conv1(images[..., None]))))
    return nnx.relu(self.hidden(x.reshape(len(x), -1)))

  def __call__(self, images: jax.Array) -> jax.Array:
    return self.out(self.features(images))


def train(method: str, data, seed: int, epochs: int) -> list[list[float]]:
  """Returns two accuracies of each epoch: on noisy validation and clean test labels."""
  (images, labels), *held_out = jax.tree.map(jnp.asarray, data)
  robust, known = ranger.robust_labels(num_classes=10), None
  if method == "Ranger":
    known = robust.init(images.reshape(len(images), -1), labels)
  model = Cnn(images.shape[1], rngs=nnx.Rngs(seed))
  rate = optax.cosine_decay_schedule(2e-3, epochs * (len(images) // BATCH_SIZE))
  optimizer = nnx.Optimizer(model, optax.adamw(rate), wrt=nnx.Param)

  @nnx.jit
  def train_step(model, optimizer, known, x, y, ids):
    def loss_fn(model):
      if method == "Ranger":
        return robust.losses(known, model(x), y, ids).mean()
      losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
      if method == "symmetric cross-entropy":
        losses = 0.1 * losses + 4 * (1 - jnp.exp(-losses))
      return losses.mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))

  rng, accuracies = np.random.default_rng(seed), []
  for epoch in range(epochs):
    if method == "Ranger" and epoch % 2:
      known = robust.ask(known, model.features(images), labels)
    order = rng.permutation(len(images))
    for ids in np.split(order, range(BATCH_SIZE, len(order), BATCH_SIZE))[:-1]:
      train_step(model, optimizer, known, images[ids], labels[ids], ids)
    accuracies.append([float((predict(model, x) == y).mean()) for x, y in held_out])
  return accuracies


def load(folder: pathlib.Path, kind: str, size: int, seed: int):
  """Returns noisy training and validation examples, and clean test examples."""
  pixels, classes = datasets.load_digits(return_X_y=True)
  images, true = np.asarray(pixels).reshape(-1, 8, 8), np.asarray(classes)
  if folder.exists():
    files = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    raw = (gzip.decompress((folder / name).read_bytes()) for name in files)
    pixels, classes = (np.frombuffer(part, np.uint8) for part in raw)
    images, true = pixels[16:].reshape(-1, 28, 28), classes[8:]
  rng = np.random.default_rng(seed)
  others = (true + rng.integers(1, 10, len(true))) % 10
  wrong = ALIKE[true] if kind == "asymmetric" else others
  given = np.where(rng.random(len(true)) < 0.4, wrong, true)
  size = min(size, len(true) * 5 // 11)
  order = rng.permutation(len(true))[: size * 11 // 5]
  train, valid, test = np.split(order, [size, size * 6 // 5])
  given[test], scale = true[test], np.float32(images.max())
  return [(images[ids] / scale, given[ids]) for ids in (train, valid, test)]


def plot(path: pathlib.Path, curves: dict[str, np.ndarray], title: str) -> None:
  """Draws the test accuracy of each epoch: the mean and the range over seeds."""
  picture = figure.Figure(figsize=(8, 5), layout="constrained")
  axes = picture.subplots()
  for name, curve in curves.items():
    epochs, test = range(1, curve.shape[1] + 1), curve[:, :, 1]
    axes.plot(epochs, test.mean(axis=0), label=name)
    axes.fill_between(epochs, test.min(axis=0), test.max(axis=0), alpha=0.2)
  axes.set(xlabel="epoch", ylabel="accuracy on clean test images", title=title)
  axes.legend(loc="lower right")
  picture.savefig(path, dpi=100)


def main() -> None:
  """Trains with each method and seed, prints a table and writes the results."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kind", choices=KINDS, default="asymmetric")
  parser.add_argument("--folder", default="/usr/share/datasets/fashion-mnist")
  parser.add_argument("--quick", action="store_true", help="few images and epochs")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  args = parser.parse_args()
  seeds, epochs, size = (1, 2, 600) if args.quick else (5, 10, 10_000)
  folder, methods = pathlib.Path(args.folder), METHODS[args.quick :]
  data = [load(folder, args.kind, size, seed) for seed in range(seeds)]
  runs = [(method, seed) for method in methods for seed in range(seeds)]
  found = [train(method, data[seed], seed, epochs) for method, seed in tqdm.tqdm(runs)]
  curves = dict(zip(methods, np.reshape(found, [-1, seeds, epochs, 2]), strict=True))
  problem = f"{'Fashion-MNIST' if folder.exists() else 'digits'}, 40% {args.kind} noise"
  print(f"{problem}, {seeds} seeds, test accuracy: last epoch, best on validation")
  report = {"problem": problem, "measure": "test accuracy, last epoch", "results": {}}
  for method, curve in curves.items():
    best = curve[range(seeds), curve[:, :, 0].argmax(axis=1), 1]
    error = curve[:, -1, 1].std(ddof=min(1, seeds - 1)) / np.sqrt(seeds)
    print(f"{method:24}{curve[:, -1, 1].mean():.3f} ± {error:.3f}, {best.mean():.3f}")
    report["results"][method] = curve[:, -1, 1].tolist()
  report |= {"better": "higher", "baseline": METHODS[1], "ours": METHODS[2]}
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "images.json").write_text(json.dumps(report, indent=2))
  plot(args.out / "images.png", curves, problem)


if __name__ == "__main__":
  main()

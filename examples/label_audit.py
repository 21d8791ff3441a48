"""Finds wrong labels by their neighbors.

The program flips 40% of the labels of Fashion-MNIST (Debian's package
`dataset-fashion-mnist`; digits where it is missing), and asks `graph.audit` for the
most suspicious ones. The baseline is what you would do with scikit-learn: logistic
regression, cross-validated; the labels with the smallest probability are suspicious.
Votes of neighbors alone (`--score votes`) are worse than this, by 0.02.

The picture shows the most suspicious images, with the given and the suggested label.
For files of features and labels there is a command: `python -m optax_ranger audit`.

`python examples/label_audit.py` takes about two minutes on two cores for 60,000 images.
"""

import argparse
import gzip
import json
import pathlib
from typing import Any

import matplotlib
import numpy as np
from sklearn import datasets
from sklearn import decomposition
from sklearn import linear_model
from sklearn import metrics
from sklearn import model_selection
from sklearn import pipeline
import tqdm

from optax_ranger import graph

FASHION_FOLDER = pathlib.Path("/usr/share/datasets/fashion-mnist")
FASHION_NAMES = (
  "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
  "bag", "boot",
)  # fmt: skip


def load_fashion(folder: pathlib.Path) -> tuple[Any, np.ndarray, Any, Any]:
  """Returns features, true labels, class names and images."""

  def read(name: str) -> np.ndarray:
    raw = gzip.decompress((folder / name).read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)

  images = read("train-images-idx3-ubyte.gz")
  features = images.reshape(len(images), -1)
  return features, read("train-labels-idx1-ubyte.gz"), FASHION_NAMES, images


def load_digits() -> tuple[Any, np.ndarray, Any, Any]:
  """As `load_fashion`."""
  pixels, labels = datasets.load_digits(return_X_y=True)
  images = np.asarray(pixels, np.float32)
  names = [str(digit) for digit in range(10)]
  return images, np.asarray(labels), names, images.reshape(-1, 8, 8)


def flip(labels: np.ndarray, share: float, classes: int, seed: int) -> np.ndarray:
  """Labels of which a share is one of the other classes."""
  rng = np.random.default_rng(seed)
  given = labels.astype(np.int32)
  wrong = rng.choice(len(given), round(share * len(given)), replace=False)
  given[wrong] = (given[wrong] + rng.integers(1, classes, len(wrong))) % classes
  return given


def cross_validated(features: Any, given: Any, seed: int) -> np.ndarray:
  """The probability of each given label, by a classifier that has not seen it."""
  components = min(50, features.shape[1] - 1)
  model = pipeline.make_pipeline(
    decomposition.TruncatedSVD(components, random_state=seed),
    linear_model.LogisticRegression(max_iter=100),
  )
  probabilities = model_selection.cross_val_predict(
    model, features / abs(features).max(), given, cv=3, method="predict_proba"
  )
  return probabilities[np.arange(len(given)), given]


def draw(path: pathlib.Path, images, found: graph.Audit, given, true, names) -> None:
  """The forty most suspicious images: given, and what the neighbors say."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(5, 8, figsize=(13, 8.5), layout="constrained")
  for axis, i in zip(axes.flat, found.order, strict=False):
    color = "tab:green" if found.suggested[i] == true[i] else "tab:red"
    axis.imshow(images[i], cmap="gray_r")
    title = f"{names[given[i]]} \u2192 {names[found.suggested[i]]}"
    axis.set_title(title, color=color, fontsize=9)
    axis.axis("off")
  figure.suptitle("the most suspicious labels: given \u2192 suggested (green: right)")
  figure.savefig(path, dpi=80)


def main() -> None:
  """Flips labels, audits them, prints how well that worked, and shows it."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quick", action="store_true", help="digits, one seed")
  parser.add_argument("--data", choices=("fashion", "digits"))
  parser.add_argument("--folder", type=pathlib.Path, default=FASHION_FOLDER)
  parser.add_argument("--noise", type=float, default=0.4, help="share of wrong labels")
  parser.add_argument("--score", choices=("votes", "posterior"), default="posterior")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  args = parser.parse_args()
  is_fashion = args.folder.exists() if args.data is None else args.data == "fashion"
  loaded = load_fashion(args.folder) if is_fashion and not args.quick else load_digits()
  features, true, names, images = loaded

  neighbors = graph.build(features, 20)
  ours, baseline = f"graph.audit, {args.score}", "cross-validated logistic regression"
  results = {baseline: [], ours: []}
  for seed in tqdm.trange(1 if args.quick else 3):
    given = flip(true, args.noise, len(names), seed)
    wrong, predictions = given != true, None
    if args.score == "posterior":
      predictions = graph.held_out_predictions(features, given)
    found = graph.audit(neighbors, given, score=args.score, predictions=predictions)
    theirs = cross_validated(features, given, seed).argsort()
    for name, order in ((ours, found.order), (baseline, theirs)):
      ranks: Any = np.arange(len(order), 0, -1)
      auc = metrics.roc_auc_score(wrong[order], ranks)
      results[name].append(float(wrong[order][: wrong.sum()].mean()))
      tqdm.tqdm.write(f"{name:36} AUC {auc:.3f}, precision {results[name][-1]:.3f}")
    after = f"labels right before, after: {1 - args.noise:.3f}, "
    tqdm.tqdm.write(f"{after}{(found.suggested == true).mean():.3f}")

  args.out.mkdir(parents=True, exist_ok=True)
  draw(args.out / "label_audit.png", images, found, given, true, names)
  data = "digits" if images.shape[1] == 8 else "Fashion-MNIST"
  table = {
    "problem": f"{data}, {args.noise:.0%} wrong labels",
    "measure": "precision at the number of wrong labels",
    "better": "higher",
    "results": results,
    "baseline": baseline,
    "ours": ours,
  }
  (args.out / "label_audit.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
  main()

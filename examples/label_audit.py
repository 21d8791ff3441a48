"""Finds wrong labels by their neighborhoods: a picture for images, a table for text.

`python examples/label_audit.py` flips labels of Fashion-MNIST, or of digits where
Debian's package dataset-fashion-mnist is missing; `--data text` those of the
docstrings of Python's own library. `--score posterior` also asks held-out predictions,
and judges labels by both.
"""

import argparse
import ast
import gzip
import pathlib
import sysconfig
import time
from typing import Any

import jax
import matplotlib
import numpy as np
from sklearn import datasets
from sklearn import metrics
from sklearn.feature_extraction import text

from optax_ranger import graph

FASHION_FOLDER = pathlib.Path("/usr/share/datasets/fashion-mnist")
FASHION_NAMES = (
  "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
  "bag", "boot",
)  # fmt: skip
PACKAGES = ("asyncio", "email", "tkinter", "unittest", "xml", "multiprocessing")


def load_fashion(folder: pathlib.Path) -> tuple[Any, np.ndarray, Any, Any]:
  """Returns features, true labels, class names and images."""

  def read(name: str) -> np.ndarray:
    raw = gzip.decompress((folder / name).read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)

  images = read("train-images-idx3-ubyte.gz")
  features = images.reshape(len(images), -1)
  return features, read("train-labels-idx1-ubyte.gz"), FASHION_NAMES, images


def load_digits(folder: pathlib.Path) -> tuple[Any, np.ndarray, Any, Any]:
  """As `load_fashion`."""
  del folder
  pixels, labels = datasets.load_digits(return_X_y=True)
  names = [str(digit) for digit in range(10)]
  images = np.asarray(pixels, np.float32)
  return images, np.asarray(labels), names, images.reshape(-1, 8, 8)


def load_text(folder: pathlib.Path) -> tuple[Any, np.ndarray, Any, Any]:
  """Docstrings of packages of Python's library, as sparse TF-IDF features."""
  del folder
  kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
  library, texts, labels = pathlib.Path(sysconfig.get_path("stdlib")), [], []
  for label, package in enumerate(PACKAGES):
    for path in sorted((library / package).rglob("*.py")):
      if "test" in path.parts:
        continue
      tree = ast.parse(path.read_text(errors="replace"))
      documented = [node for node in ast.walk(tree) if isinstance(node, kinds)]
      found = [ast.get_docstring(node) or "" for node in documented]
      texts += [doc for doc in found if len(doc.split()) >= 12]
      labels += [label] * (len(texts) - len(labels))
  vectorizer = text.TfidfVectorizer(sublinear_tf=True, stop_words="english", min_df=2)
  features = vectorizer.fit_transform(texts)
  return features, np.asarray(labels), PACKAGES, texts


LOADERS = {"fashion": load_fashion, "digits": load_digits, "text": load_text}


def flip(labels: np.ndarray, share: float, classes: int, seed: int) -> np.ndarray:
  """Labels of which a share is one of the other classes."""
  rng = np.random.default_rng(seed)
  given = labels.astype(np.int32)
  wrong = rng.choice(len(given), round(share * len(given)), replace=False)
  given[wrong] = (given[wrong] + rng.integers(1, classes, len(wrong))) % classes
  return given


def draw(path: pathlib.Path, images, found: graph.Audit, given, true, names) -> None:
  """The forty most suspicious images: given, and what the neighbors say."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(5, 8, figsize=(13, 8.5), layout="constrained")
  for axis, i in zip(axes.flat, found.order, strict=False):
    right = found.suggested[i] == true[i]
    axis.imshow(images[i], cmap="gray_r")
    axis.set_title(
      f"{names[given[i]]} \u2192 {names[found.suggested[i]]}",
      color="tab:green" if right else "tab:red",
      fontsize=9,
    )
    axis.axis("off")
  figure.suptitle(
    "the forty most suspicious labels: given \u2192 suggested (green: that is right)"
  )
  figure.savefig(path, dpi=80)
  plt.close(figure)


def show(texts: list[str], found: graph.Audit, given, true, names, rows: int) -> None:
  """The most suspicious texts as a table."""
  print(f"\n{'given':16}{'suggested':16}{'true':16}{'support':>8}  text")
  for i in found.order[:rows]:
    start = " ".join(texts[i].split())[:56]
    print(
      f"{names[given[i]]:16}{names[found.suggested[i]]:16}{names[true[i]]:16}"
      f"{found.support[i]:8.2f}  {start}"
    )


def main() -> None:
  """Flips labels, audits them, prints how well that worked, and shows it."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", choices=LOADERS, help="default: fashion, or digits")
  parser.add_argument("--folder", type=pathlib.Path, default=FASHION_FOLDER)
  parser.add_argument("--noise", type=float, default=0.4, help="share of wrong labels")
  parser.add_argument("--k", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--score", choices=("votes", "posterior"), default="votes")
  parser.add_argument("--out", type=pathlib.Path, help="picture to write")
  args = parser.parse_args()
  if not 0 < args.noise < 1:
    parser.error(f"--noise must lie in (0, 1), got {args.noise}")
  kind = args.data or ("fashion" if args.folder.exists() else "digits")

  features, true, names, content = LOADERS[kind](args.folder)
  given = flip(true, args.noise, len(names), args.seed)
  start = time.perf_counter()
  neighbors, report = graph.build(
    features,
    args.k,
    metric="cosine" if kind == "text" else "euclidean",
    with_report=True,
  )
  jax.block_until_ready(neighbors)
  built = time.perf_counter() - start
  start = time.perf_counter()
  predictions = None
  if args.score == "posterior":
    predictions = graph.held_out_predictions(features, given)
  found = graph.audit(neighbors, given, score=args.score, predictions=predictions)
  audited = time.perf_counter() - start

  wrong = given != true
  suspicious = found.order[: wrong.sum()]
  backing = found.margin if args.score == "votes" else found.support
  auc = metrics.roc_auc_score(wrong, -np.nan_to_num(backing, nan=1))
  print(f"{kind}: {len(given)} examples, {wrong.mean():.0%} wrong labels, k = {args.k}")
  print(f"wrong labels, estimated without clean ones  {found.num_wrong:.0f}"
        f" of {wrong.sum()}")  # fmt: skip
  print(f"AUC                                   {auc:.4f}")
  print(f"precision at the number of flips      {wrong[suspicious].mean():.4f}")
  print(f"suggested labels that are right, of those  "
        f"{(found.suggested == true)[suspicious].mean():.4f}")  # fmt: skip
  print(f"labels right before, after            {(~wrong).mean():.4f},"
        f" {(found.suggested == true).mean():.4f}")  # fmt: skip
  print(f"graph ({report.backend}) {built:.1f} s, audit {audited:.2f} s")
  if kind == "text":
    show(content, found, given, true, names, 12)
  elif args.out:
    draw(args.out, content, found, given, true, names)
    print(f"picture: {args.out}")


if __name__ == "__main__":
  main()

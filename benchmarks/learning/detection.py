"""Who finds wrong labels: `python -m benchmarks.learning.detection`.

As many examples are flagged as there are wrong ones. Times are seconds of all
processor cores, with all that a method needs: graph, fits, folds or training.
Sets whose files are not given are skipped, and so is cleanlab where
`--cleanlab-python` cannot import it. Rows that are in the table already are not run
again.
"""

import argparse
import ast
from collections.abc import Iterator
import csv
import functools
import io
import pathlib
import pickle
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import Any
from typing import NamedTuple
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn import decomposition
from sklearn import metrics
from sklearn.feature_extraction import text
import tqdm

from benchmarks import _fashion
import optax_ranger as ranger
from optax_ranger import graph

COLUMNS = (
  "set", "seed", "method", "examples", "wrong", "false_negatives", "auc", "precision",
  "estimated", "seconds",
)  # fmt: skip
K = 20
CIFAR = {
  "worst": "worse_label",
  "random 1": "random_label1",
  "aggregate": "aggre_label",
}
# Fashion-MNIST: shirt to T-shirt, coat to pullover, sneaker to sandal, ankle boot to
# sneaker, dress to coat.
LOOK_ALIKES = np.array([0, 1, 2, 4, 2, 5, 0, 5, 8, 7])
PACKAGES = ("asyncio", "email", "tkinter", "unittest", "xml", "multiprocessing")
# Logistic regression in five folds, of three strengths that whose held-out chances fit
# the given labels best; its seconds are those of this strength only.
CLEANLAB = """
import sys, time, warnings
warnings.filterwarnings("ignore")
import numpy as np
from cleanlab import count, rank
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict
data = np.load(sys.argv[1])
x, given = data["x"] / data["x"].std(), data["given"]
tried = []
for strength in (0.01, 0.1, 1.0):
  start = time.process_time()
  model = LogisticRegression(C=strength, max_iter=100)
  folds = StratifiedKFold(5, shuffle=True, random_state=0)
  chances = cross_val_predict(model, x, given, cv=folds, method="predict_proba")
  seconds = time.process_time() - start
  tried.append((log_loss(given, chances), seconds, chances))
_, seconds, chances = min(tried, key=lambda one: one[0])
start = time.process_time()
score = rank.get_label_quality_scores(given, chances)
wrong = count.num_label_issues(given, chances)
seconds += time.process_time() - start
margin = rank.get_label_quality_scores(given, chances, method="normalized_margin")
np.savez(sys.argv[2], score=score, margin=margin, wrong=wrong, seconds=seconds)
"""


class Set(NamedTuple):
  """Features, given labels of which some are wrong, true ones, and the metric."""

  features: np.ndarray
  given: np.ndarray
  true: np.ndarray
  metric: str = "euclidean"


class Found(NamedTuple):
  """How well each label is backed, how many are wrong (estimated), and the time."""

  backing: np.ndarray
  num_wrong: float
  seconds: float


def symmetric(true: np.ndarray, share: float, seed: int) -> np.ndarray:
  """Labels of which a share is one of the other classes."""
  rng, classes = np.random.default_rng(seed), int(true.max()) + 1
  flipped = rng.random(len(true)) < share
  return np.where(
    flipped, (true + rng.integers(1, classes, len(true))) % classes, true
  ).astype(np.int32)


def pairs(true: np.ndarray, share: float, seed: int, to: np.ndarray) -> np.ndarray:
  """Labels of which a share is a certain other class, `to[class]`."""
  flipped = np.random.default_rng(seed).random(len(true)) < share
  return np.where(flipped, to[true], true).astype(np.int32)


def fashion(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
  images, labels = (_fashion.read_idx(args.fashion / f) for f in _fashion.FILES[:2])
  chosen = np.random.default_rng(0).permutation(len(images))[: args.size]
  rows = images[chosen].reshape(len(chosen), -1).astype(np.float32) / 255
  return rows, labels[chosen].astype(np.int32)


@functools.lru_cache(maxsize=1)
def cifar(features: pathlib.Path, human: pathlib.Path, size: int) -> Any:
  """256 principal components of features of CIFAR-10, and what people called them.

  Images are those of a file with arrays `f`, features, and `y`, classes; the i-th of
  a class is the i-th of that class among the people's labels.
  """
  with np.load(features) as file:
    rows, true = file["f"].astype(np.float32), file["y"].astype(np.int32)
  labels = read_pickle(human)
  place = np.empty([len(true)], np.int64)
  place[np.argsort(true, kind="stable")] = np.argsort(
    labels["clean_label"], kind="stable"
  )
  if (labels["clean_label"][place] != true).any():
    raise ValueError(f"{human} does not have the classes of {features}.")
  rows = decomposition.PCA(256, random_state=0).fit_transform(rows)
  chosen = np.random.default_rng(0).permutation(len(true))[:size]
  return (
    rows[chosen],
    true[chosen],
    {
      name: np.asarray(column, np.int32)[place][chosen]
      for name, column in labels.items()
    },
  )


class _ArraysOnly(pickle.Unpickler):
  """Admits NumPy's arrays, and nothing else."""

  def find_class(self, module_name: str, global_name: str) -> Any:
    arrays = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}
    if module_name.split(".")[0] == "numpy" and global_name in arrays:
      return super().find_class(module_name, global_name)
    if (module_name, global_name) == ("_codecs", "encode"):
      return super().find_class(module_name, global_name)
    raise pickle.UnpicklingError(f"{module_name}.{global_name} is not an array.")


def read_pickle(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Arrays of a PyTorch file, a zip with a pickle in it."""
  with zipfile.ZipFile(path) as file:
    (name,) = (one for one in file.namelist() if one.endswith("data.pkl"))
    return _ArraysOnly(io.BytesIO(file.read(name))).load()


def docstrings() -> tuple[np.ndarray, np.ndarray]:
  """128 singular vectors of TF-IDF of docstrings, rows of length one."""
  kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
  library, texts, labels = pathlib.Path(sysconfig.get_path("stdlib")), [], []
  for label, package in enumerate(PACKAGES):
    for path in sorted((library / package).rglob("*.py")):
      tree = ast.parse(path.read_text(errors="replace"))
      documented = [node for node in ast.walk(tree) if isinstance(node, kinds)]
      found = [ast.get_docstring(node) or "" for node in documented]
      texts += [doc for doc in found if len(doc.split()) >= 12]
      labels += [label] * (len(texts) - len(labels))
  words = text.TfidfVectorizer(sublinear_tf=True, stop_words="english", min_df=2)
  rows = decomposition.TruncatedSVD(128, random_state=0).fit_transform(
    words.fit_transform(texts)
  )
  rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
  return rows.astype(np.float32), np.asarray(labels, np.int32)


def table(path: pathlib.Path | None, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Standardized columns of a file with arrays `x` and `y`, or scikit-learn's."""
  if path is None:
    rows, labels = datasets.load_breast_cancer(return_X_y=True)
  else:
    with np.load(path) as file:
      rows, labels = file["x"], file["y"]
  rows, labels = np.asarray(rows, np.float32), np.asarray(labels, np.int32)
  chosen = np.random.default_rng(0).permutation(len(rows))[:size]
  rows, labels = rows[chosen], labels[chosen]
  return (rows - rows.mean(axis=0)) / np.maximum(rows.std(axis=0), 1e-9), labels


def sets(args: argparse.Namespace, seed: int) -> Iterator[tuple[str, Set]]:
  """Names, and sets."""
  if args.fashion.exists():
    rows, true = fashion(args)
    yield "Fashion-MNIST sym 40", Set(rows, symmetric(true, 0.4, seed), true)
    asymmetric = pairs(true, 0.4, seed, LOOK_ALIKES)
    yield "Fashion-MNIST asym 40", Set(rows, asymmetric, true)
    # Half as many of each class as of the one before it.
    kept = np.random.default_rng(0).random(len(true)) < 0.5**true
    few, rare = rows[kept], true[kept]
    yield (
      "Fashion-MNIST long-tailed, sym 20",
      Set(few, symmetric(rare, 0.2, seed), rare),
    )
    for share in (0, 20, 60) if args.rates else ():
      given = symmetric(true, share / 100, seed)
      yield f"Fashion-MNIST sym {share}", Set(rows, given, true)
  else:
    print(f"SKIPPED: Fashion-MNIST, no folder {args.fashion}")
  if args.features and args.human:
    # People's labels have no seed.
    for name, column in CIFAR.items() if not seed else ():
      rows, true, given = cifar(args.features, args.human, args.size)
      yield f"CIFAR-10N {name}", Set(rows, given[column], true)
  else:
    print("SKIPPED: CIFAR-10N, which needs --features and --human")
  words, package = docstrings()
  given = symmetric(package, 0.2, seed)
  yield "docstrings sym 20", Set(words, given, package, "cosine")
  following = (np.arange(len(PACKAGES)) + 1) % len(PACKAGES)
  given = pairs(package, 0.4, seed, following)
  yield "docstrings pairs 40", Set(words, given, package, "cosine")
  for path in args.tables or [None]:
    rows, true = table(path, args.size)
    name = "breast cancer" if path is None else path.stem
    for share in (20, 0, 40) if args.rates else (20,):
      yield f"{name} sym {share}", Set(rows, symmetric(true, share / 100, seed), true)


def methods(one: Set, args: argparse.Namespace) -> Iterator[tuple[str, Found]]:
  """Methods, by what they find. Graph and predictions are shared, their time is not."""

  def audit(name: str, spent: float, **arguments: Any) -> tuple[str, Found]:
    start = time.process_time()
    neighbors = arguments.pop("neighbors", None)
    found = graph.audit(neighbors, one.given, progress=False, **arguments)
    by_support = arguments.get("score") == "posterior"
    backing = found.support if by_support else found.margin
    seconds = spent + time.process_time() - start
    return name, Found(backing, found.num_wrong, seconds)

  start = time.process_time()
  neighbors = graph.build(one.features, K, metric=one.metric, progress=False)
  neighbors = jax.block_until_ready(neighbors)
  built = time.process_time() - start
  yield audit("k-NN votes", built, neighbors=neighbors)
  yield audit("k-NN votes, balance=True", built, neighbors=neighbors, balance=True)
  yield audit("posterior: votes", built, neighbors=neighbors, score="posterior")
  start = time.process_time()
  held_out = graph.held_out_predictions(one.features, one.given, progress=False)
  fitted = time.process_time() - start
  yield audit("held-out, margin", fitted, predictions=held_out, score="margin")
  yield audit("posterior: held-out", fitted, predictions=held_out, score="posterior")
  yield audit(
    "posterior: votes, held-out", built + fitted, neighbors=neighbors,
    predictions=held_out, score="posterior",
  )  # fmt: skip
  start = time.process_time()
  smoothed, contradicted = train(one, args.epochs)
  trained = time.process_time() - start
  past = {"contradicted": contradicted, "visits": args.epochs}
  yield audit("smoothed, margin", trained, predictions=smoothed, score="margin")
  yield audit("contradicted", trained, score="contradicted", **past)
  yield audit(
    "smoothed, mean", built + trained, neighbors=neighbors, predictions=smoothed,
    score="mean",
  )  # fmt: skip
  yield audit("posterior: smoothed", trained, predictions=smoothed, score="posterior")
  yield from cleanlab(one, args.cleanlab_python)


def train(one: Set, epochs: int) -> tuple[np.ndarray, np.ndarray]:
  """An MLP's smoothed predictions, and how often they contradicted each label."""
  n, d = one.features.shape
  classes, batch = int(one.given.max()) + 1, min(128, n)
  rows, given = jnp.asarray(one.features), jnp.asarray(one.given)
  rows = (rows - rows.mean()) / rows.std()
  sizes = (d, 256, 256, classes)
  keys = jax.random.split(jax.random.key(0), 3)
  params = [
    {"w": jax.random.normal(key, (a, b)) * (2 / a) ** 0.5, "b": jnp.zeros(b)}
    for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
  ]
  tx = optax.chain(
    ranger.smooth_predictions(n, classes, decay=0.9),
    optax.nadamw(1e-3, weight_decay=1e-3),
  )

  def logits_of(params: Any, rows: jax.Array) -> jax.Array:
    for layer in params[:-1]:
      rows = jax.nn.relu(rows @ layer["w"] + layer["b"])
    return rows @ params[-1]["w"] + params[-1]["b"]

  def step(carry: Any, ids: jax.Array) -> tuple[Any, None]:
    params, state, count = carry

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
      logits = logits_of(params, rows[ids])
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, given[ids])
      return losses.mean(), logits

    grads, logits = jax.grad(loss, has_aux=True)(params)
    count = count.at[ids].add(logits.argmax(axis=1) != given[ids])
    updates, state = tx.update(
      grads, state, params, predictions=jax.nn.softmax(logits), example_ids=ids
    )
    return (optax.apply_updates(params, updates), state, count), None

  epoch = jax.jit(lambda carry, ids: jax.lax.scan(step, carry, ids)[0])
  carry = params, tx.init(params), jnp.zeros(n, jnp.int32)
  rng = np.random.default_rng(0)
  for _ in range(epochs):
    order = rng.permutation(n)
    # The last batch is filled up from the start: these are visited twice.
    order = np.resize(order, -(-n // batch) * batch).reshape(-1, batch)
    carry = epoch(carry, jnp.asarray(order, jnp.int32))
  return np.asarray(ranger.smoothed_predictions(carry[1])), np.asarray(carry[2])


def cleanlab(one: Set, python: str) -> Iterator[tuple[str, Found]]:
  """Confident learning's scores of held-out chances, from another interpreter."""
  try:
    subprocess.run([python, "-c", "import cleanlab"], check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    print(f"SKIPPED: cleanlab, which {python} can't import (--cleanlab-python)")
    return
  with tempfile.TemporaryDirectory() as folder:
    data, result = (str(pathlib.Path(folder, name)) for name in ("a.npz", "b.npz"))
    np.savez(data, x=one.features, given=one.given)
    subprocess.run([python, "-c", CLEANLAB, data, result], check=True)
    with np.load(result) as file:
      wrong, seconds = float(file["wrong"]), float(file["seconds"])
      for name, key in (("cleanlab", "score"), ("cleanlab, margin", "margin")):
        yield name, Found(file[key], wrong, seconds)


def judged(one: Set, found: Found) -> dict[str, Any]:
  """Figures of a table's row."""
  wrong = one.given != one.true
  backing = np.nan_to_num(found.backing, nan=np.inf)
  flagged = np.argsort(backing, kind="stable")[: wrong.sum()]
  some = bool(wrong.any())
  auc = metrics.roc_auc_score(wrong, -np.clip(backing, -2, 2)) if some else np.nan
  # At the estimate, which needs no clean label, where there is one.
  count = wrong.sum() if np.isnan(found.num_wrong) else round(found.num_wrong)
  at_estimate = np.argsort(backing, kind="stable")[: max(1, count)]
  return {
    "examples": len(wrong),
    "wrong": f"{wrong.mean():.4f}",
    "false_negatives": f"{1 - wrong[flagged].mean() if some else np.nan:.4f}",
    "auc": f"{auc:.4f}",
    "precision": f"{wrong[at_estimate].mean():.4f}",
    "estimated": f"{found.num_wrong / len(wrong):.4f}",
    "seconds": f"{found.seconds:.2f}",
  }


def report(records: list[dict[str, str]]) -> str:
  """A Markdown table, the mean over seeds of each set and method."""
  lines = [
    "| set | method | false negatives | AUC | precision at the estimate"
    " | wrong, estimated | seconds |",
    "|---|---|---|---|---|---|---|",
  ]
  groups: dict[tuple[str, str], list[dict[str, str]]] = {}
  for record in records:
    groups.setdefault((record["set"], record["method"]), []).append(record)
  for (name, method), rows in groups.items():
    mean = lambda column, rows=rows: np.mean([float(row[column]) for row in rows])
    lines.append(
      f"| {name} | {method} | {mean('false_negatives'):.3f} | {mean('auc'):.3f}"
      f" | {mean('precision'):.3f} | {mean('wrong'):.3f}, {mean('estimated'):.3f}"
      f" | {mean('seconds'):.1f} |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  path = pathlib.Path
  parser.add_argument("--fashion", type=path, default=_fashion.FOLDER)
  parser.add_argument("--features", type=path, help="features of CIFAR-10 (.npz: f, y)")
  parser.add_argument("--human", type=path, help="labels of CIFAR-10N (.pt)")
  parser.add_argument("--tables", type=path, nargs="*", help=".npz files with x and y")
  parser.add_argument("--cleanlab-python", default=sys.executable)
  parser.add_argument("--size", type=int, default=10_000, help="examples of a set")
  parser.add_argument("--epochs", type=int, default=20)
  parser.add_argument("--seeds", type=int, default=1)
  parser.add_argument("--rates", action="store_true", help="other shares of wrong ones")
  parser.add_argument("--only", help="sets whose name holds this")
  parser.add_argument("--out", type=path, default=path("out/detection.csv"))
  args = parser.parse_args()
  args.out.parent.mkdir(parents=True, exist_ok=True)
  records = []
  if args.out.exists():
    with args.out.open(newline="") as file:
      records = list(csv.DictReader(file))
  done = {(record["set"], record["seed"]) for record in records}
  for seed in range(args.seeds):
    for name, one in tqdm.tqdm(sets(args, seed), desc=f"seed {seed}"):
      if (name, str(seed)) in done or (args.only and args.only not in name):
        continue
      for method, found in methods(one, args):
        record = {"set": name, "seed": str(seed), "method": method}
        records.append({**record, **judged(one, found)})
      with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(records)
  print(report(records))


if __name__ == "__main__":
  main()

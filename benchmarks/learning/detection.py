"""Who finds wrong labels: `python -m benchmarks.learning.detection`.

As many examples are flagged as there are wrong ones. Times are seconds of all
processor cores, with all that a method needs: graph, fits, folds or training.
Sets whose files are missing are skipped, and so is cleanlab where
`--cleanlab-python` cannot import it. Rows that are in the table already are not run
again.
"""

import argparse
from collections.abc import Iterator
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import metrics
from sklearn import preprocessing
import tqdm

from benchmarks import _table
from benchmarks.learning import _noise
from benchmarks.learning import _report
from benchmarks.learning import problems
from benchmarks.learning.problems._source import Missing
from benchmarks.learning.problems._source import Source
import optax_ranger as ranger
from optax_ranger import graph

COLUMNS = (
  "set", "seed", "method", "examples", "wrong", "false_negatives", "auc", "precision",
  "estimated", "seconds",
)  # fmt: skip
K = 20
# 20% of the labels flipped, half as many of each class as of the one before it.
_LONG_TAIL = ("long-tailed", 0.2)
_OTHER = (("symmetric", 0.0), ("symmetric", 0.6))
# Of each problem, the kinds of noise; the second ones only with --rates.
NOISES = {
  "fashion-mnist": ((("symmetric", 0.4), ("asymmetric", 0.4), _LONG_TAIL), _OTHER),
  "cifar10n": ((("worst", 0.4), ("random1", 0.17)), (("aggregate", 0.09),)),
  "text": ((("symmetric", 0.2), ("asymmetric", 0.4)), _OTHER),
  "satellite": ((("symmetric", 0.2), ("asymmetric", 0.2)), _OTHER),
  "letter": ((("symmetric", 0.4),), _OTHER),
}
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
  """Features, given labels of which some are wrong, and true ones."""

  features: np.ndarray
  given: np.ndarray
  true: np.ndarray


class Found(NamedTuple):
  """How well each label is backed, how many are wrong (estimated), and the time."""

  backing: np.ndarray
  num_wrong: float
  seconds: float


def sets(args: argparse.Namespace, seed: int) -> Iterator[tuple[str, Set]]:
  """Names, and sets."""
  folders = problems.folders_of(args.folder)
  for name, (usual, other) in NOISES.items():
    spec = problems.SPECS[name]
    try:
      source = spec.load(folders.get(name) or spec.folder)
    except Missing as error:
      print(f"SKIPPED: {name}. {error}", file=sys.stderr)
      continue
    for noise, rate in usual + other * args.rates:
      if seed and noise in source.given:
        continue  # People's labels have no seed.
      one = drawn(source, noise, rate, seed, args.size)
      if spec.scale == "columns":
        one = one._replace(features=np.asarray(preprocessing.scale(one.features)))
      yield f"{name}, {noise} {rate:.0%}", one


def drawn(source: Source, noise: str, rate: float, seed: int, size: int) -> Set:
  """At most `size` examples, the same for every seed and noise, with noisy labels."""
  chosen = np.random.default_rng(0).permutation(len(source.y))[:size]
  if noise == _LONG_TAIL[0]:
    kept = np.random.default_rng(1).random(len(chosen)) < 0.5 ** source.y[chosen]
    chosen, noise = chosen[kept], "symmetric"
  given = source.given.get(noise)
  to = source.next_class
  facts = _noise.Facts(
    source.classes,
    _noise.next_of(source.classes) if to is None else to,
    given=None if given is None else given[chosen],
  )
  x, true = source.x[chosen], source.y[chosen]
  rng = np.random.default_rng([seed, 1, round(100 * rate)])
  _, labels = _noise.KINDS[noise](rng, x, true, rate, facts)
  return Set(x.astype(np.float32), labels.astype(np.int32), true.astype(np.int32))


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
  neighbors = graph.build(one.features, K, progress=False)
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


# Methods of the tables; the file has all.
_SHOWN = (
  "k-NN votes", "k-NN votes, balance=True", "posterior: votes", "posterior: held-out",
  "posterior: votes, held-out", "smoothed, margin", "contradicted", "smoothed, mean",
  "cleanlab",
)  # fmt: skip


def report(records: list[dict[str, str]]) -> str:
  """False negatives and seconds as Markdown tables, means over seeds."""
  tables = (("false_negatives", 3), ("seconds", 1))
  return "\n\n".join(_one_figure(records, *each) for each in tables)


def _one_figure(records: list[dict[str, str]], column: str, digits: int) -> str:
  lines = []
  for name in dict.fromkeys(record["set"] for record in records):
    own = [record for record in records if record["set"] == name]
    cells = [name, str(own[0]["examples"]), f"{float(own[0]['wrong']):.1%}"]
    for method in _SHOWN:
      figures = [float(row[column]) for row in own if row["method"] == method]
      cells.append(f"{np.mean(figures):.{digits}f}" if figures else "-")
    lines.append(cells)
  return _report.markdown(["set", "examples", "wrong", *_SHOWN], lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  path = pathlib.Path
  problems.add_folders(parser)
  parser.add_argument("--cleanlab-python", default=sys.executable)
  parser.add_argument("--size", type=int, default=10_000, help="examples of a set")
  parser.add_argument("--epochs", type=int, default=20)
  parser.add_argument("--seeds", type=int, default=1)
  parser.add_argument("--rates", action="store_true", help="other shares of wrong ones")
  parser.add_argument("--only", help="sets whose name holds this")
  parser.add_argument("--out", type=path, default=path("out/detection.csv"))
  parser.add_argument(
    "--report", type=path, help="run nothing; print this file's tables"
  )
  args = parser.parse_args()
  if args.report:
    print(report(_table.read(args.report)))
    return
  args.out.parent.mkdir(parents=True, exist_ok=True)
  records = _table.read(args.out) if args.out.exists() else []
  done = {(record["set"], record["seed"]) for record in records}
  for seed in range(args.seeds):
    for name, one in tqdm.tqdm(sets(args, seed), desc=f"seed {seed}"):
      if (name, str(seed)) in done or (args.only and args.only not in name):
        continue
      for method, found in methods(one, args):
        record = {"set": name, "seed": str(seed), "method": method}
        records.append({**record, **judged(one, found)})
      _table.write(args.out, records, COLUMNS)
  print(report(records))


if __name__ == "__main__":
  main()

"""`robust_labels`, everything counted: `python -m benchmarks.speed.labels`."""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.learning import _ranger
from benchmarks.learning import _rivals
from benchmarks.learning import _training
from benchmarks.learning.problems import Problem
from benchmarks.learning.problems import Rows
from benchmarks.speed import _measure
import optax_ranger as ranger

_CLASSES, _BATCH, _WRONG = 10, 128, 0.4
_FEW = 256  # rows to validate on and to test on
# Networks, numbers of examples, and which ratio of times is aimed at.
_RUNS = (("mlp", 10_000, "1.3"), ("mlp", 50_000, "1.15"), ("cnn", 10_000, "1.1"))


def training_rows(
  rounds: int = 2, epochs: int = 30, scale: float = 1.0, runs: int = len(_RUNS)
) -> list[_measure.Row]:
  """Whole trainings, with one `ask` and with five, against cross-entropy.

  Both have weight decay and EMA. A tenth of the examples with `scale` 0.1.
  """
  plain = _rivals.RIVALS["averaged"]
  own = [_ranger.ABLATIONS["ask_once"], _ranger.RANGER]
  rows = []
  for model, size, reach in _RUNS[:runs]:
    size = round(scale * size)
    problem = clusters(size)
    turns = [
      functools.partial(
        _training.train, method, model, problem, method.settings, 0, epochs
      )
      for method in (*own, plain)
    ]
    contenders = [_measure.Contender(turn, temporaries=0) for turn in turns]
    *ours, rival = _measure.measure(f"{model} {size}", contenders, rounds)
    rows += [
      _measure.Row(
        f"{model.upper()} with robust_labels, {asks}, {size:,} images, {epochs} epochs",
        "cross-entropy",
        times,
        rival,
        reach,
      )
      for asks, times in zip(("one ask", "five asks"), ours, strict=True)
    ]
  return rows


def clusters(n: int, columns: int = 784) -> Problem:
  """Images of random classes, 40% of whose labels are wrong."""
  rng = np.random.default_rng(0)
  centers = rng.normal(size=[_CLASSES, columns])
  classes = rng.integers(0, _CLASSES, n + _FEW)
  images = centers[classes] + 4 * rng.normal(size=[n + _FEW, columns])
  others = (classes + rng.integers(1, _CLASSES, n + _FEW)) % _CLASSES
  labels = np.where(rng.random(n + _FEW) < _WRONG, others, classes)
  images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)
  few = Rows(images[n:], labels[n:])
  return Problem(
    train=Rows(images[:n], labels[:n]),
    valid=few,
    tuning=Rows(few.x[:0], few.y[:0]),
    test=few,
    true=jnp.asarray(classes[:n], jnp.int32),
    classes=_CLASSES,
    confusion=None,
    wrong=_WRONG,
    batch=_BATCH,
    steps=n // _BATCH,
  )


def many(n: int = 1_000_000, columns: int = 64, classes: int = 100) -> str:
  """Seconds of `init` and `ask` on many examples, and the peak of this process."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, classes, n)
  rows = rng.standard_normal([n, columns], np.float32)
  rows += rng.standard_normal([classes, columns], np.float32)[labels]
  wrong = rng.random(n) < _WRONG
  labels = np.where(wrong, rng.integers(0, classes, n), labels).astype(np.int32)
  robust, learned = ranger.robust_labels(classes), np.tanh(rows)
  start = time.perf_counter()
  known = jax.block_until_ready(robust.init(rows, labels, progress=True))
  middle = time.perf_counter()
  jax.block_until_ready(robust.ask(known, learned, labels, progress=True))
  end = time.perf_counter()
  peak = _measure.status("VmHWM")
  return (
    f"{n:,} examples of {columns} features and {classes} classes: init"
    f" {middle - start:.0f} s, ask {end - middle:.0f} s, peak {peak / 2**30:.1f} GiB"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--only", choices=("training", "many"))
  parser.add_argument("--n", type=int, default=1_000_000, help="how many are many")
  args = parser.parse_args()
  print(_measure.machine())
  if args.only in (None, "many"):  # First: the peak is of this process.
    print(many(args.n))
  if args.only in (None, "training"):
    print(_measure.table(training_rows(args.rounds)))


if __name__ == "__main__":
  main()

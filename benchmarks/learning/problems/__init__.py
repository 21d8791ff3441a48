"""The data of all learning studies: loaded, split by a seed, and made noisy.

`draw` gives a `Problem`. To add a data set, write a loader that takes a folder and
returns a `Source`, and add a `Spec` to `SPECS`.
"""

import argparse
from collections.abc import Callable
import functools
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.learning import _noise
from benchmarks.learning.problems import cifar10n
from benchmarks.learning.problems import images
from benchmarks.learning.problems import tables
from benchmarks.learning.problems import tasks
from benchmarks.learning.problems import text
from benchmarks.learning.problems._source import Source

Noise = tuple[str, float]


class Rows(NamedTuple):
  """Examples: ``x: float32 [n, d]``, ``y: int32 [n]`` or ``float32 [n]``."""

  x: jax.Array
  y: jax.Array


class Problem(NamedTuple):
  """What a method is given, and what it is judged by.

  Attributes:
    train: noisy rows.
    valid: as noisy; the epoch is chosen by them.
    tuning: as noisy, and maybe none; settings are chosen by them.
    test: clean rows.
    true: the right targets of `train`; nothing but a picture may see them.
    classes: the number of classes; 0 for regression.
    confusion: ``float [C, C]``, the chance of each label given the class; None where
      noise depends on more than the class.
    wrong: the share of wrong labels, which some rivals are told.
    batch: rows in a step.
    steps: steps in an epoch.
  """

  train: Rows
  valid: Rows
  tuning: Rows
  test: Rows
  true: jax.Array
  classes: int
  confusion: np.ndarray | None
  wrong: float
  batch: int
  steps: int


class Spec(NamedTuple):
  """How a data set is loaded, split and trained on.

  Attributes:
    load: ``folder -> Source``; raises `Missing` where data is not there.
    sizes: rows to train on, to validate on and to tune on: counts, or shares of the
      rows. All other rows are for the test, where there is no test set.
    batch: rows in a step.
    noises: kinds of noise and rates.
    models: names of networks.
    passes: passes over the clean training rows in an epoch.
    scale: "columns" to standardize each column by the clean training rows, "all"
      for one scale of all columns.
    folder: where data is looked for.
  """

  load: Callable[[pathlib.Path | None], Source]
  sizes: tuple[float, float, float]
  batch: int
  noises: tuple[Noise, ...]
  models: tuple[str, ...] = ("mlp",)
  passes: int = 1
  scale: str = ""
  folder: pathlib.Path | None = None


_CLEAN = ("symmetric", 0.0)
_FLIPS = (("symmetric", 0.2), ("symmetric", 0.4), ("asymmetric", 0.4))
_IMAGES = (*_FLIPS[:2], ("symmetric", 0.6), _FLIPS[2], _CLEAN)
_ROWS = (("none", 0.0), ("outlier features", 0.1), ("outlier features", 0.3))
_LABELS = (
  *_ROWS,
  ("conflicting duplicates", 0.1),
  ("conflicting duplicates", 0.2),
  ("boundary labels", 0.2),
  ("boundary labels", 0.4),
)
_TARGETS = (
  *_ROWS,
  ("heavy tails", 0.5),
  ("heavy tails", 1.0),
  ("gross errors", 0.2),
  ("gross errors", 0.4),
)
_SMALL = (0.6, 0.15, 0.0)
_HEADS = ("mlp", "linear")

SPECS = {
  # Wrong labels.
  "fashion-mnist": Spec(
    images.fashion,
    (10_000, 2_000, 10_000),
    128,
    _IMAGES,
    ("mlp", "cnn"),
    folder=images.FOLDER,
  ),
  "sklearn-digits": Spec(images.digits, (1_000, 300, 0), 16, _IMAGES),
  "cifar10n": Spec(
    cifar10n.load, (10_000, 2_000, 10_000), 128, tuple(cifar10n.NOISES.items()), _HEADS
  ),
  "text": Spec(text.load, (1_500, 300, 500), 32, _FLIPS, _HEADS),
  "satellite": Spec(
    tables.satellite,
    (3_000, 500, 1_500),
    64,
    _FLIPS,
    _HEADS,
    scale="columns",
    folder=tables.FOLDER,
  ),
  "letter": Spec(
    tables.letter,
    (8_000, 1_500, 5_000),
    128,
    _FLIPS,
    _HEADS,
    scale="columns",
    folder=tables.FOLDER,
  ),
  # Other noise.
  "digits": Spec(images.digits, _SMALL, 32, _LABELS, ("small",), scale="all"),
  "breast_cancer": Spec(
    tables.breast_cancer, _SMALL, 32, _LABELS, ("small",), 2, "columns"
  ),
  "wine": Spec(tables.wine, _SMALL, 32, _LABELS, ("small",), 4, "columns"),
  "diabetes": Spec(tables.diabetes, _SMALL, 32, _TARGETS, ("small",), 2, "columns"),
  "friedman1": Spec(tables.friedman1, _SMALL, 32, _TARGETS, ("small",), 1, "columns"),
  "friedman1 x 10": Spec(
    tables.large_friedman1, _SMALL, 32, _TARGETS, ("small",), 1, "columns"
  ),
}


@functools.lru_cache(maxsize=2)
def draw(
  name: str, noise: str, rate: float, seed: int, folder: pathlib.Path | None = None
) -> Problem:
  """Splits the rows by the seed, and then makes them noisy."""
  spec = SPECS[name]
  source = _load(name, folder or spec.folder)
  parts = _split(source, spec.sizes, seed)
  train = parts[0]
  x = [source.x[part] for part in parts]
  y = [source.y[part] for part in parts]
  test = (x.pop(), y.pop()) if source.test is None else source.test
  if spec.scale:
    axis = 0 if spec.scale == "columns" else None
    mean, spread = x[0].mean(axis=axis), x[0].std(axis=axis)
    spread = np.where(spread > 0, spread, 1)
    x, test = (
      [(part - mean) / spread for part in x],
      ((test[0] - mean) / spread, test[1]),
    )
  if not source.classes:
    mean, spread = y[0].mean(), y[0].std()
    y, test = (
      [(part - mean) / spread for part in y],
      (test[0], (test[1] - mean) / spread),
    )
  given = source.given.get(noise)
  facts = _noise.Facts(
    source.classes,
    _noise.next_of(source.classes) if source.next_class is None else source.next_class,
    log_chances=_noise.log_chances(x[0], y[0]) if noise == "boundary labels" else None,
  )
  rng = np.random.default_rng([seed, 1, round(100 * rate)])
  noisy = []
  for a, b, part in zip(x[:3], y[:3], parts, strict=False):
    own = facts._replace(given=None if given is None else given[part])
    spoil = _noise.KINDS[noise] if len(part) else _noise.none
    noisy.append(spoil(rng, a, b, rate, own))
  confusion, wrong = None, 0.0
  if source.classes:
    confusion = _noise.confusion_of(noise, rate, source.classes, facts.next_class)
    wrong = rate if given is None else float((given != source.y).mean())
    if confusion is not None:
      wrong = float(1 - np.diag(confusion).mean())
  as_target = jnp.int32 if source.classes else jnp.float32
  rows = lambda a, b: Rows(jnp.asarray(a, jnp.float32), jnp.asarray(b, as_target))
  return Problem(
    *(rows(*part) for part in (*noisy, test)),
    true=jnp.asarray(y[0], as_target),
    classes=source.classes,
    confusion=confusion,
    wrong=wrong,
    batch=spec.batch,
    steps=len(train) * spec.passes // spec.batch,
  )


def add_folders(parser: argparse.ArgumentParser) -> None:
  """Adds ``--folder``, which `folders_of` reads."""
  parser.add_argument(
    "--folder",
    action="append",
    default=[],
    metavar="[PROBLEM=]FOLDER",
    help="where data is; may be given several times",
  )


def folders_of(given: list[str]) -> dict[str, pathlib.Path]:
  """Of ``PROBLEM=FOLDER`` each, or a folder of all problems.

  A folder of one problem is that of all which share its data.
  """
  found = {}
  for one in given:
    name, _, path = one.rpartition("=")
    for problem in [name] if name else [*SPECS, *tasks.TASKS]:
      found[problem] = pathlib.Path(path)
  for problem, other in tasks.SHARED.items():
    if other in found:
      found.setdefault(problem, found[other])
  return found


def check(name: str, folder: pathlib.Path | None = None) -> None:
  """Raises `Missing` where a data set, or that of a task, is not there."""
  if name in SPECS:
    _load(name, folder or SPECS[name].folder)
  elif name in tasks.TASKS:
    tasks.TASKS[name].build(True, folder)


@functools.lru_cache(maxsize=2)
def _load(name: str, folder: pathlib.Path | None) -> Source:
  return SPECS[name].load(folder)


def _split(source: Source, sizes: Any, seed: int) -> list[np.ndarray]:
  """Rows to train on, to validate on, to tune on, and, at last, the others.

  Where there is no test set, every part has its share of every class.
  """
  rng, n = np.random.default_rng(seed), len(source.y)
  order = rng.permutation(n)
  counts = [round(size * n) if 0 < size < 1 else int(size) for size in sizes]
  if source.classes and source.test is None:
    # Sorted by class, then dealt out: each stretch of the order holds every class in
    # proportion.
    place = np.empty(n)
    for label in range(source.classes):
      own = order[source.y[order] == label]
      place[own] = (np.arange(len(own)) + rng.random()) / len(own)
    order = np.argsort(place, kind="stable")
    rng.shuffle(order[: counts[0]])
  return np.split(order, np.cumsum(counts))

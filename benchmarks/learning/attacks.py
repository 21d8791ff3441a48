"""Robust aggregators under attack: what is left of the accuracy by the worst one.

Seventeen members train together, some of them corrupted. Each sends the running mean of
its gradients (momentum). Corrupted members know what the honest ones send, and how it
is aggregated.
"""

import argparse
from collections.abc import Callable
import importlib
import importlib.util
import sys
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.learning import _report
from benchmarks.learning import _runner
from benchmarks.learning.problems import images
import optax_ranger as ranger

MEMBERS, CORRUPT = 17, (3, 7)
SPLITS = ("even", "Dirichlet 0.5")
_COLUMNS = ("problem", "aggregator", "corrupt", "split", "attack", "accuracy", "worst")
_HONEST = "mean of the honest members"


class Problem(NamedTuple):
  """Data and training.

  Attributes:
    load: the data.
    rows: to train on.
    width: of the hidden layer.
    steps: of training.
    rate: the learning rate.
  """

  load: Callable[..., Any]
  rows: int
  width: int
  steps: int
  rate: float


PROBLEMS = {
  "digits": Problem(images.digits, 1360, 32, 200, 1.0),
  "Fashion-MNIST": Problem(images.fashion, 10_200, 32, 300, 0.3),
}

# By the number of corrupted members.
AGGREGATORS: dict[str, Callable[[int], Any]] = {
  "mean": lambda f: ranger.aggregate_by_mean(),
  "median": lambda f: ranger.aggregate_by_median(),
  "trimmed mean": lambda f: ranger.aggregate_by_trimmed_mean(f / MEMBERS),
  "geometric median": lambda f: ranger.aggregate_by_geometric_median(),
  "Krum": ranger.aggregate_by_krum,
  "multi-Krum": lambda f: ranger.aggregate_by_krum(f, MEMBERS - f),
}
MIXED = {
  f"mixed {name}": lambda f, make=make: ranger.mix_nearest(make(f), f)
  for name, make in AGGREGATORS.items()
}


def _clipped(name: str) -> Callable[[int], Any]:
  """With the longest members clipped to the next first (ARC)."""

  def make(f: int) -> optax.GradientTransformation:
    quantile = 1 - 2 * f * (MEMBERS - f) / MEMBERS**2
    clip = ranger.clip_examples(quantile=quantile, rate=None)
    return optax.chain(clip, MIXED[name](f))

  return make


CLIPPED = {
  f"clipped {name}": _clipped(name)
  for name in ("mixed mean", "mixed trimmed mean", "mixed geometric median")
}
# Its CAF does not end where a member is far away; MDA and SMEA try 19,448 subsets.
BYZFL = {
  "ByzFL: Meamed": ("Meamed",),
  "ByzFL: NNM + trimmed mean": ("NNM", "TrMean"),
  "ByzFL: ARC + NNM + trimmed mean": ("ARC", "NNM", "TrMean"),
}


def byzfl(names: tuple[str, ...], corrupt: int) -> optax.GradientTransformation:
  """Aggregators of ByzFL one after the other, called on the host."""
  library: Any = importlib.import_module("byzfl.aggregators")
  functions = [getattr(library, name)(corrupt) for name in names]

  def aggregate(rows: Any) -> np.ndarray:
    rows = np.array(rows)  # ARC writes to them.
    for function in functions:
      rows = function(rows)
    return rows.astype(np.float32)

  def update(updates, state, params=None):
    del params
    row = jax.ShapeDtypeStruct(updates.shape[1:], updates.dtype)
    result = jax.pure_callback(aggregate, row, updates, vmap_method="sequential")
    return result, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _strongest(
  honest: jax.Array, aggregate: Callable[[jax.Array], jax.Array], candidates: jax.Array
) -> jax.Array:
  """Of what corrupted members could send, what moves the result furthest."""
  mean = honest.mean(axis=0)
  away = jax.lax.map(lambda sent: jnp.linalg.norm(aggregate(sent) - mean), candidates)
  away = jnp.where(jnp.isfinite(away), away, -jnp.inf)
  return candidates[jnp.argmax(away)]


def _inner_products(honest, aggregate):
  strengths = jnp.array([0.1, 0.5, 1.0, 2.0, 8.0])[:, None]
  return _strongest(honest, aggregate, -strengths * honest.mean(axis=0)[None])


def _little_is_enough(honest, aggregate):
  strengths = jnp.array([0.5, 1.0, 1.5, 2.5, 4.0])[:, None]
  spread = strengths * honest.std(axis=0)[None]
  mean = honest.mean(axis=0)[None]
  return _strongest(honest, aggregate, jnp.concatenate([mean - spread, mean + spread]))


# What all corrupted members send, from what the honest ones do; None: they train on
# wrong labels.
ATTACKS: dict[str, Callable[..., jax.Array] | None] = {
  "sign flip": lambda honest, _: -honest.mean(axis=0),
  "inner products": _inner_products,
  "ALIE": _little_is_enough,
  "mimic": lambda honest, _: honest[0],
  "zero": lambda honest, _: jnp.zeros_like(honest[0]),
  "label flips": None,
}


def split_rows(
  labels: np.ndarray, members: int, split: str, seed: int
) -> list[np.ndarray]:
  """Rows of each member: at random, or with classes of uneven shares."""
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(labels))
  if split == SPLITS[0]:
    return np.array_split(order, members)
  parts: list[list[int]] = [[] for _ in range(members)]
  for label in np.unique(labels):
    rows = order[labels[order] == label]
    shares = rng.dirichlet(np.full(members, 0.5))
    ends = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
    for part, piece in zip(parts, np.split(rows, ends), strict=True):
      part.extend(piece)
  # Whoever has no rows draws from all of them.
  return [np.array(part or order, int) for part in parts]


def _setup(problem: Problem, folder: Any, split: str, seed: int, quick: bool):
  """Data, the rows of each step [steps, members, 32], and the first parameters."""
  source = problem.load(folder)
  rng = np.random.default_rng(100 + seed)
  order = rng.permutation(len(source.y))
  rows = order[: problem.rows]
  test = (source.x[order[problem.rows :]], source.y[order[problem.rows :]])
  x, y = source.x[rows], source.y[rows]
  test_x, test_y = (part[:2000] for part in source.test or test)
  steps = 5 if quick else problem.steps
  parts = split_rows(y, MEMBERS, split, seed)
  drawn = np.stack([rng.choice(part, [steps, 32]) for part in parts], axis=1)
  shapes = [(x.shape[1], problem.width), (problem.width, 10)]
  params = [(rng.standard_normal(s) / np.sqrt(s[0]), np.zeros(s[1])) for s in shapes]
  as_floats = lambda leaf: jnp.asarray(leaf, jnp.float32)
  data = (as_floats(x), jnp.asarray(y), as_floats(test_x), jnp.asarray(test_y))
  return data, jnp.asarray(drawn), jax.tree.map(as_floats, params)


def _logits(params, x):
  (w, b), (v, c) = params
  return jax.nn.relu(x @ w + b[None]) @ v + c[None]


def _accuracy(problem: Problem, aggregator: Any, corrupt: int, attack: Any, given: Any):
  """The test accuracy at the end of training."""
  (x, y, test_x, test_y), drawn, params = given
  flat, unflatten = jax.flatten_util.ravel_pytree(params)
  flips = attack in ATTACKS and ATTACKS[attack] is None
  honest = MEMBERS - corrupt
  aggregate = lambda rows: aggregator.update(rows, aggregator.init(rows))[0]

  def gradient(flat, rows, is_corrupt):
    labels = jnp.where(is_corrupt, 9 - y[rows], y[rows]) if flips else y[rows]

    def loss(flat):
      logits = _logits(unflatten(flat), x[rows])
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.grad(loss)(flat)

  is_corrupt = jnp.arange(MEMBERS) >= honest

  def step(carry, rows):
    flat, momentum = carry
    fresh = jax.vmap(gradient, (None, 0, 0))(flat, rows, is_corrupt)
    momentum = 0.9 * momentum + 0.1 * fresh
    if attack == _HONEST:
      result = momentum[:honest].mean(axis=0)
    elif flips:
      result = aggregate(momentum)
    else:
      good = momentum[:honest]
      with_sent = lambda sent: jnp.concatenate(
        [good, jnp.broadcast_to(sent, (corrupt, len(sent)))]
      )
      choose: Any = ATTACKS[attack]
      sent = choose(good, lambda sent: aggregate(with_sent(sent)))
      result = aggregate(with_sent(sent))
    return (flat - problem.rate * result, momentum), None

  start = (flat, jnp.zeros([MEMBERS, len(flat)]))
  (flat, _), _ = jax.lax.scan(step, start, drawn)
  return (_logits(unflatten(flat), test_x).argmax(axis=1) == test_y).mean()


def pieces(args: argparse.Namespace) -> list[_runner.Piece]:
  del args
  names = [_HONEST, *AGGREGATORS, *MIXED, *CLIPPED]
  if importlib.util.find_spec("byzfl"):
    names += BYZFL
  else:
    print("ByzFL is left out: pip install byzfl", file=sys.stderr)
  return [
    {"problem": problem, "aggregator": name, "corrupt": str(corrupt)}
    for problem in PROBLEMS
    for corrupt in CORRUPT
    for name in names
  ]


def _aggregator(name: str, corrupt: int) -> Any:
  """None: the mean of the honest members."""
  if name in BYZFL:
    return byzfl(BYZFL[name], corrupt)
  return None if name == _HONEST else {**AGGREGATORS, **MIXED, **CLIPPED}[name](corrupt)


def run(piece: _runner.Piece, options: _runner.Options) -> dict[str, list[Any]]:
  """A row for each split and attack, all seeds and splits in one program."""
  problem, corrupt = PROBLEMS[piece["problem"]], int(piece["corrupt"])
  folder = options.folders.get(piece["problem"], images.FOLDER)
  seeds = range(1 if options.quick else 3)
  given = [
    _setup(problem, folder, split, seed, options.quick)
    for split in SPLITS
    for seed in seeds
  ]
  given = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)
  aggregator = _aggregator(piece["aggregator"], corrupt)
  rows = []
  for attack in (_HONEST,) if aggregator is None else ATTACKS:
    train = jax.jit(
      lambda all_given, attack=attack: jax.lax.map(
        lambda given: _accuracy(problem, aggregator, corrupt, attack, given), all_given
      )
    )
    found = np.asarray(train(given))
    for split, accuracies in zip(SPLITS, found.reshape(2, -1), strict=True):
      figures = {
        "accuracy": f"{accuracies.mean():.4f}",
        "worst": f"{accuracies.min():.4f}",
      }
      rows.append(piece | {"split": split, "attack": attack} | figures)
  return {"": rows}


def report(tables: dict[str, list[_runner.Row]]) -> str:
  """For each problem, the accuracy under the worst attack, and which it is."""
  texts = []
  for problem in PROBLEMS:
    lines = []
    for name in (_HONEST, *AGGREGATORS, *MIXED, *CLIPPED, *BYZFL):
      cells = [name]
      for corrupt in CORRUPT:
        for split in SPLITS:
          own = [
            (float(row["accuracy"]), row["attack"])
            for row in tables[""]
            if (row["problem"], row["aggregator"]) == (problem, name)
            and (row["corrupt"], row["split"]) == (str(corrupt), split)
          ]
          accuracy, attack = min(own, default=(np.nan, ""))
          cells.append(f"{accuracy:.3f}" + f" ({attack})" * (name != _HONEST))
      if any("nan" not in cell for cell in cells[1:]):
        lines.append(cells)
    if lines:
      heads = ["aggregator", *(f"{f} corrupt, {s}" for f in CORRUPT for s in SPLITS)]
      texts.append(
        f"**{problem}**, test accuracy under the worst attack, mean of the seeds\n\n"
        + _report.markdown(heads, lines)
      )
  return "\n\n".join(texts)


STUDY = _runner.Study(
  columns={"": _COLUMNS},
  key=_COLUMNS[:3],
  pieces=pieces,
  run=run,
  report=report,
)

"""Noise other than random wrong labels, on small problems.

Outliers among the features, near-duplicates with conflicting labels, wrong labels near
the boundary between classes, targets with heavy tails and gross errors. Each method has
three settings on every problem, kind of noise and seed; the one that is taken, once for
all problems with classes and once for all with numbers, is best on noisy validation.
"""

import argparse
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.learning import _method
from benchmarks.learning import _ranger
from benchmarks.learning import _report
from benchmarks.learning import _rivals
from benchmarks.learning import _runner
from benchmarks.learning import problems
from benchmarks.learning._method import Method
from benchmarks.learning._method import Settings
from benchmarks.learning._method import Sizes
from benchmarks.learning._method import usual
import optax_ranger as ranger

PROBLEMS = (
  "digits",
  "breast_cancer",
  "wine",
  "diabetes",
  "friedman1",
  "friedman1 x 10",
)
NUMBERS = ("diabetes", "friedman1", "friedman1 x 10")
_MOST_NEIGHBORS = 20
EPOCHS, _QUICK_EPOCHS = 40, 6


def optimizer(settings: Settings, sizes: Sizes) -> optax.GradientTransformation:
  """Gradients are clipped to norm 1, then weight decay, Nesterov's momentum and EMA."""
  return optax.chain(optax.clip_by_global_norm(1.0), _method.sgd(settings, sizes))


def huber(logits, labels, ids, memory, settings):
  del ids
  return optax.huber_loss(logits[:, 0], labels, delta=settings["delta"]), memory


def weighed(logits, labels, ids, memory, settings):
  """A weighted mean; with the regularizer of ELR where there is a table for it."""
  weights = memory["weights"][ids]
  losses = usual(logits, labels)
  if "table" in memory:
    losses, table = _rivals.early_learning(
      logits, labels, ids, memory["table"], settings
    )
    memory = {**memory, "table": table}
  return weights * losses / jnp.maximum(weights.mean(), 1e-6), memory


def backed(
  x: jax.Array, labels: jax.Array, sizes: Sizes, settings: Settings, elr: bool = False
) -> Any:
  """Weights of Ranger's steps 1 and 4: rows that their neighbors back count more.

  Of classes, neighbors that agree; of numbers, neighbors in row and target. With a
  Gaussian kernel, a row far from all others has no weight.
  """
  points, gaussian = x, settings.get("gaussian", 1.0) > 0
  if not sizes.classes:
    points = jnp.concatenate([x, settings["target_scale"] * labels[:, None]], axis=1)
  found = ranger.neighbors.nearest(points, k=_MOST_NEIGHBORS)
  distances = jnp.where(found.indices >= 0, found.distances, jnp.nan)
  found = ranger.neighbors.weigh(
    found,
    kernel="gaussian" if gaussian else "uniform",
    bandwidth=jnp.nanmedian(distances),
    labels=labels if sizes.classes else None,
  )
  k = int(settings.get("k", _MOST_NEIGHBORS))
  used, scaled = jnp.arange(_MOST_NEIGHBORS) < k, found.weights * (_MOST_NEIGHBORS / k)
  found = found._replace(weights=jnp.where(used[None], scaled, 0))
  weights = ranger.example_weights(ranger.ranger_head(), len(x), neighbors=found)
  both = {"weights": weights}
  if elr:
    both["table"] = _rivals.table(x, labels, sizes, settings)
  return both


def choose_by_targets(problem, fit, settings):
  """Drops targets many median deviations away from their neighbors' median."""
  del fit
  x, y = problem.train
  neighbors = ranger.neighbors.nearest(x, k=10)
  away = jnp.abs(y - jnp.median(y[neighbors.indices], axis=1))
  return away <= settings["deviations"] * jnp.median(away)


def scaled(x: jax.Array, labels: jax.Array, sizes: Sizes, settings: Settings) -> Any:
  """Weights by how far neighbors back each target, and the scale of the targets."""
  del sizes
  found = ranger.neighbors.nearest(x, k=_MOST_NEIGHBORS)
  support = ranger.labels.target_support(found, labels) ** settings["sharpness"]
  scale = ranger.labels.robust_scale(labels)
  return {"weights": support / support.mean(), "scale": scale, "least": 1e-3 * scale}


def scale_again(view: _method.View, memory: Any, settings: Settings) -> Any:
  """The scale follows the residuals, epoch by epoch."""
  del settings
  if not view.epoch:
    return memory
  residuals = view.logits()[:, 0] - view.labels
  scale = ranger.labels.robust_scale(residuals, center=0.0)
  return {**memory, "scale": jnp.maximum(scale, memory["least"])}


def regressed(logits, labels, ids, memory, settings):
  losses = ranger.labels.robust_regression_loss(
    logits[:, 0], labels, memory["scale"], slope=settings["slope"]
  )
  return memory["weights"][ids] * losses, memory


_COMMON = {"rate": 0.05, "decay": 1e-3, "ema": 0.99}
_ELR = {"prediction_decay": 0.7}
_RATES = _method.grid(rate=(0.02, 0.05, 0.1))


def _method_of(
  title: str, trials: Any, losses: Any = _method.usual_losses, **rest: Any
) -> Method:
  settings = {**_COMMON, **trials[0], **rest.pop("settings", {})}
  rest.setdefault("optimizer", optimizer)
  return Method(title, losses, settings, trials, **rest)


_BOTH = {
  "plain": _method_of("plain", _RATES, settings={"ema": 0.0}),
  "EMA": _method_of("EMA", _RATES),
  "Ranger: trimmed mean": _method_of(
    "Ranger: trimmed mean",
    # Near 0.5 it is the median, entry by entry.
    _method.grid(fraction=(0.1, 0.25, 0.45)),
    aggregate=lambda settings: ranger.aggregate_by_trimmed_mean(settings["fraction"]),
  ),
  "Ranger: geometric median": _method_of(
    "Ranger: geometric median",
    _RATES,
    aggregate=lambda settings: ranger.aggregate_by_geometric_median(),
  ),
}
_CLASSES = {
  "SCE, EMA": _method_of(
    "SCE, EMA",
    (
      {"forward": 0.1, "reverse": 1.0},
      {"forward": 1.0, "reverse": 1.0},
      {"forward": 0.1, "reverse": 0.3},
    ),
    _rivals.symmetric,
    settings={"log_of_zero": -4.0},
  ),
  "GCE, EMA": _method_of(
    "GCE, EMA", _method.grid(exponent=(0.3, 0.5, 0.7)), _rivals.generalized
  ),
  "ELR, EMA": _method_of(
    "ELR, EMA",
    _method.grid(strength=(1.0, 3.0, 7.0)),
    _rivals.early_learning,
    memory=_rivals.table,
    settings=_ELR,
  ),
  "k-NN filter, EMA": _method_of(
    "k-NN filter, EMA",
    _method.grid(k=(5.0, 10.0, 20.0)),
    _rivals.chosen_losses,
    choose=_rivals.choose_by_neighbors,
    settings={"first": 0.25},
  ),
  "Ranger: neighbor weights": _method_of(
    "Ranger: neighbor weights",
    (
      {"k": 10.0, "gaussian": 0.0},
      {"k": 10.0, "gaussian": 1.0},
      {"k": 20.0, "gaussian": 1.0},
    ),
    weighed,
    memory=backed,
  ),
  "Ranger: neighbor weights, ELR": _method_of(
    "Ranger: neighbor weights, ELR",
    _method.grid(strength=(1.0, 3.0, 7.0)),
    weighed,
    memory=functools.partial(backed, elr=True),
    settings={**_ELR, "k": 10.0, "gaussian": 1.0},
  ),
  "Ranger: robust labels": _method_of(
    "Ranger: robust labels",
    _method.grid(exponent=(0.3, 0.45, 0.6)),
    _ranger.losses,
    memory=_ranger.memory,
    between=_ranger.ask,
    settings={**_ranger.SETTINGS, **_COMMON},
  ),
}
_TARGETS = {
  "Huber, EMA": _method_of("Huber, EMA", _method.grid(delta=(0.1, 0.3, 1.0)), huber),
  "neighbor filter, EMA": _method_of(
    "neighbor filter, EMA",
    _method.grid(deviations=(2.0, 3.0, 5.0)),
    _rivals.chosen_losses,
    choose=choose_by_targets,
  ),
  "Ranger: robust regression": _method_of(
    "Ranger: robust regression",
    (
      {"slope": 0.3, "sharpness": 0.0},
      {"slope": 0.3, "sharpness": 1.0},
      {"slope": 1.0, "sharpness": 1.0},
    ),
    regressed,
    memory=scaled,
    between=scale_again,
  ),
  "Ranger: neighbors in row and target": _method_of(
    "Ranger: neighbors in row and target",
    _method.grid(target_scale=(1.0, 2.0, 4.0)),
    weighed,
    memory=backed,
  ),
}
_EVERY = {**_BOTH, **_CLASSES, **_TARGETS}
_ORDER = (
  "plain", "EMA", *list(_CLASSES)[:4], *list(_TARGETS)[:2], *list(_CLASSES)[4:],
  *list(_TARGETS)[2:], *list(_BOTH)[2:],
)  # fmt: skip
METHODS = {name: _EVERY[name] for name in _ORDER}
# Sorting every example's gradient takes a hundred times a plain step.
_SLOW = {
  "Ranger: trimmed mean": ("wine", "diabetes", "friedman1"),
  "Ranger: geometric median": ("wine", "diabetes", "friedman1", "breast_cancer"),
}
_BAD_ROWS = ("none", "outlier features", "heavy tails", "gross errors")


def suits(name: str, problem: str, noise: str) -> bool:
  """Whether a method is run on a problem with a kind of noise."""
  if name in (_CLASSES if problem in NUMBERS else _TARGETS):
    return False
  return name not in _SLOW or (problem in _SLOW[name] and noise in _BAD_ROWS)


def pieces(args: argparse.Namespace) -> list[_runner.Piece]:
  found = []
  for problem in PROBLEMS:
    noises = problems.SPECS[problem].noises
    for noise in (noises[0], noises[2], noises[-1]) if args.quick else noises:
      for name, method in METHODS.items():
        if suits(name, problem, noise[0]):
          found += [
            _runner.piece(problem, "small", name, noise, seed, _method.spelled(trial))
            for trial in method.trials
            for seed in range(1 if args.quick else args.seeds)
          ]
  return found


def run(piece: _runner.Piece, options: _runner.Options):
  epochs = _QUICK_EPOCHS if options.quick else EPOCHS
  return _runner.train(piece, options, METHODS[piece["method"]], epochs)


def task(row: _report.Row) -> tuple[str, str]:
  numbers = row["problem"] in NUMBERS
  return ("numbers" if numbers else "classes"), row["method"]


def chosen(rows: list[_runner.Row]) -> list[_runner.Row]:
  """The rows with the setting that is best on noisy validation over all problems."""
  best = {key: next(iter(found)) for key, found in _report.choose(rows, task).items()}
  return [row for row in rows if row["settings"] == best[task(row)]]


def report(rows: dict[str, list[_runner.Row]]) -> str:
  """For each problem a table of selected epochs, then one of last epochs."""
  figures, parts = _report.Figures(chosen(rows[""])), []
  whens = {"selected": "epoch chosen on noisy validation", "last": "last epoch"}
  for kind, when in whens.items():
    for place in figures.places():
      what = "R²" if place[0] in NUMBERS else "accuracy"
      table = _report.table(
        figures, place, _report.titles(METHODS), (kind,), seconds=False
      )
      parts.append(f"**{place[0]}**, test {what}, {when}\n\n{table}")
  scores = _report.choose(rows[""], task)
  if any(len(settings) > 1 for settings in scores.values()):
    parts.append(_report.settings_table(scores, ("task", "method")))
  return "\n\n".join(parts)


def draw(path: pathlib.Path, rows: dict[str, list[_runner.Row]]) -> None:
  """How far each method is from the EMA alone, by problem and kind of noise."""
  figures, plt = _report.Figures(chosen(rows[""])), _report.pyplot()
  places = figures.places()
  names = [name for name in METHODS if name != "EMA"]
  widths = [len(figures.noises(*place)) for place in places]
  figure, axes = plt.subplots(
    1,
    len(places),
    figsize=(4 + 0.62 * sum(widths), 6.4),
    layout="constrained",
    sharey=True,
    squeeze=False,
    width_ratios=widths,
  )
  image = None
  for axis, place in zip(axes[0], places, strict=True):
    noises = figures.noises(*place)
    grid = np.full([len(names), len(noises)], np.nan)
    for i, name in enumerate(names):
      for j, noise in enumerate(noises):
        own, other = (figures.of(place, x, noise, "selected") for x in (name, "EMA"))
        if len(own) and len(other):
          grid[i, j] = 100 * (own.mean() - other.mean())
          axis.text(j, i, f"{grid[i, j]:+.0f}", ha="center", va="center", fontsize=8)
    image = axis.imshow(grid, cmap="RdYlGn", vmin=-15, vmax=15, aspect="auto")
    axis.set_title(place[0])
    axis.set_xticks(
      range(len(noises)), [_report.heading(n) for n in noises], rotation=90
    )
    axis.set_yticks(range(len(names)), names)
  if image is not None:
    figure.colorbar(image, ax=axes[0], label="points above EMA with early stopping")
  figure.suptitle("Accuracy or R², in hundredths, beside EMA with early stopping")
  figure.savefig(path, dpi=90)
  plt.close(figure)


STUDY = _runner.Study(
  columns={"": _runner.FIGURES},
  key=_runner.FIGURES[:7],
  pieces=pieces,
  run=run,
  report=report,
  draw=draw,
)

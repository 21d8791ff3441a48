"""Training on wrong labels: images, frozen features, text and tables."""

import argparse
import functools
import pathlib

import numpy as np

from benchmarks import _table
from benchmarks.learning import _method
from benchmarks.learning import _noise
from benchmarks.learning import _ranger
from benchmarks.learning import _report
from benchmarks.learning import _rivals
from benchmarks.learning import _runner
from benchmarks.learning import problems

METHODS = {**_rivals.RIVALS, "ranger": _ranger.RANGER, "ranger_tuned": _ranger.TUNED}
EVERYTHING = {**METHODS, **_ranger.ABLATIONS}
PROBLEMS = (
  "fashion-mnist",
  "sklearn-digits",
  "cifar10n",
  "text",
  "satellite",
  "letter",
)
# On the CNN, which is slow, the methods that are best in the mean of the MLP's columns.
_CNN = ("averaged", "sce", "deep_knn", "cleanlab", "ranger", "ranger_tuned")
_QUICK = ("averaged", "sce", "elr", "ranger")
DEVELOPMENT_SEEDS = (100,)
EPOCHS, _QUICK_EPOCHS = 30, 8
_DRAWN = {
  "cross_entropy": "0.6",
  "averaged": "black",
  "gce": "tab:orange",
  "sce": "tab:red",
  "elr": "tab:blue",
  "deep_knn": "tab:purple",
  "ranger": "tab:green",
}


def pieces(args: argparse.Namespace) -> list[_runner.Piece]:
  """Every method under every noise; settings are those that `--tune` has found."""
  chosen = tuned(args.out / "wrong_labels_tuning.csv")
  found = []
  for problem in PROBLEMS:
    spec = problems.SPECS[problem]
    for model in spec.models[:1] if args.quick else spec.models:
      noises = (spec.noises[1], spec.noises[-2]) if args.quick else spec.noises
      names = list(_QUICK) if args.quick else [*METHODS]
      if model == "cnn":
        names = list(_CNN)
      elif not args.quick and (problem, model) == ("fashion-mnist", "mlp"):
        names += _ranger.ABLATIONS
      elif model == "linear":
        names += ["no_decay"]  # It costs a linear head most.
      for name in names:
        count = 1 if args.quick else args.seeds
        if model == "cnn" or name in _ranger.ABLATIONS:
          count = min(count, 3)
        for noise in noises:
          if name in _ranger.ABLATIONS and not noise[1]:
            continue
          settings = "" if args.quick else chosen(problem, model, name, noise)
          found += [
            _runner.piece(problem, model, name, noise, seed, settings)
            for seed in range(count)
          ]
  return found


def trials(args: argparse.Namespace) -> list[_runner.Piece]:
  """Every setting of every method under every noise, by the first network alone."""
  return [
    _runner.piece(problem, model, name, noise, seed, _method.spelled(trial))
    for problem in PROBLEMS
    for model in problems.SPECS[problem].models[:1]
    for name, method in METHODS.items()
    if not args.quick or name in _QUICK
    for noise in problems.SPECS[problem].noises
    for trial in method.trials
    for seed in DEVELOPMENT_SEEDS
  ]


def tuned(path: pathlib.Path):
  """The settings that are best on noisy tuning examples, for each data set and noise.

  A network without trials has those of the MLP.
  """
  group = lambda row: tuple(row[name] for name in _runner.CELL)
  scores = _report.choose(_table.read(path) if path.exists() else [], group)
  best = {key: next(iter(settings)) for key, settings in scores.items()}

  def chosen(problem, model, method, noise):
    cell = (method, noise[0], f"{noise[1]:g}")
    return best.get((problem, model, *cell)) or best.get((problem, "mlp", *cell), "")

  return chosen


def run(piece: _runner.Piece, options: _runner.Options):
  epochs = _QUICK_EPOCHS if options.quick else EPOCHS
  curves = (piece["model"], piece["seed"]) == ("mlp", "0")
  return _runner.train(piece, options, EVERYTHING[piece["method"]], epochs, curves)


def report(rows: dict[str, list[_runner.Row]]) -> str:
  """For each problem and model: the table, the summary, and paired differences."""
  figures, names = _report.Figures(rows[""]), _report.titles(EVERYTHING)
  parts = []
  for place in figures.places():
    parts += [table(figures, place), _report.summary(figures, place, SHORT)]
    for ours in ("ranger", "ranger_tuned"):
      for told in (True, False):
        judged = functools.partial(_report.verdicts, ours=ours, told=told)
        parts.append(judged(figures, place, names, _rivals.RIVALS))
    parts.append(_report.ablations(figures, place, _report.titles(_ranger.ABLATIONS)))
  return "\n\n".join(part for part in parts if part.count("\n") > 1)


_METHOD_TITLES = _report.titles(METHODS)
# The short table has every method that is best in a column, and the simplest two.
SHORT = {
  name: METHODS[name].title
  for name in (
    *("cross_entropy", "averaged", "label_smoothing", "gce", "sce", "cleanlab"),
    "ranger",
  )
}


def table(figures: _report.Figures, place: tuple[str, str]) -> str:
  return (
    f"{place[0]}, {place[1].upper()}, test accuracy: last epoch / epoch chosen on noisy"
    " validation labels, mean ± standard deviation over seeds\n\n"
    + _report.table(figures, place, _METHOD_TITLES, seconds=False)
  )


def draw(path: pathlib.Path, rows: dict[str, list[_runner.Row]]) -> None:
  """Accuracy over noise, curves, the pull of wrong labels; and confusion matrices."""
  figures, plt = _report.Figures(rows[""]), _report.pyplot()
  for problem, model in figures.places():
    if model == "mlp" and len(figures.noises(problem, model)) > 1:
      own = [row for row in rows["curves"] if row["problem"] == problem]
      at = path.with_stem(f"{path.stem}_{problem}")
      _draw_problem(plt, at, figures, problem, own)
      matrices = [row for row in rows["confusion"] if row["problem"] == problem]
      _draw_confusion(plt, at.with_stem(f"{at.stem}_confusion"), problem, matrices)


def _draw_problem(plt, path, figures, problem, curves) -> None:
  figure, axes = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
  noises = sorted(figures.noises(problem, "mlp"), key=lambda noise: noise[1])
  even = [noise for noise in noises if noise[0] == "symmetric"] or noises
  followed = (noises[-1], even[len(even) // 2])
  for name, color in _DRAWN.items():
    style = {"color": color, "linewidth": 2.5 if name == "ranger" else 1.3}
    points = [
      (noise[1], figures.of((problem, "mlp"), name, noise, "last")) for noise in even
    ]
    points = [(rate, values) for rate, values in points if len(values)]
    if points:
      means, spreads = ([f(v) for _, v in points] for f in (np.mean, np.std))
      rates = [rate for rate, _ in points]
      axes[0].errorbar(rates, means, spreads, label=METHODS[name].title, **style)
    for axis, noise, what in zip(
      axes[1:], followed, ("test", "wrong_share"), strict=True
    ):
      cell = (name, noise[0], f"{noise[1]:g}")
      own = [r for r in curves if (r["method"], r["noise"], r["rate"]) == cell]
      axis.plot([int(r["epoch"]) for r in own], [float(r[what]) for r in own], **style)
  axes[0].set(xlabel="share of wrong labels", ylabel="test accuracy, last epoch")
  axes[0].legend(fontsize=8)
  axes[1].set(xlabel="epoch", ylabel="test accuracy")
  axes[2].set(xlabel="epoch", ylabel="share of the pull that comes from wrong labels")
  for axis, noise in zip(axes[1:], followed, strict=True):
    axis.set_title(f"{problem}, {_report.heading(noise)}")
  for axis in axes:
    axis.grid(alpha=0.3)
  figure.savefig(path, dpi=90)
  plt.close(figure)


def _draw_confusion(plt, path, problem, rows) -> None:
  """The matrices that Ranger ends with, beside the true ones where they are known."""
  kinds = [(r["noise"], float(r["rate"])) for r in rows if r["method"] == "ranger"]
  kinds = [noise for noise in dict.fromkeys(kinds) if noise[1]][:4]
  if not kinds:
    return
  figure, axes = plt.subplots(
    2, len(kinds), figsize=(4 * len(kinds), 8), layout="constrained", squeeze=False
  )
  for noise, column in zip(kinds, axes.T, strict=True):
    own = [r for r in rows if (r["noise"], float(r["rate"])) == noise]
    own = [r for r in own if r["method"] == "ranger"]
    found = np.zeros([1 + max(int(row["class"]) for row in own)] * 2)
    for row in own:
      found[int(row["class"]), int(row["label"])] = float(row["chance"])
    to = problems.images.MISTAKEN_FOR if len(found) == 10 else None
    true = _noise.confusion_of(*noise, len(found), to)
    for axis, matrix, what in zip(
      column, (true, found), ("true", "estimated"), strict=True
    ):
      if matrix is not None:
        axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
      axis.set(xlabel="label", ylabel="class")
      axis.set_title(f"{problem}, {_report.heading(noise)}, {what}")
  figure.savefig(path, dpi=90)
  plt.close(figure)


STUDY = _runner.Study(
  columns={
    "": _runner.FIGURES,
    "curves": _runner.CURVES,
    "confusion": _runner.CONFUSION,
  },
  key=_runner.FIGURES[:6],
  pieces=pieces,
  run=run,
  report=report,
  draw=draw,
  trials=trials,
)

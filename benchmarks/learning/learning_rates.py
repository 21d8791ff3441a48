"""Training from any learning rate.

Every optimizer runs on every task from starting rates of 1e-5 to 1, for as many steps,
with the same seeds; a method that calls itself free of learning rates is given the rate
as its multiplier. And every optimizer has one attempt, at its own rate, at small
problems that are hard in one way each.
"""

import argparse
from collections.abc import Callable
import pathlib
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from benchmarks.learning import _report
from benchmarks.learning import _rival_rates
from benchmarks.learning import _runner
from benchmarks.learning.problems import small
from benchmarks.learning.problems import tasks
import optax_ranger as ranger
from optax_ranger._core import parts

RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SMALL = "small"
_COLUMNS = ("problem", "optimizer", "rate", "train_loss", "test", "worst_test")
_SMALL_COLUMNS = ("problem", "optimizer", "small", "worst_loss", "solved")
# No commas: --only splits at them.
_REFERENCE, _NADAMW = "cosine adamw", "nadamw"


# Names of ours.
_NGS, _AROUND = "NGS", "NGS around adamw"
_NGS_DECAY, _AROUND_DECAY = "NGS then decay", "NGS around adamw then decay"
_CAUTIOUS_DECAY = "NGS around cautious adamw then decay"


def _ngs(rate: Any, schedule: Any = None) -> Any:
  step = ranger.scale_by_ngs(schedule=schedule)
  return optax.chain(step, optax.scale_by_learning_rate(rate))


def _decay(steps: int) -> Any:
  """One for half of the steps, then down to zero."""
  return optax.linear_schedule(1.0, 0.0, steps // 2, steps // 2)


def _around_decay(rate: Any, steps: int) -> Any:
  return ranger.accelerate(optax.adamw(rate, b2=0.99), schedule=_decay(steps))


def _cautious_decay(rate: Any, steps: int) -> Any:
  inner = ranger.mask_contradictions(optax.adamw(rate, b2=0.99))
  return ranger.accelerate(inner, schedule=_decay(steps))


def _cautious_cosine(rate: Any, steps: int) -> Any:
  return ranger.mask_contradictions(optax.adamw(_rival_rates.cosine(rate, steps)))


def _in_parts(tx: Any) -> Any:
  """Looks at an eighth of every leaf that can be split, however small."""

  def split(function):
    def run(*args, **extra):
      with mock.patch.object(parts, "SMALLEST", 1):
        return function(*args, **extra)

    return run

  return optax.GradientTransformationExtraArgs(split(tx.init), split(tx.update))


def _nesterov(rate: Any) -> Any:
  return optax.sgd(rate, momentum=0.9, nesterov=True)


# Of a rate and the number of steps.
OPTIMIZERS: dict[str, Callable[[Any, int], Any]] = {
  _NGS: lambda rate, _: _ngs(rate),
  _NGS_DECAY: lambda rate, steps: _ngs(rate, _decay(steps)),
  _AROUND: lambda rate, _: ranger.accelerate(optax.adamw(rate)),
  _AROUND_DECAY: _around_decay,
  _CAUTIOUS_DECAY: _cautious_decay,
  "NGS in parts": lambda rate, _: _in_parts(_ngs(rate)),
  "NGS around adamw in parts": lambda rate, _: _in_parts(
    ranger.accelerate(optax.adamw(rate))
  ),
  "Nesterov SGD": lambda rate, _: _nesterov(rate),
  "adamw": lambda rate, _: optax.adamw(rate),
  _REFERENCE: lambda rate, steps: optax.adamw(_rival_rates.cosine(rate, steps)),
  "cautious cosine adamw": _cautious_cosine,
  _NADAMW: lambda _, steps: _rival_rates.nadamw(_rival_rates.NADAMW, steps),
  "muon": lambda rate, _: contrib.muon(rate),
  "prodigy": lambda rate, _: contrib.prodigy(rate),
  "dadapt_adamw": lambda rate, _: contrib.dadapt_adamw(rate),
  "schedule_free_sgd": lambda rate, _: contrib.schedule_free_sgd(rate),
  "schedule_free_adamw": lambda rate, _: contrib.schedule_free_adamw(rate),
  "mechanic (sgd)": lambda rate, _: contrib.mechanize(_nesterov(rate)),
  "cocob": lambda rate, _: contrib.cocob(rate),
  "adam-hd": lambda rate, _: _rival_rates.adam_hd(rate),
}
# The rate that each has where it has one attempt: its own default, or what is usual.
OWN = {
  _NGS: 1.0,
  _NGS_DECAY: 1.0,
  "Nesterov SGD": 0.01,
  _NADAMW: _rival_rates.NADAMW[0],
  "muon": 0.02,
  "prodigy": 1.0,
  "dadapt_adamw": 1.0,
  "schedule_free_sgd": 1.0,
  "schedule_free_adamw": 0.0025,
  "mechanic (sgd)": 1.0,
  "cocob": 1.0,
}


def pieces(args: argparse.Namespace) -> list[_runner.Piece]:
  del args
  names = (*tasks.TASKS, SMALL)
  # In parts: the problems of the first table.
  return [
    {"problem": name, "optimizer": x}
    for name in names
    for x in OPTIMIZERS
    if "in parts" not in x
    or name in ("digits", "Fashion-MNIST", "characters", "quadratic")
  ]


def run(piece: _runner.Piece, options: _runner.Options) -> dict[str, list[Any]]:
  """A row for each rate, or one for all small problems, with a table of its own."""
  name, optimizer = piece["problem"], piece["optimizer"]
  make, seeds = OPTIMIZERS[optimizer], 1 if options.quick else 2
  own = OWN.get(optimizer, 1e-3)
  if name == SMALL:
    return _run_small(piece, make, own, seeds, options.quick)
  spec = tasks.TASKS[name]
  rates = (own,) if optimizer == _NADAMW else tuple(sorted({*RATES, own}))
  task = spec.build(options.quick, options.folders.get(name))
  loss, test = tasks.train(task, make, jnp.asarray(rates), range(seeds))
  # A non-finite loss has diverged.
  loss, test = np.where(np.isfinite(loss), loss, np.inf), spec.finite(test)
  figures = zip(
    rates, loss.mean(axis=1), test.mean(axis=1), spec.worst(test), strict=True
  )
  numbers = [[f"{rate:g}", *(f"{x:.4g}" for x in rest)] for rate, *rest in figures]
  return {"": [piece | dict(zip(_COLUMNS[2:], x, strict=True)) for x in numbers]}


def _run_small(piece, make, own, seeds, quick):
  rows, count = [], 0
  for name, problem in small.PROBLEMS.items():
    short = problem._replace(steps=20) if quick else problem
    losses = small.final_losses(short, lambda steps: make(own, steps), seeds)
    # What isn't a number isn't below either.
    solved = int((losses < problem.threshold).all())
    count += solved
    rows.append({"small": name, "worst_loss": f"{losses.max():.4g}", "solved": solved})
  whole = {**piece, "rate": f"{own:g}", "test": count}
  whole |= {"train_loss": "", "worst_test": ""}
  return {"": [whole], SMALL: [piece | row for row in rows]}


def figures(
  rows: list[_runner.Row], problem: str, name: str, key: str
) -> dict[float, float]:
  """One figure of an optimizer on a task, by the rate."""
  found = [r for r in rows if (r["problem"], r["optimizer"]) == (problem, name)]
  return dict(sorted((float(r["rate"]), float(r[key])) for r in found))


def report(tables: dict[str, list[_runner.Row]]) -> str:
  """Markdown tables: each task's figure by the starting rate; the small problems."""
  rows, texts = tables[""], []
  for problem, spec in tasks.TASKS.items():
    lines = []
    reference = np.array([*figures(rows, problem, _REFERENCE, "test").values()])
    for name in OPTIMIZERS:
      found = figures(rows, problem, name, "test")
      if found:
        found = {rate: found[rate] for rate in RATES if rate in found} or found
        values = np.array([*found.values()])
        form = ".3f" if spec.higher and spec.near < 1 else ".3g"
        cells = [f"{value:{form}}" for value in values]
        cells += [""] * (len(RATES) - len(cells))
        good = spec.good(values, spec.best(reference)).sum() if len(reference) else "-"
        lines.append([name, *cells, str(good)])
    if lines:
      heads = ["starting rate", *(f"{rate:g}" for rate in RATES), "rates that match"]
      texts.append(
        f"**{problem}**, {spec.figure}, mean of the seeds\n\n"
        + _report.markdown(heads, lines)
      )
  if small_rows := tables.get(SMALL):
    texts.append("**small problems**, solved from both seeds\n\n" + _small(small_rows))
    texts.append("**one attempt**, at its own rate\n\n" + _attempts(rows, small_rows))
  return "\n\n".join(texts)


def _attempts(rows: list[_runner.Row], small_rows: list[_runner.Row]) -> str:
  """Tasks that end about as well as the reference, and small problems solved."""
  lines = []
  for name in OPTIMIZERS:
    own, passed = OWN.get(name, 1e-3), []
    for problem, spec in tasks.TASKS.items():
      reference = np.array([*figures(rows, problem, _REFERENCE, "test").values()])
      value = figures(rows, problem, name, "test").get(own)
      if value is None or not len(reference):
        passed.append(None)
      else:
        passed.append(bool(spec.good(np.array([value]), spec.best(reference))[0]))
    solved = [int(row["solved"]) for row in small_rows if row["optimizer"] == name]
    if solved and None not in passed:
      cells = ["yes" if one else "-" for one in passed]
      count = sum(map(bool, passed))
      total = f"{count + sum(solved)} of {len(passed) + len(solved)}"
      lines.append([name, f"{own:g}", *cells, f"{sum(solved)} of {len(solved)}", total])
  heads = ["optimizer", "rate", *tasks.TASKS, "small problems", "passed"]
  return _report.markdown(heads, lines)


def _small(rows: list[_runner.Row]) -> str:
  lines = []
  for name in OPTIMIZERS:
    solved = {r["small"]: int(r["solved"]) for r in rows if r["optimizer"] == name}
    if solved:
      cells = ["yes" if solved.get(problem) else "-" for problem in small.PROBLEMS]
      lines.append([name, *cells, str(sum(solved.values()))])
  return _report.markdown(["optimizer", *small.PROBLEMS, "solved"], lines)


def draw(path: pathlib.Path, tables: dict[str, list[_runner.Row]]) -> None:
  """Final loss over the starting rate: flat and low is what one wants."""
  rows, plt = tables[""], _report.pyplot()
  ran = [name for name in tasks.TASKS if any(row["problem"] == name for row in rows)]
  across = min(4, max(1, len(ran)))
  down = -(-max(1, len(ran)) // across)
  figure, axes = plt.subplots(
    down,
    across,
    figsize=(4.25 * across, 4.2 * down + 0.6),
    layout="constrained",
    squeeze=False,
  )
  for axis in axes.flat[len(ran) :]:
    axis.axis("off")
  styles = {
    _NGS: {"color": "tab:green", "linewidth": 4, "zorder": 5},
    _AROUND: {"color": "tab:blue", "linewidth": 2, "zorder": 4},
    _AROUND_DECAY: {"color": "tab:blue", "linewidth": 4, "zorder": 4},
    _CAUTIOUS_DECAY: {"color": "tab:cyan", "linewidth": 3, "zorder": 4},
    "Nesterov SGD": {"color": "black", "linestyle": "--", "linewidth": 2},
    "adamw": {"color": "tab:red", "linestyle": ":", "linewidth": 2},
    _REFERENCE: {"color": "tab:red", "linestyle": "--", "linewidth": 2},
    _NADAMW: {"color": "tab:red", "marker": "*", "markersize": 12, "linestyle": ""},
  }
  others = [name for name in OPTIMIZERS if name not in styles]
  grays = dict(zip(others, "os^Dv<>Pph8Xd", strict=False))
  handles = {}
  for axis, problem in zip(axes.flat, ran, strict=False):
    curves = {name: figures(rows, problem, name, "train_loss") for name in OPTIMIZERS}
    # Who goes nowhere has the loss of the start.
    ends = [found.get(RATES[0], 0.0) for found in curves.values()]
    lowest = ceiling = 2 * max([1.0, *filter(np.isfinite, ends)])
    for name, found in curves.items():
      if not found:
        continue
      losses = np.maximum([*found.values()], 1e-9)
      lowest = min(lowest, losses.min())
      losses = np.where(losses < ceiling, losses, ceiling)
      gray = {"color": "0.6", "linewidth": 1, "marker": grays.get(name), "zorder": 1}
      (handles[name],) = axis.plot([*found], losses, **styles.get(name, gray))
    axis.set(xscale="log", yscale="log", xlabel="starting learning rate", title=problem)
    axis.set_ylim(lowest / 1.5, 1.1 * ceiling)
    axis.grid(alpha=0.3)
  axes[0, 0].set_ylabel("final training loss (top edge: diverged)")
  figure.legend(
    handles.values(),
    handles.keys(),
    loc="outside lower center",
    ncols=max(1, 3 * across // 2),
  )
  figure.suptitle("The same steps from starting rates five decades apart")
  figure.savefig(path, dpi=90)
  plt.close(figure)


STUDY = _runner.Study(
  columns={"": _COLUMNS, SMALL: _SMALL_COLUMNS},
  key=_COLUMNS[:2],
  pieces=pieces,
  run=run,
  report=report,
  draw=draw,
)

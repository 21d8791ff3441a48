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

RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SMALL = "small"
_COLUMNS = ("problem", "optimizer", "rate", "train_loss", "test", "worst_test")
_SMALL_COLUMNS = ("problem", "optimizer", "small", "worst_loss", "solved")
# No commas: --only splits at them.
_REFERENCE, _NADAMW = "cosine adamw", "nadamw"


def _ngs(rate: Any, steps: int) -> Any:
  del steps
  return optax.chain(ranger.scale_by_ngs(), optax.scale_by_learning_rate(rate))


def _nesterov(rate: Any) -> Any:
  return optax.sgd(rate, momentum=0.9, nesterov=True)


# Of a rate and the number of steps.
OPTIMIZERS: dict[str, Callable[[Any, int], Any]] = {
  "NGS": _ngs,
  "Nesterov SGD": lambda rate, _: _nesterov(rate),
  "adamw": lambda rate, _: optax.adamw(rate),
  "NGS around adamw": lambda rate, _: ranger.accelerate(optax.adamw(rate)),
  _REFERENCE: lambda rate, steps: optax.adamw(_rival_rates.cosine(rate, steps)),
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
  "NGS": 1.0,
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
  return [{"problem": name, "optimizer": x} for name in names for x in OPTIMIZERS]


def run(piece: _runner.Piece, options: _runner.Options) -> dict[str, list[Any]]:
  """A row for each rate, or one for all small problems, with a table of its own."""
  name, optimizer = piece["problem"], piece["optimizer"]
  make, seeds = OPTIMIZERS[optimizer], 1 if options.quick else 2
  own = OWN.get(optimizer, 1e-3)
  if name == SMALL:
    return _run_small(piece, lambda steps: make(own, steps), seeds, options.quick)
  spec, rates = tasks.TASKS[name], (own,) if optimizer == _NADAMW else RATES
  task = spec.build(options.quick, options.folders.get(name))
  loss, test = tasks.train(task, make, jnp.asarray(rates), range(seeds))
  # A non-finite loss has diverged.
  loss, test = np.where(np.isfinite(loss), loss, np.inf), spec.finite(test)
  figures = zip(
    rates, loss.mean(axis=1), test.mean(axis=1), spec.worst(test), strict=True
  )
  numbers = [[f"{rate:g}", *(f"{x:.4g}" for x in rest)] for rate, *rest in figures]
  return {"": [piece | dict(zip(_COLUMNS[2:], x, strict=True)) for x in numbers]}


def _run_small(piece, make, seeds, quick):
  rows, count = [], 0
  for name, problem in small.PROBLEMS.items():
    short = problem._replace(steps=20) if quick else problem
    losses = small.final_losses(short, make, seeds)
    # What isn't a number isn't below either.
    solved = int((losses < problem.threshold).all())
    count += solved
    rows.append({"small": name, "worst_loss": f"{losses.max():.4g}", "solved": solved})
  whole = {**piece, "rate": f"{OWN.get(piece['optimizer'], 1e-3):g}", "test": count}
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
  rows, parts = tables[""], []
  for problem, spec in tasks.TASKS.items():
    lines = []
    reference = np.array([*figures(rows, problem, _REFERENCE, "test").values()])
    for name in OPTIMIZERS:
      found = figures(rows, problem, name, "test")
      if found:
        values = np.array([*found.values()])
        form = ".3f" if spec.higher and spec.near < 1 else ".3g"
        cells = [f"{value:{form}}" for value in values]
        cells += [""] * (len(RATES) - len(cells))
        good = spec.good(values, spec.best(reference)).sum() if len(reference) else "-"
        lines.append([name, *cells, str(good)])
    if lines:
      heads = ["starting rate", *(f"{rate:g}" for rate in RATES), "rates that do"]
      parts.append(
        f"**{problem}**, {spec.figure}, mean of the seeds\n\n"
        + _report.markdown(heads, lines)
      )
  if small_rows := tables.get(SMALL):
    parts.append("**small problems**, solved from both seeds\n\n" + _small(small_rows))
  return "\n\n".join(parts)


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
    "NGS": {"color": "tab:green", "linewidth": 4, "zorder": 5},
    "NGS around adamw": {"color": "tab:blue", "linewidth": 4, "zorder": 4},
    "Nesterov SGD": {"color": "black", "linestyle": "--", "linewidth": 2},
    "adamw": {"color": "tab:red", "linestyle": ":", "linewidth": 2},
    _REFERENCE: {"color": "tab:red", "linestyle": "--", "linewidth": 2},
    _NADAMW: {"color": "tab:red", "marker": "*", "markersize": 12, "linestyle": ""},
  }
  others = [name for name in OPTIMIZERS if name not in styles]
  grays = dict(zip(others, "os^Dv<>Pph8Xd", strict=False))
  handles = {}
  for axis, problem in zip(axes.flat, ran, strict=False):
    first = list(figures(rows, problem, _REFERENCE, "train_loss").values())[:1]
    lowest = ceiling = 2 * max([1, *first])
    for name in OPTIMIZERS:
      found = figures(rows, problem, name, "train_loss")
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
    handles.values(), handles.keys(), loc="outside lower center", ncols=2 * across
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

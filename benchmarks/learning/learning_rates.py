"""Training from any learning rate.

Every optimizer runs on every task from starting rates of 1e-5 to 1, for as many steps,
with the same seeds; a method that calls itself free of learning rates is given the rate
as its multiplier.
"""

import argparse
from collections.abc import Callable
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from benchmarks.learning import _report
from benchmarks.learning import _runner
from benchmarks.learning.problems import tasks
import optax_ranger as ranger

RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_COLUMNS = ("problem", "optimizer", "rate", "train_loss", "test", "worst_test")
_NESTEROV = "Nesterov SGD"
_ACCURACY = ("digits", "Fashion-MNIST")


def _ngs(rate: Any) -> Any:
  return optax.chain(ranger.scale_by_ngs(), optax.scale_by_learning_rate(rate))


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
  "NGS": _ngs,
  _NESTEROV: lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
  "adamw": optax.adamw,
  "NGS around adamw": lambda rate: ranger.accelerate(optax.adamw(rate)),
  "prodigy": lambda rate: contrib.prodigy(rate),
  "dadapt_adamw": lambda rate: contrib.dadapt_adamw(rate),
  "schedule_free_sgd": lambda rate: contrib.schedule_free_sgd(rate),
  "mechanic (sgd)": lambda rate: contrib.mechanize(
    optax.sgd(rate, momentum=0.9, nesterov=True)
  ),
  "cocob": lambda rate: contrib.cocob(rate),
}
_FREE = ("prodigy", "dadapt_adamw", "schedule_free_sgd", "mechanic (sgd)", "cocob")


def train(
  problem: tasks.Task, make: Callable[[Any], Any], seeds: int
) -> tuple[np.ndarray, np.ndarray]:
  """Trains from every rate and seed at once.

  Returns:
    The training loss and the figure on held-out data, each [rates, seeds].
  """

  def one(rate, params, inputs):
    tx = make(rate)

    def step(carry, inputs):
      params, state = carry
      value, gradient = jax.value_and_grad(problem.loss)(params, inputs)
      updates, state = tx.update(gradient, state, params, value=value)
      return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), inputs)
    if isinstance(state, contrib.ScheduleFreeState):
      params = contrib.schedule_free_eval_params(state, params)
    loss = problem.train_loss(params)
    return loss, loss if problem.test is None else problem.test(params)

  starts = [problem.setup(seed) for seed in range(seeds)]
  params, inputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
  over_seeds = jax.vmap(one, (None, 0, 0))
  both = jax.jit(jax.vmap(over_seeds, (0, None, None)))
  loss, test = both(jnp.asarray(RATES), params, inputs)
  return np.asarray(loss), np.asarray(test)


def pieces(args: argparse.Namespace) -> list[_runner.Piece]:
  del args
  return [{"problem": task, "optimizer": x} for task in tasks.TASKS for x in OPTIMIZERS]


def run(piece: _runner.Piece, options: _runner.Options) -> dict[str, list[Any]]:
  """A row for each rate."""
  name = piece["problem"]
  task = tasks.TASKS[name](options.quick, options.folders.get(name))
  loss, test = train(task, OPTIMIZERS[piece["optimizer"]], 1 if options.quick else 2)
  # A non-finite loss has diverged.
  loss = np.where(np.isfinite(loss), loss, np.inf)
  if name in _ACCURACY:
    worst = test.min(axis=1)
  else:
    test = np.where(np.isfinite(test), test, np.inf)
    worst = test.max(axis=1)
  figures = zip(RATES, loss.mean(axis=1), test.mean(axis=1), worst, strict=True)
  numbers = [[f"{rate:g}", *(f"{x:.4g}" for x in rest)] for rate, *rest in figures]
  return {"": [piece | dict(zip(_COLUMNS[2:], x, strict=True)) for x in numbers]}


def figures(rows: list[_runner.Row], problem: str, name: str, key: str) -> np.ndarray:
  """One figure of an optimizer on a task, by the rate."""
  found = [r for r in rows if (r["problem"], r["optimizer"]) == (problem, name)]
  return np.array(
    [float(r[key]) for r in sorted(found, key=lambda r: float(r["rate"]))]
  )


def report(tables: dict[str, list[_runner.Row]]) -> str:
  """A Markdown table for each task: the held-out figure by the starting rate."""
  rows, parts = tables[""], []
  named = {"characters": "held-out loss", "quadratic": "training loss"}
  for problem in tasks.TASKS:
    lines = []
    nesterov = figures(rows, problem, _NESTEROV, "test")
    for name in OPTIMIZERS:
      values = figures(rows, problem, name, "test")
      if len(values):
        form = ".3f" if problem in _ACCURACY else ".3g"
        good = int(good_rates(problem, values, nesterov).sum())
        lines.append([name, *(f"{value:{form}}" for value in values), str(good)])
    if lines:
      heads = ["starting rate", *(f"{rate:g}" for rate in RATES), "rates that do"]
      parts.append(
        f"**{problem}**, {named.get(problem, 'test accuracy')}, mean of the seeds\n\n"
        + _report.markdown(heads, lines)
      )
  return "\n\n".join(parts)


def good_rates(problem: str, values: np.ndarray, nesterov: np.ndarray) -> np.ndarray:
  """Where a figure is about as good as the best of Nesterov SGD, or better.

  Accuracy within 0.01, held-out loss within 0.1, the quadratic's within tenfold.
  """
  if not len(nesterov):
    return np.zeros(len(values), bool)
  if problem in _ACCURACY:
    return values >= nesterov.max() - 0.01
  if problem == "characters":
    return values <= nesterov.min() + 0.1
  return values <= 10 * nesterov.min()


def draw(path: pathlib.Path, tables: dict[str, list[_runner.Row]]) -> None:
  """Final loss over the starting rate: flat and low is what one wants."""
  rows, plt = tables[""], _report.pyplot()
  figure, axes = plt.subplots(1, 4, figsize=(17, 4.6), layout="constrained")
  styles = {
    "NGS": {"color": "tab:green", "linewidth": 4, "zorder": 5},
    "NGS around adamw": {"color": "tab:blue", "linewidth": 4, "zorder": 4},
    _NESTEROV: {"color": "black", "linestyle": "--", "linewidth": 2},
    "adamw": {"color": "tab:red", "linestyle": "--", "linewidth": 2},
  }
  grays = dict(zip(_FREE, ("o", "s", "^", "D", "v"), strict=True))
  for axis, problem in zip(axes, tasks.TASKS, strict=True):
    ceiling = 2 * figures(rows, problem, _NESTEROV, "train_loss")[:1].max(initial=1)
    lowest = ceiling
    for name in OPTIMIZERS:
      losses = figures(rows, problem, name, "train_loss")
      if not len(losses):
        continue
      losses = np.maximum(losses, 1e-9)
      lowest = min(lowest, losses.min())
      gray = {"color": "0.6", "linewidth": 1, "marker": grays.get(name), "zorder": 1}
      losses = np.where(losses < ceiling, losses, ceiling)
      axis.plot(RATES, losses, label=name, **styles.get(name, gray))
    axis.set(xscale="log", yscale="log", xlabel="starting learning rate", title=problem)
    axis.set_ylim(lowest / 1.5, 1.1 * ceiling)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel("final training loss (top edge: diverged)")
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
  figure.suptitle("The same steps from starting rates five decades apart")
  figure.savefig(path, dpi=90)
  plt.close(figure)


STUDY = _runner.Study(
  columns={"": _COLUMNS},
  key=_COLUMNS[:2],
  pieces=pieces,
  run=run,
  report=report,
  draw=draw,
)

"""Training from any learning rate: `python -m benchmarks.learning.learning_rates`.

Every optimizer runs on every problem from starting rates of 1e-5 to 1, for as many
steps, two seeds each; a method that calls itself free of learning rates is given
the rate as its multiplier. Pieces that are in the table already are not run again.
"""

import argparse
from collections.abc import Callable
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from optax import contrib
import tqdm

from benchmarks import _fashion
from benchmarks import _table
from benchmarks.learning import _problems
import optax_ranger as ranger

RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_COLUMNS = ("problem", "optimizer", "rate", "train_loss", "test", "worst_test")
_NESTEROV = "Nesterov SGD"


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
  problem: _problems.Problem, make: Callable[[Any], Any], seeds: int
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


def rows_of(
  problem_name: str, name: str, problem: _problems.Problem, seeds: int
) -> list[dict[str, Any]]:
  loss, test = train(problem, OPTIMIZERS[name], seeds)
  # What is not finite has diverged.
  loss = np.where(np.isfinite(loss), loss, np.inf)
  if problem.figure.endswith("accuracy"):
    worst = test.min(axis=1)
  else:
    test = np.where(np.isfinite(test), test, np.inf)
    worst = test.max(axis=1)
  columns = (loss.mean(axis=1), test.mean(axis=1), worst)
  return [
    {
      "problem": problem_name,
      "optimizer": name,
      "rate": f"{rate:g}",
      **{key: f"{value:.4g}" for key, value in zip(_COLUMNS[3:], values, strict=True)},
    }
    for rate, *values in zip(RATES, *columns, strict=True)
  ]


def figures(
  rows: list[dict[str, Any]], problem: str, name: str, key: str
) -> np.ndarray:
  """One figure of an optimizer on a problem, by the rate."""
  found = [r for r in rows if r["problem"] == problem and r["optimizer"] == name]
  return np.array([float(row[key]) for row in found])


def table(rows: list[dict[str, Any]]) -> str:
  """A Markdown table for each problem: the held-out figure by the starting rate."""
  lines = []
  for problem in _problems.PROBLEMS:
    names = [name for name in OPTIMIZERS if len(figures(rows, problem, name, "test"))]
    if not names:
      continue
    accuracy = problem in ("digits", "Fashion-MNIST")
    figure = {"characters": "held-out loss", "quadratic": "training loss"}
    lines += [
      f"\n**{problem}**, {figure.get(problem, 'test accuracy')}, mean of the seeds\n",
      "| starting rate | " + " | ".join(f"{r:g}" for r in RATES) + " | rates that do |",
      "|---" * (len(RATES) + 2) + "|",
    ]
    nesterov = figures(rows, problem, _NESTEROV, "test")
    for name in names:
      values = figures(rows, problem, name, "test")
      cells = [f"{value:.3f}" if accuracy else f"{value:.3g}" for value in values]
      cells.append(str(int(good_rates(problem, values, nesterov).sum())))
      lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def good_rates(problem: str, values: np.ndarray, nesterov: np.ndarray) -> np.ndarray:
  """Where a figure is about as good as the best of Nesterov SGD, or better.

  Accuracy within 0.01, held-out loss within 0.1, the quadratic's within tenfold.
  """
  if not len(nesterov):
    return np.zeros(len(values), bool)
  if problem in ("digits", "Fashion-MNIST"):
    return values >= nesterov.max() - 0.01
  if problem == "characters":
    return values <= nesterov.min() + 0.1
  return values <= 10 * nesterov.min()


def draw(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """Final loss over the starting rate: flat and low is what one wants."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(1, 4, figsize=(17, 4.6), layout="constrained")
  styles = {
    "NGS": {"color": "tab:green", "linewidth": 4, "zorder": 5},
    "NGS around adamw": {"color": "tab:blue", "linewidth": 4, "zorder": 4},
    _NESTEROV: {"color": "black", "linestyle": "--", "linewidth": 2},
    "adamw": {"color": "tab:red", "linestyle": "--", "linewidth": 2},
  }
  grays = dict(zip(_FREE, ("o", "s", "^", "D", "v"), strict=True))
  for axis, problem in zip(axes, _problems.PROBLEMS, strict=True):
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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  parser.add_argument("--seeds", type=int, default=2)
  parser.add_argument("--quick", action="store_true", help="few steps, to try it out")
  parser.add_argument("--only", help="problems, with commas between them")
  parser.add_argument("--fresh", action="store_true", help="run every piece again")
  parser.add_argument("--fashion-mnist", type=pathlib.Path, default=_fashion.FOLDER)
  args = parser.parse_args()
  makers: dict[str, Callable[[bool], _problems.Problem]] = dict(_problems.PROBLEMS)
  makers["Fashion-MNIST"] = functools.partial(
    _problems.fashion, folder=args.fashion_mnist
  )
  if args.only:
    unknown = set(args.only.split(",")) - set(makers)
    if unknown:
      parser.error(f"--only knows {', '.join(makers)}, got {', '.join(unknown)}")
    makers = {name: makers[name] for name in args.only.split(",")}
  if "Fashion-MNIST" in makers and not args.fashion_mnist.is_dir():
    print(
      f"SKIPPED: Fashion-MNIST is not in {args.fashion_mnist}; install Debian's"
      " dataset-fashion-mnist, or pass --fashion-mnist FOLDER.",
      file=sys.stderr,
    )
    del makers["Fashion-MNIST"]

  stem = "learning_rates_quick" if args.quick else "learning_rates"
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / f"{stem}.csv"
  rows = _table.read(path) if path.exists() and not args.fresh else []
  done = {(row["problem"], row["optimizer"]) for row in rows}
  pieces = [
    (problem, name)
    for problem in makers
    for name in OPTIMIZERS
    if (problem, name) not in done
  ]
  with tqdm.tqdm(pieces, unit="piece") as progress:
    for problem, name in progress:
      progress.set_description(f"{problem}, {name}")
      rows += rows_of(problem, name, makers[problem](args.quick), args.seeds)
      _table.write(path, rows, _COLUMNS)
  order = {name: i for i, name in enumerate(OPTIMIZERS)}
  places = {name: i for i, name in enumerate(_problems.PROBLEMS)}
  rows.sort(
    key=lambda r: (places[r["problem"]], order[r["optimizer"]], float(r["rate"]))
  )
  _table.write(path, rows, _COLUMNS)
  print(table(rows))
  draw(args.out / f"{stem}.png", rows)
  print(f"\npicture: {args.out / stem}.png, figures: {path}")


if __name__ == "__main__":
  main()

"""Noise other than random wrong labels: `python -m benchmarks.other_noise`.

Outliers among the features, near-duplicates with conflicting labels, wrong labels
near the boundary between classes, targets with heavy tails. Each method has three
settings on every problem, kind of noise and seed; the one that is taken, once for
all of them, is best on noisy validation. Pieces that are in the table already are
not run again.
"""

import argparse
import pathlib
import time
from typing import Any

import matplotlib
import numpy as np
import tqdm

from benchmarks import _noise
from benchmarks import _noisy_methods
from benchmarks import _noisy_training as training
from benchmarks import _table

COLUMNS = (
  "problem",
  "method",
  "noise",
  "rate",
  "seed",
  "last",
  "selected",
  "seconds",
)
TRIAL_COLUMNS = (*COLUMNS[:5], "setting", "validation", *COLUMNS[5:])

Piece = tuple[str, str, str, float]
Row = dict[str, str]


def pieces(problems: list[str], quick: bool = False) -> list[Piece]:
  """Problem, method, noise and rate of everything that is to be run."""
  return [
    (problem, name, noise, rate)
    for problem in problems
    for name, method in _noisy_methods.METHODS.items()
    for noise, kind in _noise.NOISES.items()
    if _noise.task(problem) in kind.tasks and method.suits(problem, noise)
    for rate in (kind.rates[-1:] if quick else kind.rates)
  ]


def run(piece: Piece, seeds: int, rounds: int = training.ROUNDS) -> list[Row]:
  """All settings of a method, all seeds, on one problem with one kind of noise."""
  problem, name, noise, rate = piece
  method = _noisy_methods.METHODS[name]
  runs = [
    training.start(problem, _noise.load(problem, noise, rate, seed), seed, rounds)
    for seed in range(seeds)
  ]
  begin = time.perf_counter()
  valid, test = _noisy_methods.run_all(method, runs)
  seconds = (time.perf_counter() - begin) / valid[..., 0].size
  valid = np.where(np.isfinite(valid), valid, -np.inf)
  rows = []
  for i, settings in enumerate(method.settings):
    for seed in range(seeds):
      best = valid[i, seed].argmax()
      figures = valid[i, seed, best], test[i, seed, -1], test[i, seed, best], seconds
      rows.append(
        {
          "problem": problem,
          "method": name,
          "noise": noise,
          "rate": f"{rate:g}",
          "seed": str(seed),
          "setting": _words(settings),
          **{
            key: f"{value:.4g}"
            for key, value in zip(TRIAL_COLUMNS[6:], figures, strict=True)
          },
        }
      )
  return rows


def _words(settings: _noisy_methods.Settings) -> str:
  return " ".join(f"{name}={value:g}" for name, value in settings.items())


def settings_of(trials: list[Row]) -> dict[tuple[str, str], dict[str, float]]:
  """The mean figure on noisy validation of each setting, by task and method."""
  found: dict[tuple[str, str], dict[str, list[float]]] = {}
  for row in trials:
    key = _noise.task(row["problem"]), row["method"]
    values = found.setdefault(key, {}).setdefault(row["setting"], [])
    values.append(float(row["validation"]))
  return {
    key: {setting: float(np.mean(values)) for setting, values in settings.items()}
    for key, settings in found.items()
  }


def chosen(trials: list[Row]) -> list[Row]:
  """The rows with the setting that is best on noisy validation over all problems."""
  best = {key: max(s, key=lambda one: s[one]) for key, s in settings_of(trials).items()}
  return [
    {key: row[key] for key in COLUMNS}
    for row in trials
    if row["setting"] == best[_noise.task(row["problem"]), row["method"]]
  ]


def figures(rows: list[Row], problem: str, method: str, cell: tuple[str, str]) -> Any:
  """Last and selected figures of all seeds, ``[seeds, 2]``."""
  found = [
    (float(row["last"]), float(row["selected"]))
    for row in rows
    if (row["problem"], row["method"]) == (problem, method)
    and (row["noise"], row["rate"]) == cell
  ]
  return np.array(found).reshape(-1, 2)


def cells(rows: list[Row], problem: str) -> list[tuple[str, str]]:
  order = list(_noise.NOISES)
  found = {(row["noise"], row["rate"]) for row in rows if row["problem"] == problem}
  return sorted(found, key=lambda cell: (order.index(cell[0]), float(cell[1])))


def table(rows: list[Row], figure: int = 1) -> str:
  """A Markdown table for each problem, of the last (0) or the selected (1) epoch."""
  lines = []
  for problem in _noise.PROBLEMS:
    kinds = cells(rows, problem)
    if not kinds:
      continue
    names = [
      name
      for name in _noisy_methods.METHODS
      if any(row["method"] == name and row["problem"] == problem for row in rows)
    ]
    found = {
      (name, cell): figures(rows, problem, name, cell)[:, figure]
      for name in names
      for cell in kinds
    }
    best = {
      cell: max(found[name, cell].mean() for name in names if len(found[name, cell]))
      for cell in kinds
    }
    what = "accuracy" if _noise.task(problem) == "classes" else "R²"
    when = ("last epoch", "epoch chosen on noisy validation")[figure]
    lines += [
      f"\n**{problem}**, test {what}, {when}\n",
      "| | " + " | ".join(_heading(cell) for cell in kinds) + " |",
      "|---" * (len(kinds) + 1) + "|",
    ]
    for name in names:
      texts = [_cell(found[name, cell], best[cell]) for cell in kinds]
      lines.append(f"| {name} | " + " | ".join(texts) + " |")
  return "\n".join(lines)


def _heading(cell: tuple[str, str]) -> str:
  noise, rate = cell
  return noise if noise == "none" else f"{noise} {rate}"


def _cell(values: np.ndarray, best: float) -> str:
  if not len(values):
    return "-"
  text = f"{values.mean():.3f} ± {values.std():.3f}"
  return f"**{text}**" if values.mean() == best else text


def settings_table(trials: list[Row]) -> str:
  """What was tried, with its mean figure on noisy validation; the taken one bold."""
  lines = ["| task | method | settings: noisy validation |", "|---|---|---|"]
  found = settings_of(trials)
  for task in ("classes", "numbers"):
    for name in _noisy_methods.METHODS:
      settings = found.get((task, name))
      if not settings:
        continue
      best = max(settings, key=lambda one: settings[one])
      texts = [
        f"**{one}: {value:.3f}**" if one == best else f"{one}: {value:.3f}"
        for one, value in settings.items()
      ]
      lines.append(f"| {task} | {name} | {'; '.join(texts)} |")
  return "\n".join(lines)


def draw(path: pathlib.Path, rows: list[Row]) -> None:
  """How far each method is from the EMA alone, by problem and kind of noise."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  base = "EMA"
  problems = [problem for problem in _noise.PROBLEMS if cells(rows, problem)]
  names = [
    name
    for name in _noisy_methods.METHODS
    if name != base and any(row["method"] == name for row in rows)
  ]
  widths = [len(cells(rows, problem)) for problem in problems]
  figure, axes = plt.subplots(
    1,
    len(problems),
    figsize=(4 + 0.62 * sum(widths), 6.4),
    layout="constrained",
    sharey=True,
    squeeze=False,
    width_ratios=widths,
  )
  image = None
  for axis, problem in zip(axes[0], problems, strict=True):
    kinds = cells(rows, problem)
    grid = np.full([len(names), len(kinds)], np.nan)
    for i, name in enumerate(names):
      for j, cell in enumerate(kinds):
        own, other = (figures(rows, problem, one, cell)[:, 1] for one in (name, base))
        if len(own) and len(other):
          grid[i, j] = 100 * (own.mean() - other.mean())
          axis.text(j, i, f"{grid[i, j]:+.0f}", ha="center", va="center", fontsize=8)
    image = axis.imshow(grid, cmap="RdYlGn", vmin=-15, vmax=15, aspect="auto")
    axis.set_title(problem)
    axis.set_xticks(range(len(kinds)), [_heading(k) for k in kinds], rotation=90)
    axis.set_yticks(range(len(names)), names)
  if image is not None:
    figure.colorbar(image, ax=axes[0], label="points above EMA with early stopping")
  figure.suptitle("Accuracy or R², in hundredths, beside EMA with early stopping")
  figure.savefig(path, dpi=90)
  plt.close(figure)


def collect(
  path: pathlib.Path, todo: list[Piece], seeds: int, rounds: int = training.ROUNDS
) -> list[Row]:
  """Runs the pieces that are not in the file yet, and writes each down at once."""
  trials = _table.read(path) if path.exists() else []
  done = {(row["problem"], row["method"], row["noise"], row["rate"]) for row in trials}
  todo = [piece for piece in todo if (*piece[:3], f"{piece[3]:g}") not in done]
  with tqdm.tqdm(todo, unit="piece") as progress:
    for piece in progress:
      progress.set_description(f"{piece[0]}, {piece[1]}, {piece[2]} {piece[3]:g}")
      trials += run(piece, seeds, rounds)
      _table.write(path, trials, TRIAL_COLUMNS)
  return trials


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--quick", action="store_true", help="two seeds, few rounds")
  parser.add_argument("--only", help="problems, with commas between them")
  parser.add_argument("--fresh", action="store_true", help="run every piece again")
  parser.add_argument("--table", type=pathlib.Path, help="only print that CSV file")
  args = parser.parse_args()
  if args.table:
    rows = _table.read(args.table)
    print(table(rows, 1) + "\n" + table(rows, 0))
    return
  problems = args.only.split(",") if args.only else list(_noise.PROBLEMS)
  unknown = set(problems) - set(_noise.PROBLEMS)
  if unknown:
    parser.error(f"--only knows {', '.join(_noise.PROBLEMS)}, got {', '.join(unknown)}")
  stem = "other_noise_quick" if args.quick else "other_noise"
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / f"{stem}_trials.csv"
  if args.fresh:
    path.unlink(missing_ok=True)
  seeds, rounds = (2, 6) if args.quick else (args.seeds, training.ROUNDS)
  trials = collect(path, pieces(problems, args.quick), seeds, rounds)
  rows = chosen(trials)
  _table.write(args.out / f"{stem}.csv", rows, COLUMNS)
  print(table(rows, 1))
  print(table(rows, 0))
  print("\n" + settings_table(trials))
  draw(args.out / f"{stem}.png", rows)
  print(f"\npicture: {args.out / stem}.png, figures: {args.out / stem}.csv")


if __name__ == "__main__":
  main()

"""The figures as tables and a picture."""

import pathlib
from typing import Any

import matplotlib
import numpy as np

from benchmarks.learning.other_noise import methods
from benchmarks.learning.other_noise import noise as noises
from benchmarks.learning.other_noise import work


def settings_of(trials: list[work.Row]) -> dict[tuple[str, str], dict[str, float]]:
  """The mean figure on noisy validation of each setting, by task and method."""
  found: dict[tuple[str, str], dict[str, list[float]]] = {}
  for row in trials:
    key = noises.task(row["problem"]), row["method"]
    values = found.setdefault(key, {}).setdefault(row["setting"], [])
    values.append(float(row["validation"]))
  return {
    key: {setting: float(np.mean(values)) for setting, values in settings.items()}
    for key, settings in found.items()
  }


def chosen(trials: list[work.Row]) -> list[work.Row]:
  """The rows with the setting that is best on noisy validation over all problems."""
  best = {key: max(s, key=lambda one: s[one]) for key, s in settings_of(trials).items()}
  return [
    {key: row[key] for key in work.COLUMNS}
    for row in trials
    if row["setting"] == best[noises.task(row["problem"]), row["method"]]
  ]


def figures(
  rows: list[work.Row], problem: str, method: str, cell: tuple[str, str]
) -> Any:
  """Last and selected figures of all seeds, ``[seeds, 2]``."""
  found = [
    (float(row["last"]), float(row["selected"]))
    for row in rows
    if (row["problem"], row["method"]) == (problem, method)
    and (row["noise"], row["rate"]) == cell
  ]
  return np.array(found).reshape(-1, 2)


def cells(rows: list[work.Row], problem: str) -> list[tuple[str, str]]:
  order = list(noises.NOISES)
  found = {(row["noise"], row["rate"]) for row in rows if row["problem"] == problem}
  return sorted(found, key=lambda cell: (order.index(cell[0]), float(cell[1])))


def table(rows: list[work.Row], figure: int = 1) -> str:
  """A Markdown table for each problem, of the last (0) or the selected (1) epoch."""
  lines = []
  for problem in noises.PROBLEMS:
    kinds = cells(rows, problem)
    if not kinds:
      continue
    names = [
      name
      for name in methods.METHODS
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
    what = "accuracy" if noises.task(problem) == "classes" else "R²"
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


def settings_table(trials: list[work.Row]) -> str:
  """What was tried, with its mean figure on noisy validation; the taken one bold."""
  lines = ["| task | method | settings: noisy validation |", "|---|---|---|"]
  found = settings_of(trials)
  for task in ("classes", "numbers"):
    for name in methods.METHODS:
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


def draw(path: pathlib.Path, rows: list[work.Row]) -> None:
  """How far each method is from the EMA alone, by problem and kind of noise."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  base = "EMA"
  problems = [problem for problem in noises.PROBLEMS if cells(rows, problem)]
  names = [
    name
    for name in methods.METHODS
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

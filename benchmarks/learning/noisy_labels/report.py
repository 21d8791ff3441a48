"""The figures as files, tables and pictures."""

from collections.abc import Mapping
import pathlib
from typing import Any
from typing import NamedTuple

import matplotlib
import numpy as np

from benchmarks import _table
from benchmarks.learning.noisy_labels import data
from benchmarks.learning.noisy_labels import methods

_ROW = (
  "data",
  "model",
  "method",
  "noise",
  "rate",
  "seed",
  "last",
  "selected",
  "selected_epoch",
  "tuning_last",
  "tuning_selected",
  "seconds",
)
_CURVE = ("method", "noise", "rate", "epoch", "validation", "test", "wrong_share")
_DRAWN = {
  "cross_entropy": "0.6",
  "averaged": "black",
  "gce": "tab:orange",
  "sce": "tab:red",
  "elr": "tab:blue",
  "deep_knn": "tab:purple",
  "ranger": "tab:green",
}


class Paths(NamedTuple):
  """The files of a table."""

  rows: pathlib.Path
  curves: pathlib.Path
  confusion: pathlib.Path
  pictures: pathlib.Path

  @classmethod
  def of(cls, folder: pathlib.Path, stem: str) -> "Paths":
    return cls(
      folder / f"{stem}.csv",
      folder / f"{stem}_curves.csv",
      folder / f"{stem}_confusion.csv",
      folder / f"{stem}.png",
    )


class Results:
  """What has been trained so far."""

  def __init__(self, rows: list[Any], curves: list[Any], confusion: list[Any]):
    self.rows, self.curves, self.confusion = rows, curves, confusion

  @classmethod
  def read(cls, paths: Paths) -> "Results":
    return cls(*(_table.read(path) if path.exists() else [] for path in paths[:3]))

  def has(self, key: tuple[Any, ...]) -> bool:
    return tuple(map(str, key)) in {_key(row) for row in self.rows}

  def add(self, row: Any, curves: list[Any], confusion: Any) -> None:
    self.rows.append({name: str(value) for name, value in row.items()})
    self.curves += curves
    if confusion is not None and row["method"] == "ranger" and curves:
      self.confusion += [
        {
          "noise": row["noise"],
          "rate": str(row["rate"]),
          "class": given,
          "label": label,
          "chance": f"{confusion[given, label]:.4f}",
        }
        for given in range(len(confusion))
        for label in range(len(confusion))
      ]

  def write(self, paths: Paths) -> None:
    self.rows.sort(key=_key)
    by_epoch = lambda row: (row["method"], row["noise"], row["rate"], int(row["epoch"]))
    self.curves = sorted(
      ({name: str(value) for name, value in row.items()} for row in self.curves),
      key=by_epoch,
    )
    _table.write(paths.rows, self.rows, _ROW)
    _table.write(paths.curves, self.curves, _CURVE)
    _table.write(
      paths.confusion, self.confusion, ("noise", "rate", "class", "label", "chance")
    )

  def by_seed(self, model: str, name: str, noise: tuple[str, float], what: str):
    """One figure of a method under a kind of noise, by seed."""
    return {
      int(row["seed"]): float(row[what])
      for row in self.rows
      if _key(row)[:4] == (model, name, noise[0], str(noise[1]))
    }

  def figures(self, model: str, name: str, noise: tuple[str, float], what: str):
    """The same, as an array."""
    return np.array(list(self.by_seed(model, name, noise, what).values()))

  def drop(self, keys: list[tuple[Any, ...]]) -> None:
    """Forgets pieces, that they may be trained again."""
    gone = {tuple(map(str, key)) for key in keys}
    self.rows = [row for row in self.rows if _key(row) not in gone]
    drawn = {key[1:4] for key in gone if key[0] == "mlp" and key[4] == "0"}
    kind = lambda row: (row.get("method", "ranger"), row["noise"], str(row["rate"]))
    self.curves = [row for row in self.curves if kind(row) not in drawn]
    self.confusion = [row for row in self.confusion if kind(row) not in drawn]


def _key(row: Any) -> tuple[str, ...]:
  return tuple(row[name] for name in ("model", "method", "noise", "rate", "seed"))


def heading(noise: tuple[str, float]) -> str:
  kind, rate = noise
  return f"{kind} {rate:.0%}" if rate else "clean"


def tables(results: Results, known: Mapping[str, methods.Method]) -> str:
  """A table for each model: accuracy of the last epoch and of the selected one."""
  parts = []
  for model in ("mlp", "cnn"):
    if any(row["model"] == model for row in results.rows):
      parts.append(table(results, model, known))
  return "\n\n".join(parts)


def table(results: Results, model: str, known: Mapping[str, methods.Method]) -> str:
  columns = [
    noise
    for noise in data.NOISES
    if any(len(results.figures(model, name, noise, "last")) for name in known)
  ]
  lines = [
    f"{model.upper()}, test accuracy: last epoch / epoch chosen on noisy validation"
    " labels, mean ± standard deviation over seeds",
    "",
    "| method | " + " | ".join(map(heading, columns)) + " | seconds |",
    "| --- |" + " ---: |" * (len(columns) + 1),
  ]
  for name, method in known.items():
    cells = []
    for noise in columns:
      both = [
        results.figures(model, name, noise, kind) for kind in ("last", "selected")
      ]
      cells.append(
        " / ".join(f"{part.mean():.3f} ± {part.std(ddof=1):.3f}" for part in both)
        if len(both[0]) > 1
        else " / ".join(f"{part.mean():.3f}" for part in both)
        if len(both[0])
        else "-"
      )
    seconds = [
      value
      for noise in columns
      for value in results.figures(model, name, noise, "seconds")
    ]
    if seconds:
      time = f"{np.median(seconds):.1f}"
      lines.append(f"| {method.title} | " + " | ".join([*cells, time]) + " |")
  return "\n".join(lines)


def summary(results: Results, known: Mapping[str, methods.Method]) -> str:
  """The MLP's table in short: the better of both means of each method, by column."""
  lines = [
    "| | " + " | ".join(map(heading, data.NOISES)) + " |",
    "| --- |" + " ---: |" * len(data.NOISES),
  ]
  for name in (*methods.RIVALS, "ranger"):
    cells = []
    for noise in data.NOISES:
      both = [
        results.figures("mlp", name, noise, kind) for kind in ("last", "selected")
      ]
      best = max(part.mean() for part in both) if len(both[0]) else 0
      cells.append(f"{best:.3f}" if best else "-")
    if set(cells) != {"-"}:
      lines.append(f"| {known[name].title} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def verdicts(results: Results, known: Mapping[str, methods.Method]) -> str:
  """Ranger's last epochs against the better of two figures of each rival."""
  lines = [
    "| noise | Ranger | best rival | its name | difference ± standard error of pairs |",
    "| --- | ---: | ---: | --- | ---: |",
  ]
  for noise in data.NOISES:
    last = results.by_seed("mlp", "ranger", noise, "last")
    rivals = [
      (*_paired(last, results.by_seed("mlp", name, noise, kind)), name, kind)
      for name in known
      if name in methods.RIVALS
      for kind in ("last", "selected")
    ]
    rivals = [rival for rival in rivals if len(rival[0]) > 1]
    if not rivals:
      continue
    ours, best, name, kind = max(rivals, key=lambda rival: rival[1].mean())
    gain = ours - best
    lines.append(
      f"| {heading(noise)} | {ours.mean():.4f} | {best.mean():.4f} |"
      f" {known[name].title}, {kind} | {gain.mean():+.4f} ± {_error(gain):.4f} |"
    )
  return "\n".join(lines)


def _paired(
  one: dict[int, float], other: dict[int, float]
) -> tuple[np.ndarray, np.ndarray]:
  """Figures of the seeds that both have."""
  seeds = sorted(set(one) & set(other))
  first, second = (np.array([part[s] for s in seeds]) for part in (one, other))
  return first, second


def _error(gain: np.ndarray) -> float:
  """The standard error of a mean."""
  return gain.std(ddof=1) / np.sqrt(len(gain))


def ablations(results: Results, known: Mapping[str, methods.Method]) -> str:
  """What changes when a part of Ranger is left out, or another put in its place."""
  lines = [
    "| Ranger, last epoch | " + " | ".join(map(heading, data.NOISES[:4])) + " |",
    "| --- |" + " ---: |" * 4,
  ]
  for name, method in known.items():
    cells = []
    for noise in data.NOISES[:4]:
      changed, whole = _paired(
        results.by_seed("mlp", name, noise, "last"),
        results.by_seed("mlp", "ranger", noise, "last"),
      )
      gain = 100 * (changed - whole)
      if len(gain) > 1:
        cells.append(f"{gain.mean():+.1f} ± {_error(gain):.1f}")
    if len(cells) == 4:
      lines.append(f"| {method.title} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def draw(paths: Paths, results: Results, known: Mapping[str, methods.Method]) -> None:
  """Draws accuracy over noise, curves, the pull of wrong labels, and the confusion."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
  symmetric = sorted(
    (noise for noise in data.NOISES if noise[0] == "symmetric"), key=lambda n: n[1]
  )
  for name, color in _DRAWN.items():
    width = {"color": color, "linewidth": 2.5 if name == "ranger" else 1.3}
    points = [
      (noise[1], results.figures("mlp", name, noise, "last")) for noise in symmetric
    ]
    points = [(rate, figures) for rate, figures in points if len(figures)]
    if points:
      means = [figures.mean() for _, figures in points]
      spread = [figures.std() for _, figures in points]
      rates = [rate for rate, _ in points]
      axes[0].errorbar(rates, means, spread, label=known[name].title, **width)
    for axis, noise, what in (
      (axes[1], ("asymmetric", 0.4), "test"),
      (axes[2], ("symmetric", 0.4), "wrong_share"),
    ):
      rows = [
        row
        for row in results.curves
        if (row["method"], row["noise"], row["rate"]) == (name, noise[0], str(noise[1]))
      ]
      epochs = [int(row["epoch"]) for row in rows]
      axis.plot(epochs, [float(row[what]) for row in rows], **width)
  axes[0].set(xlabel="share of wrong labels", ylabel="test accuracy, last epoch")
  axes[0].set_title("labels flipped to any other class")
  axes[0].legend(fontsize=8)
  axes[1].set(xlabel="epoch", ylabel="test accuracy", ylim=(0.7, None))
  axes[1].set_title("40 % of five classes called like a look-alike")
  axes[2].set(xlabel="epoch", ylabel="share of the pull that wrong labels have")
  axes[2].set_title("40 % flipped: what wrong labels weigh")
  for axis in axes:
    axis.grid(alpha=0.3)
  figure.savefig(paths.pictures, dpi=90)
  plt.close(figure)
  _draw_confusion(paths.pictures.with_stem(paths.pictures.stem + "_confusion"), results)


def _draw_confusion(path: pathlib.Path, results: Results) -> None:
  """Draws the matrices that neighbors tell beside the true ones."""
  from matplotlib import pyplot as plt

  kinds = [("symmetric", 0.4), ("asymmetric", 0.4)]
  figure, axes = plt.subplots(1, 4, figsize=(16, 4.2), layout="constrained")
  for i, (noise, rate) in enumerate(kinds):
    told = np.zeros([data.NUM_CLASSES] * 2)
    for row in results.confusion:
      if (row["noise"], row["rate"]) == (noise, str(rate)):
        told[int(row["class"]), int(row["label"])] = float(row["chance"])
    both = {"true": data.confusion_of(noise, rate), "told by neighbors": told}
    for axis, (title, matrix) in zip(
      axes[2 * i : 2 * i + 2], both.items(), strict=True
    ):
      axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
      for (y, x), chance in np.ndenumerate(matrix):
        color = "black" if chance > 0.6 else "white"
        axis.text(
          x,
          y,
          f"{chance:.2f}"[1:] if chance < 0.995 else "1",
          ha="center",
          va="center",
          fontsize=6,
          color=color,
        )
      axis.set(xlabel="label", ylabel="class", title=f"{noise} {rate:.0%}, {title}")
      axis.set_xticks(range(10))
      axis.set_yticks(range(10))
  figure.savefig(path, dpi=90)
  plt.close(figure)

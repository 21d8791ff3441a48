"""The pieces of the table, and the runs that fill it."""

import pathlib
import time

import numpy as np
import tqdm

from benchmarks import _table
from benchmarks.learning.other_noise import methods
from benchmarks.learning.other_noise import noise as noises
from benchmarks.learning.other_noise import training

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
    for name, method in methods.METHODS.items()
    for noise, kind in noises.NOISES.items()
    if noises.task(problem) in kind.tasks and method.suits(problem, noise)
    for rate in (kind.rates[-1:] if quick else kind.rates)
  ]


def run(piece: Piece, seeds: int, rounds: int = training.ROUNDS) -> list[Row]:
  """All settings of a method, all seeds, on one problem with one kind of noise."""
  problem, name, noise, rate = piece
  method = methods.METHODS[name]
  runs = [
    training.start(problem, noises.load(problem, noise, rate, seed), seed, rounds)
    for seed in range(seeds)
  ]
  begin = time.perf_counter()
  valid, test = methods.run_all(method, runs)
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


def _words(settings: methods.Settings) -> str:
  return " ".join(f"{name}={value:g}" for name, value in settings.items())


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

"""Pieces of a study become rows of CSV files; no piece is run twice."""

import argparse
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import concurrent.futures
import multiprocessing
import os
import pathlib
from typing import Any
from typing import NamedTuple

import tqdm

from benchmarks import _table
from benchmarks.learning import _method
from benchmarks.learning import _training
from benchmarks.learning import problems

# What this process has compiled.
_WARM: set[tuple[Any, ...]] = set()
# Two workers of one thread each take less time than one of two.
_FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
CELL = ("problem", "model", "method", "noise", "rate")
FIGURES = (
  *CELL,
  "seed",
  "settings",
  "last",
  "selected",
  "selected_epoch",
  "tuning_last",
  "tuning_selected",
  "seconds",
)
CURVES = (*CELL, "epoch", "validation", "test", "wrong_share")
CONFUSION = (*CELL, "class", "label", "chance")

Piece = dict[str, str]
Row = dict[str, str]


class Options(NamedTuple):
  """What all pieces of a run share.

  Attributes:
    folders: of data, by problem.
    quick: whether it is only tried out.
  """

  folders: Mapping[str, pathlib.Path]
  quick: bool = False


class Study(NamedTuple):
  """A set of pieces, how one is run, and what is shown.

  Attributes:
    columns: of each table; the main one is called "".
    key: the columns of the main table that tell its pieces apart.
    pieces: of the arguments of the command line, each with all columns of the key.
    run: a piece to rows of each table; it runs in another process.
    report: Markdown of the tables.
    draw: writes pictures beside a path; None without pictures.
    trials: pieces for `--tune`, whose settings are a column of the key.
  """

  columns: Mapping[str, tuple[str, ...]]
  key: tuple[str, ...]
  pieces: Callable[[argparse.Namespace], list[Piece]]
  run: Callable[[Piece, Options], dict[str, list[Any]]]
  report: Callable[[dict[str, list[Row]]], str]
  draw: Callable[[pathlib.Path, dict[str, list[Row]]], None] | None = None
  trials: Callable[[argparse.Namespace], list[Piece]] | None = None


class Tables:
  """The CSV files of a study: ``STEM.csv``, and ``STEM_NAME.csv`` of further ones."""

  def __init__(self, path: pathlib.Path, columns: Mapping[str, tuple[str, ...]]):
    self._columns = columns
    self._paths = {
      name: path.with_stem(f"{path.stem}_{name}" if name else path.stem)
      for name in columns
    }
    self.rows: dict[str, list[Row]] = {
      name: _table.read(at) if at.exists() else [] for name, at in self._paths.items()
    }

  def add(self, found: Mapping[str, list[Any]]) -> None:
    for name, rows in found.items():
      self.rows[name] += [{key: str(row[key]) for key in row} for row in rows]

  def drop(self, pieces: Iterable[Piece]) -> None:
    """Forgets rows of pieces, so that they are run again."""
    pieces = list(pieces)
    for name, rows in self.rows.items():
      shared = [key for key in self._columns[name] if pieces and key in pieces[0]]
      gone = {tuple(str(piece[key]) for key in shared) for piece in pieces}
      self.rows[name] = [
        row for row in rows if tuple(row[key] for key in shared) not in gone
      ]

  def write(self) -> None:
    """Writes every file whole: a run that is stopped leaves the last state."""
    for name, path in self._paths.items():
      columns = self._columns[name]
      self.rows[name].sort(key=lambda row: [_number(row[key]) for key in columns])
      if self.rows[name]:
        new = path.with_suffix(".new")
        _table.write(new, self.rows[name], columns)
        new.replace(path)


def _number(text: str) -> tuple[float, str]:
  try:
    return float(text), ""
  except ValueError:
    return 0.0, text


def collect(
  tables: Tables,
  pieces: list[Piece],
  key: tuple[str, ...],
  run: Callable[[Piece, Options], dict[str, list[Any]]],
  options: Options,
  fresh: bool = False,
  workers: int | None = None,
) -> None:
  """Runs the pieces that are not in the tables yet, and writes each down at once.

  Args:
    tables: filled up in place, and on disk.
    pieces: what the tables shall hold.
    key: the columns that tell pieces apart.
    run: gives the rows of a piece; a picklable function.
    options: its second argument.
    fresh: whether to run all of them again.
    workers: processes; None for one on each core, 0 for this one.
  """
  if fresh:
    tables.drop(pieces)
  place = lambda row: tuple(str(row[name]) for name in key)
  done = {place(row) for row in tables.rows[""]}
  todo = [piece for piece in pieces if place(piece) not in done]
  if not todo:
    return
  with tqdm.tqdm(total=len(todo), unit="piece") as progress:
    for found in _results(todo, run, options, workers):
      tables.add(found)
      tables.write()
      progress.update()


def _results(todo, run, options, workers):
  if workers == 0:
    yield from (run(piece, options) for piece in todo)
    return
  with _pool(workers) as pool:
    futures = [pool.submit(run, piece, options) for piece in todo]
    try:
      for future in concurrent.futures.as_completed(futures):
        yield future.result()
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _pin(cores: Any) -> None:
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {cores.get()})


def _pool(workers: int | None) -> concurrent.futures.ProcessPoolExecutor:
  """A process of one thread on each core."""
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
  # NumPy's threads would wait for each other on one core.
  os.environ["OPENBLAS_NUM_THREADS"] = "1"
  context = multiprocessing.get_context("spawn")
  if hasattr(os, "sched_getaffinity"):
    allowed = sorted(os.sched_getaffinity(0))
  else:
    allowed = list(range(os.cpu_count() or 1))
  allowed = allowed[: workers or len(allowed)]
  cores = context.Queue()
  for core in allowed:
    cores.put(core)
  return concurrent.futures.ProcessPoolExecutor(len(allowed), context, _pin, (cores,))


def piece(
  problem: str,
  model: str,
  method: str,
  noise: problems.Noise,
  seed: int,
  settings: str = "",
) -> Piece:
  columns = (problem, model, method, noise[0], f"{noise[1]:g}", str(seed), settings)
  return dict(zip(FIGURES, columns, strict=False))


def train(
  piece: Piece,
  options: Options,
  method: _method.Method,
  epochs: int,
  curves: bool = False,
) -> dict[str, list[Any]]:
  """Trains one piece; returns its figures, and its curves where asked for."""
  problem, model = piece["problem"], piece["model"]
  folder = options.folders.get(problem)
  noise = piece["noise"], float(piece["rate"])
  drawn = problems.draw(problem, *noise, int(piece["seed"]), folder)
  # Compilation is not a method's doing: it is done before the clock starts.
  warm = (piece["method"], model, problem, drawn.train.x.shape)
  if warm not in _WARM:
    _training.train(method, model, drawn, method.settings, 0, 2, curves)
    _WARM.add(warm)
  settings = {**method.settings, **_method.read(piece["settings"])}
  history = _training.train(
    method, model, drawn, settings, int(piece["seed"]), epochs, curves
  )
  figures = {
    name: f"{getattr(history, name):.4f}"
    for name in ("last", "selected", "tuning_last", "tuning_selected")
  }
  row = {**piece, **figures, "selected_epoch": history.epoch}
  found = {"": [{**row, "seconds": f"{history.seconds:.2f}"}]}
  if curves:
    cell = {name: piece[name] for name in CELL}
    parts = (history.validation, history.test, history.wrong_share)
    found["curves"] = [
      {**cell, "epoch": i + 1}
      | {name: f"{part[i]:.4f}" for name, part in zip(CURVES[6:], parts, strict=True)}
      for i in range(epochs)
    ]
    matrix = history.confusion
    if matrix is not None and not method.rival:
      found["confusion"] = [
        {**cell, "class": i, "label": j, "chance": f"{matrix[i, j]:.4f}"}
        for i in range(len(matrix))
        for j in range(len(matrix))
      ]
  return found

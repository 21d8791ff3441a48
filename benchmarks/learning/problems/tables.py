"""Tables: two of R's package mlbench from a folder, and small ones of scikit-learn."""

import importlib
import pathlib
from typing import Any
import warnings

from sklearn import datasets

from benchmarks.learning.problems._source import Missing
from benchmarks.learning.problems._source import Source

# Where Debian's package r-cran-mlbench puts its tables.
FOLDER = pathlib.Path("/usr/lib/R/site-library/mlbench/data")


def satellite(folder: pathlib.Path | None) -> Source:
  """Landsat pixels with their neighbors: 6,435 x 36, 6 kinds of ground."""
  return _mlbench(folder, "Satellite", "classes")


def letter(folder: pathlib.Path | None) -> Source:
  """Moments of printed letters: 20,000 x 16, 26 letters."""
  return _mlbench(folder, "LetterRecognition", "lettr")


def _mlbench(folder: pathlib.Path | None, name: str, label: str) -> Source:
  path = (folder or FOLDER) / f"{name}.rda"
  if not path.is_file():
    raise Missing(
      f"{path} is missing; install Debian's r-cran-mlbench, or pass --folder with the"
      " folder data of the R package mlbench."
    )
  try:
    rdata = importlib.import_module("rdata")
  except ImportError as error:
    raise Missing(f"{path.name} is read with rdata: pip install rdata") from error
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Unknown encoding")
    frame = rdata.read_rda(path)[name]
  y = frame[label].cat.codes.to_numpy().astype(int)
  return Source(frame.drop(columns=label).to_numpy(float), y, int(y.max()) + 1)


def breast_cancer(folder: pathlib.Path | None) -> Source:
  return _bundled(folder, datasets.load_breast_cancer, 2)


def wine(folder: pathlib.Path | None) -> Source:
  return _bundled(folder, datasets.load_wine, 3)


def diabetes(folder: pathlib.Path | None) -> Source:
  return _bundled(folder, datasets.load_diabetes, 0)


def _bundled(folder: pathlib.Path | None, load: Any, classes: int) -> Source:
  del folder
  x, y = load(return_X_y=True)
  return Source(x, y, classes)


def friedman1(folder: pathlib.Path | None, rows: int = 600) -> Source:
  """Ten columns, of which five matter, and noise of variance 1."""
  del folder
  x, y = datasets.make_friedman1(rows, noise=1.0, random_state=0)
  return Source(x, y, 0)


def large_friedman1(folder: pathlib.Path | None) -> Source:
  return friedman1(folder, 6_000)

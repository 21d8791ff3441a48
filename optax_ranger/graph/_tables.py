"""Features and labels from files, as the command line takes them."""

import csv
import pathlib
from typing import Any
import zipfile

import numpy as np

FEATURES = (".npy", ".npz", ".csv", ".tsv", ".parquet")
LABELS = (*FEATURES, ".txt")
_FEATURE_NAMES = ("features", "embeddings", "x", "X")
_LABEL_NAMES = ("labels", "label", "y", "target", "class")


class BadFileError(ValueError):
  """A file that can't be read as a table; the message names it and says why."""


def read_features(path: pathlib.Path) -> np.ndarray:
  """Reads one row of numbers for each example, ``[n, d]``, or images.

  Args:
    path: ``.npy``; ``.npz`` with one array, or one that is called ``features``,
      ``embeddings`` or ``x``; ``.csv`` or ``.tsv``, with or without a header;
      ``.parquet`` (needs pyarrow).

  Returns:
    Real numbers of two or more dimensions.

  Raises:
    BadFileError: for a file that holds anything else.
  """
  _check(path, FEATURES, "features")
  if path.suffix in (".npy", ".npz"):
    features = _arrays(path, _FEATURE_NAMES)
  elif path.suffix == ".parquet":
    features = _numbers_of_columns(path, _parquet(path))
  else:
    features = _numbers(path)
  if features.dtype.kind not in "biuf":
    raise BadFileError(f"{path}: features must be real numbers, got {features.dtype}.")
  if features.ndim < 2:
    shape = list(features.shape)
    raise BadFileError(f"{path}: features must have shape [n, d], got {shape}.")
  if len(features) < 2 or not features[0].size:
    shape = list(features.shape)
    raise BadFileError(
      f"{path}: needs two examples and one feature at least, got {shape}."
    )
  return features


def read_labels(path: pathlib.Path, n: int, column: str | None = None) -> np.ndarray:
  """Reads one label for each of n examples; empty cells are missing labels.

  Args:
    path: as of ``read_features``, or ``.txt`` with one label a line. Integers stay
      integers, all else are names.
    n: how many there must be. A table with one row more has a header.
    column: the name of the column, or of the array; None for the only one, or one
      that is called ``label``, ``labels``, ``y``, ``target`` or ``class``.

  Returns:
    ``[n]``: integers, or objects where names are or labels miss.

  Raises:
    BadFileError: for a file that holds anything else.
  """
  _check(path, LABELS, "labels")
  if path.suffix in (".npy", ".npz"):
    labels = _arrays(path, (column,) if column else _LABEL_NAMES)
    if labels.ndim != 1 or labels.dtype.kind not in "biufUS":
      what = f"{labels.dtype} of shape {list(labels.shape)}"
      raise BadFileError(f"{path}: labels must be one column, got {what}.")
  else:
    if path.suffix == ".parquet":
      table = _parquet(path)
    else:
      table = _columns(path, n, column is not None)
    labels = _parsed(table[_choose(path, list(table), column, _LABEL_NAMES)])
  if len(labels) != n:
    raise BadFileError(f"{path}: holds {len(labels)} labels for {n} examples.")
  return labels


def _check(path: pathlib.Path, suffixes: tuple[str, ...], what: str) -> None:
  if not path.exists():
    raise BadFileError(f"{path}: there is no such file.")
  if not path.is_file():
    raise BadFileError(f"{path}: is not a file.")
  if path.suffix not in suffixes:
    known = ", ".join(suffixes)
    got = path.suffix or "no suffix"
    raise BadFileError(f"{path}: {what} must be in one of {known}, got {got}.")
  if not path.stat().st_size:
    raise BadFileError(f"{path}: the file is empty.")


def _choose(
  path: pathlib.Path, names: list[str], wanted: str | None, usual: tuple[str, ...]
) -> str:
  if wanted is not None:
    if wanted not in names:
      raise BadFileError(f"{path}: has no {wanted!r}, but {_listed(names)}.")
    return wanted
  known = [name for name in usual if name in names]
  if len(names) != 1 and not known:
    raise BadFileError(f"{path}: holds {_listed(names)}; say which with --column.")
  return names[0] if len(names) == 1 else known[0]


def _listed(names: list[str]) -> str:
  shown = ", ".join(map(repr, names[:8]))
  return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "nothing"


def _arrays(path: pathlib.Path, usual: tuple[str, ...]) -> np.ndarray:
  """The array of a file of NumPy."""
  try:
    with path.open("rb") as file:
      start = file.read(6)
      file.seek(0)
      if start != b"\x93NUMPY" and not start.startswith(b"PK"):
        raise BadFileError(f"{path}: is not a file of NumPy.")
      loaded = np.load(file, allow_pickle=False)
      if isinstance(loaded, np.ndarray):
        return loaded
      names = list(loaded.files)
      known = [name for name in usual if name in names]
      if len(names) != 1 and not known:
        raise BadFileError(
          f"{path}: holds {_listed(names)}; one must be called {usual[0]!r}."
        )
      return loaded[known[0] if known else names[0]]
  except BadFileError:
    raise
  except (ValueError, OSError, EOFError, zipfile.BadZipFile, MemoryError) as error:
    reason = _first(error)
    if "pickle" in reason:
      reason = "it holds Python objects."
    elif "EOF" in reason or "read all data" in reason:
      reason = "it is cut off."
    raise BadFileError(
      f"{path}: can't be read as an array of NumPy: {reason}"
    ) from error


def _parquet(path: pathlib.Path) -> dict[str, list[Any]]:
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise BadFileError(
      f"{path}: Parquet needs pyarrow: pip install 'optax-ranger[parquet]'."
    ) from error
  try:
    return parquet.read_table(path).to_pydict()
  except (ValueError, OSError) as error:  # Arrow's own errors are among these.
    reason = "." if "magic bytes" in str(error) else f": {_first(error)}"
    raise BadFileError(f"{path}: can't be read as Parquet{reason}") from error


def _numbers_of_columns(path: pathlib.Path, table: dict[str, list[Any]]) -> np.ndarray:
  """Numeric columns side by side; one column of lists is a matrix."""
  if not table:
    raise BadFileError(f"{path}: has no columns.")
  rows = []
  for name, values in table.items():
    try:
      rows.append(np.asarray(values, np.float64))
    except (TypeError, ValueError):
      raise BadFileError(f"{path}: the column {name!r} must hold numbers.") from None
  if len(rows) == 1 and rows[0].ndim == 2:
    return rows[0]
  if any(row.ndim != 1 for row in rows):
    raise BadFileError(f"{path}: must hold columns of numbers, or one column of lists.")
  return np.stack(rows, axis=1)


def _text(path: pathlib.Path) -> list[str]:
  try:
    text = path.read_text("utf-8-sig")
  except UnicodeDecodeError:
    raise BadFileError(f"{path}: is not text in UTF-8.") from None
  if "\0" in text:
    raise BadFileError(f"{path}: is not text, it holds zero bytes.")
  return text.splitlines()


def _delimiter(path: pathlib.Path, line: str) -> str:
  if path.suffix == ".tsv":
    return "\t"
  return max(",;\t", key=line.count)


def _numbers(path: pathlib.Path) -> np.ndarray:
  """The numbers of a table of text, after a header if there is one."""
  lines = [(i, line) for i, line in enumerate(_text(path), 1) if line.strip()]
  if not lines:
    raise BadFileError(f"{path}: holds no rows.")
  delimiter = _delimiter(path, lines[0][1])
  if not all(map(_is_number, lines[0][1].split(delimiter))):
    lines = lines[1:]
  if not lines:
    raise BadFileError(f"{path}: holds a header, but no rows of numbers.")
  try:
    rows = [line for _, line in lines]
    return np.loadtxt(rows, np.float64, delimiter=delimiter, ndmin=2, comments=None)
  except ValueError as error:
    width = len(lines[0][1].split(delimiter))
    for i, line in lines:
      cells = line.split(delimiter)
      if len(cells) != width:
        wrong = f"has {len(cells)} cells, the first has {width}"
        raise BadFileError(f"{path}: line {i} {wrong}.") from None
      for column, cell in enumerate(cells, 1):
        if not _is_number(cell):
          wrong = f"{cell!r} is not a number" if cell.strip() else "is empty"
          raise BadFileError(f"{path}: line {i}, column {column}: {wrong}.") from None
    raise BadFileError(f"{path}: can't be read as numbers: {_first(error)}") from error


def _columns(path: pathlib.Path, n: int, named: bool) -> dict[str, list[str]]:
  """The columns of a table of text."""
  lines = _text(path)
  if path.suffix == ".txt":
    return {"label": [line.strip() for line in lines]}
  delimiter = _delimiter(path, lines[0] if lines else "")
  try:
    rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
  except csv.Error as error:
    reason = "a quote is not closed." if "end of data" in str(error) else _first(error)
    raise BadFileError(f"{path}: can't be read as CSV: {reason}") from error
  width = len(rows[0]) if rows else 0
  # An empty line is an empty cell if there is one column.
  rows = [row or [""] for row in rows] if width == 1 else [row for row in rows if row]
  for i, row in enumerate(rows, 1):
    if len(row) != width:
      wrong = f"has {len(row)} cells, the first has {width}"
      raise BadFileError(f"{path}: row {i} {wrong}.")
  if not rows:
    raise BadFileError(f"{path}: holds no rows.")
  header = named or len(rows) == n + 1 or width > 1
  names = rows[0] if header else [str(i) for i in range(width)]
  if len(set(names)) < width:
    raise BadFileError(f"{path}: two columns have the same name: {_listed(names)}.")
  body = zip(*rows[header:], strict=True) if len(rows) > header else [()] * width
  return {name: list(cells) for name, cells in zip(names, body, strict=True)}


def _parsed(cells: list[Any]) -> np.ndarray:
  """Integers if all are, else names; None where there is no label."""
  cells = [cell.strip() if isinstance(cell, str) else cell for cell in cells]
  cells = [None if cell in ("", None) or cell != cell else cell for cell in cells]
  try:
    whole = [None if cell is None else int(cell) for cell in cells]
  except (TypeError, ValueError):
    whole = None
  if whole is not None and all(
    a is None or isinstance(b, str) or a == b for a, b in zip(whole, cells, strict=True)
  ):
    cells = whole
  values = np.empty([len(cells)], object)
  values[:] = cells
  return values


def _is_number(text: str) -> bool:
  try:
    float(text)
  except ValueError:
    return False
  return True


def _first(error: BaseException) -> str:
  """The first sentence of an error, without advice on arguments."""
  line = (str(error).splitlines() or [type(error).__name__])[0]
  return line.split(";")[0].rstrip(".") + "."

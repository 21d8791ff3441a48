"""The command line: `python -m optax_ranger audit features.npy labels.csv`."""

import argparse
import csv
import pathlib
import sys

import numpy as np

from optax_ranger import graph
from optax_ranger.graph import _page
from optax_ranger.graph import _tables


def main(arguments: list[str] | None = None) -> int:
  """Runs a command; returns the exit status."""
  parser = argparse.ArgumentParser(prog="python -m optax_ranger")
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  command = commands.add_parser("audit", help="find wrong labels of a data set")
  command.set_defaults(run=_audit)
  known = ", ".join(_tables.FEATURES)
  command.add_argument(
    "features", type=pathlib.Path, help=f"one row of numbers for each example: {known}"
  )
  command.add_argument(
    "labels", type=pathlib.Path, help="one label for each example: the same, or .txt"
  )
  command.add_argument("--column", help="of the labels, by name")
  command.add_argument("--k", type=int, default=20, help="neighbors (default: 20)")
  command.add_argument("--metric", choices=("euclidean", "cosine"), default="euclidean")
  command.add_argument(
    "--score",
    choices=("votes", "posterior"),
    default="posterior",
    help="votes of neighbors alone are faster, and find less (default: posterior)",
  )
  command.add_argument(
    "--images", metavar="HxW", help="shows rows as images, e.g. 28x28"
  )
  command.add_argument(
    "--out", type=pathlib.Path, default=pathlib.Path("audit"), help="folder to write"
  )
  options = parser.parse_args(arguments)
  try:
    options.run(options)
  except (ValueError, TypeError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def _audit(options: argparse.Namespace) -> None:
  features = _tables.read_features(options.features)
  labels = _tables.read_labels(options.labels, len(features), options.column)
  images = _images(features, options.images)
  rows = features.reshape(len(features), -1)
  if rows.dtype == bool:
    rows = rows.astype(np.uint8)
  neighbors = graph.build(rows, options.k, metric=options.metric)
  predictions = None
  if options.score == "posterior":
    predictions = graph.held_out_predictions(rows, labels)
  found = graph.audit(neighbors, labels, score=options.score, predictions=predictions)
  result = _page.findings(found, labels, neighbors, images)

  wrong = len(result.suspicious)
  with np.errstate(invalid="ignore"):
    bad = int((~np.isfinite(rows).all(axis=1)).sum()) if rows.dtype.kind == "f" else 0
  classes = len(set(result.names) - {""})
  notes = [
    f"{len(rows)} examples, {classes} classes, {options.k} neighbors."
    f" About {wrong} labels ({wrong / len(rows):.1%}) are likely wrong.",
    "Rows count from 0. Support is the share of the neighbors' votes, or the"
    " probability, for the given label.",
  ]
  if bad:
    notes.append(f"{bad} examples have non-finite features and were not audited.")
  print("\n".join(notes))
  print(f"\n{'row':>8}  {'given':20}{'suggested':20}{'support':>8}")
  for i in found.order[:20]:
    given, suggested = result.names[i], _page.suggested_name(result, i)
    print(f"{i:>8}  {given[:19]:20}{suggested[:19]:20}{found.support[i]:8.2f}")

  options.out.mkdir(parents=True, exist_ok=True)
  _write_table(options.out / "audit.csv", result)
  title = f"Labels of {options.features.name}"
  page = _page.render(result, title, notes)
  (options.out / "audit.html").write_text(page, encoding="utf-8")
  print(f"\nall rows: {options.out / 'audit.csv'}, page: {options.out / 'audit.html'}")


def _images(features: np.ndarray, shape: str | None) -> np.ndarray | None:
  """The features as images, where they are or are said to be."""
  if shape is not None:
    sides = shape.lower().split("x")
    if len(sides) not in (2, 3) or not all(side.isdecimal() for side in sides):
      raise ValueError(f"--images must be HxW, such as 28x28, got {shape!r}.")
    size = tuple(map(int, sides))
    if np.prod(size) != features[0].size:
      raise ValueError(
        f"--images {shape} needs {np.prod(size)} features, got {features[0].size}."
      )
    features = features.reshape(len(features), *size)
  is_image = features.ndim == 3 or (features.ndim == 4 and features.shape[3] in (1, 3))
  return features if is_image else None


def _write_table(path: pathlib.Path, result: _page.Findings) -> None:
  """All examples, the most suspicious first."""
  found, likely = result.found, set(result.suspicious.tolist())
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["row", "given", "suggested", "support", "likely_wrong"])
    for i in found.order.tolist():
      suggested = _page.suggested_name(result, i)
      support = f"{found.support[i]:.4f}"
      writer.writerow([i, result.names[i], suggested, support, int(i in likely)])


if __name__ == "__main__":
  sys.exit(main())

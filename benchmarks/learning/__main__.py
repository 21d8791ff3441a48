"""Learning studies: `python -m benchmarks.learning STUDY`.

Pieces that are in the table already are not run again, so a run may be stopped and
started at any time.
"""

import argparse
import importlib
import pathlib
import sys

from benchmarks.learning import _report
from benchmarks.learning import _runner
from benchmarks.learning import problems
from benchmarks.learning.problems._source import Missing

# A study is a module of this package with a `STUDY`.
STUDIES = (
  "wrong_labels",
  "other_noise",
  "learning_rates",
  "outer_momentum",
  "windows",
  "attacks",
)


def selected(pieces: list[_runner.Piece], only: str) -> list[_runner.Piece]:
  """Those that have one of the names in every column that a name occurs in."""
  names = [name for name in only.split(",") if name]
  wanted: dict[str, set[str]] = {}
  for name in names:
    columns = {key for piece in pieces for key, value in piece.items() if value == name}
    if not columns:
      known = sorted({value for piece in pieces for value in piece.values()})
      raise SystemExit(f"--only knows {', '.join(known)}; got {name!r}.")
    for column in columns:
      wanted.setdefault(column, set()).add(name)
  return [
    piece
    for piece in pieces
    if all(piece[column] in values for column, values in wanted.items())
  ]


def present(
  pieces: list[_runner.Piece], folders: dict[str, pathlib.Path]
) -> list[_runner.Piece]:
  """Those whose data is there; of the others, says what is missing."""
  missing = {}
  for name in dict.fromkeys(piece["problem"] for piece in pieces):
    try:
      problems.check(name, folders.get(name))
    except Missing as error:
      missing[name] = error
      print(f"SKIPPED: {name}. {error}", file=sys.stderr)
  return [piece for piece in pieces if piece["problem"] not in missing]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("study", choices=STUDIES)
  parser.add_argument("--quick", action="store_true", help="few pieces, few epochs")
  parser.add_argument("--tune", action="store_true", help="try settings instead")
  parser.add_argument(
    "--report",
    nargs="?",
    const=True,
    metavar="CSV",
    help="run nothing; print the tables of this file, or of the one in --out",
  )
  parser.add_argument(
    "--only", default="", help="problems, models, methods, with commas"
  )
  problems.add_folders(parser)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  parser.add_argument("--fresh", action="store_true", help="run every piece again")
  parser.add_argument(
    "--workers", type=int, help="processes; default: one on each core"
  )
  args = parser.parse_args()
  study: _runner.Study
  study = importlib.import_module(f"benchmarks.learning.{args.study}").STUDY
  stem = args.study + "_tuning" * args.tune + "_quick" * args.quick
  path = args.out / f"{stem}.csv"
  if isinstance(args.report, str):
    path = pathlib.Path(args.report)
    if not path.is_file():
      parser.error(f"--report: {path} is no file.")
  columns, key = study.columns, study.key
  if args.tune:
    if study.trials is None:
      parser.error(f"--tune: {args.study} tries settings in its usual run.")
    columns, key = {"": columns[""]}, (*key, "settings")
  tables = _runner.Tables(path, columns)
  if args.report is None:
    folders = problems.folders_of(args.folder)
    pieces = (study.trials if args.tune and study.trials else study.pieces)(args)
    pieces = present(selected(pieces, args.only), folders)
    if not pieces:
      sys.exit("There is nothing to run.")
    args.out.mkdir(parents=True, exist_ok=True)
    options = _runner.Options(folders, args.quick)
    _runner.collect(tables, pieces, key, study.run, options, args.fresh, args.workers)
  if not tables.rows[""]:
    sys.exit(f"{path} has no figures yet.")
  if args.tune:
    print(_report.tuning(tables.rows[""]))
    return
  print(study.report(tables.rows))
  if not isinstance(args.report, str):
    print(f"\nfigures: {path}")
    if study.draw is not None:
      study.draw(path.with_suffix(".png"), tables.rows)
      print("pictures: beside it")


if __name__ == "__main__":
  main()

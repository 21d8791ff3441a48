"""Noise other than random wrong labels: `python -m benchmarks.learning.other_noise`.

Outliers among the features, near-duplicates with conflicting labels, wrong labels
near the boundary between classes, targets with heavy tails. Each method has three
settings on every problem, kind of noise and seed; the one that is taken, once for
all of them, is best on noisy validation. Pieces that are in the table already are
not run again.
"""

import argparse
import pathlib

from benchmarks import _table
from benchmarks.learning.other_noise import noise as noises
from benchmarks.learning.other_noise import report
from benchmarks.learning.other_noise import training
from benchmarks.learning.other_noise import work


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
    print(report.table(rows, 1) + "\n" + report.table(rows, 0))
    return
  problems = args.only.split(",") if args.only else list(noises.PROBLEMS)
  unknown = set(problems) - set(noises.PROBLEMS)
  if unknown:
    parser.error(f"--only knows {', '.join(noises.PROBLEMS)}, got {', '.join(unknown)}")
  stem = "other_noise_quick" if args.quick else "other_noise"
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / f"{stem}_trials.csv"
  if args.fresh:
    path.unlink(missing_ok=True)
  seeds, rounds = (2, 6) if args.quick else (args.seeds, training.ROUNDS)
  trials = work.collect(path, work.pieces(problems, args.quick), seeds, rounds)
  rows = report.chosen(trials)
  _table.write(args.out / f"{stem}.csv", rows, work.COLUMNS)
  print(report.table(rows, 1))
  print(report.table(rows, 0))
  print("\n" + report.settings_table(trials))
  report.draw(args.out / f"{stem}.png", rows)
  print(f"\npicture: {args.out / stem}.png, figures: {args.out / stem}.csv")


if __name__ == "__main__":
  main()

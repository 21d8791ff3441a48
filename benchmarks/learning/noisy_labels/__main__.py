"""Training on wrong labels: `python -m benchmarks.learning.noisy_labels`.

Pieces that are in the table already are not run again, so it may be stopped.
"""

import argparse
import concurrent.futures
import functools
import pathlib
import sys

import tqdm

from benchmarks import _fashion
from benchmarks import _table
from benchmarks.learning.noisy_labels import data
from benchmarks.learning.noisy_labels import models
from benchmarks.learning.noisy_labels import recipe
from benchmarks.learning.noisy_labels import report
from benchmarks.learning.noisy_labels import work


def tune(args: argparse.Namespace) -> None:
  """Tries every method's settings; the best on noisy tuning images are printed."""
  path = args.out / "tuning.csv"
  rows = _table.read(path) if path.exists() else []
  if args.fresh:
    again = args.only.split(",") if args.only else list(work.METHODS)
    rows = [row for row in rows if row["method"] not in again]
  done = {(row["method"], row["settings"]) for row in rows}
  spelled = lambda trial: " ".join(f"{key}={value:g}" for key, value in trial.items())
  trials = [
    (name, trial)
    for name, method in work.METHODS.items()
    if not args.only or name in args.only.split(",")
    for trial in method.trials
    if (name, spelled(trial)) not in done
  ]
  seeds, noises = work.DEVELOPMENT_SEEDS, data.NOISES[:4]
  columns = [(noise, seed) for seed in seeds for noise in noises]
  with work.pool() as pool, tqdm.tqdm(total=len(trials) * len(columns)) as progress:
    for name, trial in trials:
      progress.set_description(name)
      futures = [
        pool.submit(
          work.train, ("mlp", name, *noise, seed), args.data, args.folder, 30, trial
        )
        for noise, seed in columns
      ]
      got = []
      for future in futures:
        got.append(future.result()[0])
        progress.update()
      for kind in ("last", "selected"):
        figures = [float(row[f"tuning_{kind}"]) for row in got]
        rows.append(
          {
            "method": name,
            "settings": spelled(trial),
            "judged": kind,
            "score": f"{sum(figures) / len(figures):.4f}",
            **{
              f"{noise}{rate:g}": f"{sum(figures[i::4]) / len(seeds):.4f}"
              for i, (noise, rate) in enumerate(noises)
            },
          }
        )
      _table.write(path, rows, tuple(rows[0]))
  for name in work.METHODS:
    own = [row for row in rows if row["method"] == name]
    if own:
      best = max(own, key=lambda row: float(row["score"]))
      print(f"{name:16} {best['score']} {best['judged']:9} {best['settings']}")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quick", action="store_true", help="some pieces: minutes")
  parser.add_argument("--tune", action="store_true", help="try settings instead")
  parser.add_argument("--report", action="store_true", help="train nothing")
  parser.add_argument("--data", choices=tuple(data.SIZES), default="fashion-mnist")
  parser.add_argument("--folder", type=pathlib.Path, default=_fashion.FOLDER)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--only", help="methods, with commas between them")
  parser.add_argument("--model", choices=tuple(models.MODELS), help="only this one")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  parser.add_argument("--fresh", action="store_true", help="run every piece again")
  args = parser.parse_args()
  unknown = set((args.only or "ranger").split(",")) - set(work.EVERYTHING)
  if unknown:
    parser.error(f"--only knows {', '.join(work.EVERYTHING)}, got {', '.join(unknown)}")
  if args.data == "fashion-mnist" and not args.folder.is_dir():
    print(
      f"SKIPPED: Fashion-MNIST is not in {args.folder}; install Debian's"
      " dataset-fashion-mnist, pass --folder, or take --data digits.",
      file=sys.stderr,
    )
    sys.exit(1)
  if args.tune and not data.SIZES[args.data].tuning:
    parser.error(f"--tune needs tuning images, and {args.data} has none to spare.")
  args.out.mkdir(parents=True, exist_ok=True)
  if args.tune:
    tune(args)
    return
  stem = "noisy_labels" if args.data == "fashion-mnist" else "noisy_labels_digits"
  stem += "_quick" * args.quick
  paths = report.Paths.of(args.out, stem)
  results = report.Results.read(paths)
  todo = [] if args.report else work.pieces(args)
  if args.only:
    todo = [key for key in todo if key[1] in args.only.split(",")]
  if args.model:
    todo = [key for key in todo if key[0] == args.model]
  if args.fresh:
    results.drop(todo)
  todo = [key for key in todo if not results.has(key)]
  if todo:
    with work.pool() as pool, tqdm.tqdm(total=len(todo), unit="training") as progress:
      train = functools.partial(pool.submit, work.train)
      futures = [train(key, args.data, args.folder, 30) for key in todo]
      for future in concurrent.futures.as_completed(futures):
        results.add(*future.result())
        results.write(paths)
        progress.update()
  print(report.tables(results, work.METHODS))
  print(f"\n{report.summary(results, work.METHODS)}")
  print(f"\n{report.verdicts(results, work.METHODS)}")
  print(f"\n{report.ablations(results, recipe.ABLATIONS)}")
  report.draw(paths, results, work.METHODS)


if __name__ == "__main__":
  main()

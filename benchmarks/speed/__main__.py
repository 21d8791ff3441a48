"""All figures of speed and memory in one run: `python -m benchmarks.speed`.

Every section runs in a process of its own, so that none meets the memory, threads or
simulated devices of another. What is measured is in a CSV file after each section;
`--table FILE` prints the Markdown table of such a file and measures nothing.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
import importlib
import pathlib
import subprocess
import sys
import tempfile
from typing import Any
from typing import NamedTuple

import tqdm

from benchmarks import _table

_ROOT = pathlib.Path(__file__).parents[2]


class Section(NamedTuple):
  """Some rows of the table.

  Attributes:
    function: `module.function` of this folder, which measures and returns them.
    quick: what it is given in a run that only tries everything out.
  """

  function: str
  quick: Mapping[str, int]


_SMALL = {"rounds": 2, "width": 256}
SECTIONS = {
  "gradient": Section("fusion.gradient_rows", {"rounds": 5, "size": 32}),
  "accumulation": Section("accumulation.micro_step_rows", _SMALL),
  "one-step": Section("accumulation.one_step_rows", _SMALL),
  "quiet": Section("accumulation.quiet_rows", {"rounds": 2, "width": 64}),
  "lookahead": Section("smoothing.lookahead_rows", _SMALL),
  "ema": Section("smoothing.ema_rows", _SMALL),
  "acceleration": Section("acceleration.one_step_rows", _SMALL),
  "ranger_radam": Section("smoothing.ranger_radam_rows", _SMALL),
  "all-reduces": Section(
    "training.all_reduce_rows", {"num_micro_batches": 4, "size": 256}
  ),
  "graph": Section("graph.exact_rows", {"rounds": 2, "n": 2000}),
  "regions": Section("regions.attention_rows", {"rounds": 2, "size": 16}),
}


def measure(function: str, options: Mapping[str, Any], path: str) -> None:
  """Measures the rows of one section, in this process, and writes them."""
  module, _, name = function.partition(".")
  rows = getattr(importlib.import_module(f"benchmarks.speed.{module}"), name)(**options)
  # Not before the section, which may set XLA's flags.
  from benchmarks.speed import _measure

  _table.write(pathlib.Path(path), [_measure.record(row) for row in rows])


def run(names: Sequence[str], quick: bool, path: pathlib.Path) -> list[str]:
  """Measures sections one after the other.

  Args:
    names: of the sections.
    quick: small sizes, few rounds.
    path: of the file that all rows are written to, after each section.

  Returns:
    The names of those that failed.
  """
  records, failed = [], []
  with (
    tempfile.TemporaryDirectory() as folder,
    tqdm.tqdm(names, unit="section") as progress,
  ):
    for name in progress:
      progress.set_description(name)
      section, part = SECTIONS[name], pathlib.Path(folder) / "part.csv"
      options = dict(section.quick) if quick else {}
      call = f"measure({section.function!r}, {options!r}, {str(part)!r})"
      done = subprocess.run(
        [
          sys.executable,
          "-c",
          f"from benchmarks.speed.__main__ import measure; {call}",
        ],
        cwd=_ROOT,
        check=False,
      )
      if done.returncode:
        failed.append(name)
        progress.write(f"FAILED: {name}, exit status {done.returncode}", sys.stderr)
        continue
      records += _table.read(part)
      _table.write(path, records)
  return failed


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  parser.add_argument("--quick", action="store_true", help="small sizes, a minute")
  parser.add_argument("--only", help=f"some of: {','.join(SECTIONS)}")
  parser.add_argument("--table", type=pathlib.Path, metavar="FILE")
  args = parser.parse_args(arguments)
  if args.table:
    print(_table.markdown(_table.read(args.table)))
    return 0
  names = args.only.split(",") if args.only else list(SECTIONS)
  unknown = [name for name in names if name not in SECTIONS]
  if unknown:
    parser.error(f"--only knows {', '.join(SECTIONS)}, got {', '.join(unknown)}")
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / ("performance_quick.csv" if args.quick else "performance.csv")
  _table.write(path, [])
  failed = run(names, args.quick, path)
  records = _table.read(path)
  print(_table.markdown(records))
  print(f"\nfigures: {path}")
  for record in records:
    if not record["ratio"]:
      print(f"NOT MEASURED: {record['what']} / {record['rival']}", file=sys.stderr)
  if failed:
    print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())

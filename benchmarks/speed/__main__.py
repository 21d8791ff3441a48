"""All figures of speed and memory in one run: `python -m benchmarks.speed`.

Every section runs in a process of its own, so that none meets the memory, threads or
simulated devices of another. What is measured is in a CSV file after each section;
`--table FILE` prints the Markdown table of such a file and measures nothing. `--gpu`
measures what `benchmarks/gpu.sh` is for, with a limit of time.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
import importlib
import pathlib
import subprocess
import sys
import tempfile
import time
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
  quick: Mapping[str, Any]


_SMALL = {"rounds": 2, "width": 256}
SECTIONS = {
  "gradient": Section("fusion.gradient_rows", {"rounds": 5, "size": 32}),
  "clipping": Section("fusion.clipping_rows", {"rounds": 2, "size": 32}),
  "tasks": Section("tasks.step_rows", {"rounds": 2, "width": 64}),
  "robust": Section("robust.median_rows", {"rounds": 2, "size": 1024}),
  "accumulation": Section("accumulation.micro_step_rows", _SMALL),
  "windows": Section("accumulation.way_rows", _SMALL),
  "one-step": Section("accumulation.one_step_rows", _SMALL),
  "quiet": Section("accumulation.quiet_rows", {"rounds": 2, "width": 64}),
  "lookahead": Section("smoothing.lookahead_rows", _SMALL),
  "ema": Section("smoothing.ema_rows", _SMALL),
  "acceleration": Section("acceleration.one_step_rows", _SMALL),
  "guarding": Section("guarding.one_step_rows", _SMALL),
  "ranger_radam": Section("smoothing.ranger_radam_rows", _SMALL),
  "all-reduces": Section(
    "training.all_reduce_rows", {"num_micro_batches": 4, "size": 256}
  ),
  "labels": Section(
    "labels.training_rows", {"rounds": 1, "epochs": 6, "scale": 0.03, "runs": 1}
  ),
  "graph": Section("graph.exact_rows", {"rounds": 2, "n": 2000}),
  "regions": Section("regions.attention_rows", {"rounds": 2, "size": 16}),
}
# On one accelerator, what may take longest last: the time may not reach it.
GPU_SECTIONS = {
  **{name: SECTIONS[name] for name in ("acceleration", "accumulation")},
  "resnet": Section(
    "gpu.resnet_rows", {"width": 4, "batch": 4, "rounds": 2, "calls": 2}
  ),
  "large": Section("gpu.large_rows", {"width": 64, "rounds": 2}),
  **{
    name: SECTIONS[name]
    for name in SECTIONS
    if name not in ("acceleration", "accumulation", "all-reduces", "graph", "labels")
  },
  "laws": Section("gpu.law_rows", {"steps": "scale_by_ngs"}),
  "exact-graph": Section("gpu.graph_rows", {"n": 2000}),
}


def measure(function: str, options: Mapping[str, Any], path: str) -> None:
  """Measures the rows of one section, in this process, and writes them."""
  module, _, name = function.partition(".")
  rows = getattr(importlib.import_module(f"benchmarks.speed.{module}"), name)(**options)
  # Not before the section, which may set XLA's flags.
  from benchmarks.speed import _measure

  _table.write(pathlib.Path(path), [_measure.record(row) for row in rows])


def run(
  sections: Mapping[str, Section],
  quick: bool,
  path: pathlib.Path,
  minutes: float | None = None,
) -> list[str]:
  """Measures sections one after the other.

  Args:
    sections: by name.
    quick: small sizes, few rounds.
    path: of the file that all rows are written to, after each section.
    minutes: for all sections together; None for no limit.

  Returns:
    The names of those that failed, or that the time did not reach.
  """
  records, failed = [], []
  end = None if minutes is None else time.monotonic() + 60 * minutes
  with (
    tempfile.TemporaryDirectory() as folder,
    tqdm.tqdm(sections.items(), unit="section") as progress,
  ):
    for name, section in progress:
      progress.set_description(name)
      part = pathlib.Path(folder) / "part.csv"
      options = dict(section.quick) if quick else {}
      call = f"measure({section.function!r}, {options!r}, {str(part)!r})"
      code = f"from benchmarks.speed.__main__ import measure; {call}"
      try:
        done = subprocess.run(
          [sys.executable, "-c", code],
          cwd=_ROOT,
          check=False,
          timeout=None if end is None else max(end - time.monotonic(), 0),
        )
        reason = f"exit status {done.returncode}" if done.returncode else None
      except subprocess.TimeoutExpired:
        reason = f"the {minutes:g} minutes are over"
      if reason is not None:
        failed.append(name)
        progress.write(f"FAILED: {name}, {reason}", sys.stderr)
        continue
      records += _table.read(part)
      _table.write(path, records)
  return failed


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  parser.add_argument("--quick", action="store_true", help="small sizes, a minute")
  parser.add_argument("--gpu", action="store_true", help="what an accelerator is for")
  parser.add_argument("--minutes", type=float, help="a limit for all sections together")
  parser.add_argument("--only", help=f"some of: {','.join(SECTIONS)}")
  parser.add_argument("--table", type=pathlib.Path, metavar="FILE")
  args = parser.parse_args(arguments)
  if args.table:
    print(_table.markdown(_table.read(args.table)))
    return 0
  sections = GPU_SECTIONS if args.gpu else SECTIONS
  names = args.only.split(",") if args.only else list(sections)
  unknown = [name for name in names if name not in sections]
  if unknown:
    parser.error(f"--only knows {', '.join(sections)}, got {', '.join(unknown)}")
  args.out.mkdir(parents=True, exist_ok=True)
  stem = ("gpu" if args.gpu else "performance") + ("_quick" if args.quick else "")
  path = args.out / f"{stem}.csv"
  _table.write(path, [])
  chosen = {name: sections[name] for name in names}
  failed = run(chosen, args.quick, path, args.minutes)
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

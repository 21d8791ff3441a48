"""The one run of all benchmarks, and the tables that are made of its figures."""

import csv
import importlib
import inspect
import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import _table
from benchmarks.speed import __main__ as performance
from benchmarks.speed import _measure

ROOT = pathlib.Path(__file__).parents[2]
RATIOS = ("ratio", "ratio_low", "ratio_high")


def _run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "benchmarks.speed", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def _record(**cells):
  return dict.fromkeys(_table.COLUMNS, "") | {"machine": "one"} | cells


@pytest.mark.slow
def test_quick_run(tmp_path):
  done = _run("--quick", "--only", "quiet,ranger_radam", "--out", tmp_path)
  assert done.returncode == 0, done.stderr
  path = tmp_path / "performance_quick.csv"
  with path.open(newline="") as file:
    header, *lines = csv.reader(file)
  assert tuple(header) == _table.COLUMNS
  assert all("jax" in line[-1] for line in lines)
  records = _table.read(path)
  assert [record["what"] for record in records] == [
    "accumulate(muon), 64 x 64, a call that emits nothing",
    *["ranger_radam, a step of 0.5 M parameters"] * 3,
  ]
  for record in records:
    if record["rival"] == "pytorch_optimizer.Ranger" and not record["ratio"]:
      assert "pip install torch pytorch_optimizer" in done.stderr
      assert "NOT MEASURED: ranger_radam" in done.stderr
      continue
    middle, low, high = (float(record[key]) for key in RATIOS)
    assert 0 < low <= middle <= high
    assert float(record["milliseconds"]) > 0
  assert _table.markdown(records) in done.stdout


@pytest.mark.slow
def test_everything_in_small(tmp_path):
  done = _run("--quick", "--out", tmp_path)
  assert done.returncode == 0, done.stderr
  records = _table.read(tmp_path / "performance_quick.csv")
  assert len({record["machine"] for record in records}) == 1
  sent = [one["ratio"] for one in records if one["what"].startswith("gradients sent")]
  assert sent == ["0.25", "0.25"]
  graphs = [one for one in records if one["what"].startswith("graph")]
  assert [one["what"].split()[-1] for one in graphs] == ["1.0000"] * 2
  assert all(float(one["temporaries"]) > 0 for one in graphs)


@pytest.mark.slow
def test_gpu_script_in_small(tmp_path):
  done = subprocess.run(
    ["benchmarks/gpu.sh", "--quick", "--out", tmp_path],
    cwd=ROOT,
    env={**os.environ, "PYTHON": sys.executable},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  records = _table.read(tmp_path / "gpu_quick.csv")
  (laws,) = (one for one in records if one["what"].startswith("laws on the device"))
  assert laws["ratio"] == "1"
  assert sum(one["what"].startswith("ResNet-18") for one in records) == 3
  assert records[-1]["what"] == "exact graph, 2000 x 64, k = 10, recall 1.0000"
  assert all("jax" in one["machine"] for one in records)


def test_a_section_that_the_time_does_not_reach(tmp_path, capfd):
  arguments = ["--gpu", "--only", "quiet", "--minutes", "0", "--out", str(tmp_path)]
  assert performance.main(arguments) == 1
  assert "FAILED: quiet, the 0 minutes are over" in capfd.readouterr().err


@pytest.mark.slow
def test_peak_is_not_that_of_the_parent():
  graph = importlib.import_module("benchmarks.speed.graph")
  ballast = np.ones(100_000_000)
  assert 0 < graph.peak("faiss", 2000) < ballast.nbytes / 4


def test_table_is_printed_alone(tmp_path, capsys):
  path = tmp_path / "given.csv"
  _table.write(path, [_record(what="this", rival="that", ratio="0.5")])
  assert performance.main(["--table", str(path)]) == 0
  assert capsys.readouterr().out == _table.markdown(_table.read(path)) + "\n"
  assert os.listdir(tmp_path) == ["given.csv"]


def test_a_section_that_fails_stops_no_other(tmp_path, capfd, monkeypatch):
  broken = performance.Section("no_such_module.rows", {})
  sections = {"broken": broken, "quiet": performance.SECTIONS["quiet"]}
  monkeypatch.setattr(performance, "SECTIONS", sections)
  assert performance.main(["--quick", "--out", str(tmp_path)]) == 1
  (record,) = _table.read(tmp_path / "performance_quick.csv")
  assert record["what"].startswith("accumulate(muon)")
  errors = capfd.readouterr().err
  assert "No module named 'benchmarks.speed.no_such_module'" in errors
  assert errors.rstrip().endswith("FAILED: broken")


def test_unknown_sections_are_refused(capsys):
  with pytest.raises(SystemExit):
    performance.main(["--only", "quiet,loud"])
  assert "got loud" in capsys.readouterr().err


ALL_SECTIONS = {**performance.SECTIONS, **performance.GPU_SECTIONS}


@pytest.mark.parametrize("name", ALL_SECTIONS)
def test_every_section_is_there(name, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # put back, if changed
  section = ALL_SECTIONS[name]
  module, function = section.function.split(".")
  found = getattr(importlib.import_module(f"benchmarks.speed.{module}"), function)
  signature = inspect.signature(found)
  signature.bind()
  signature.bind(**section.quick)


def test_records_are_medians_of_ratios():
  ours, theirs = np.array([1.0, 4.0, 9.0]), np.array([2.0, 4.0, 3.0])
  row = _measure.Row("a", "b", ours, theirs, "1/2", 2_500_000, None)
  record = _measure.record(row)
  assert [record[key] for key in RATIOS] == ["1", "0.75", "2"]
  assert record["milliseconds"] == "4000"
  assert record["rival_milliseconds"] == "3000"
  cells = _table.table([record]).splitlines()[-1]
  assert cells == "| a | b | 1 (0.75 to 2) | 1/2 | 4,000, 3,000 | 2.5 MB, - |"
  counts = _measure.record(row._replace(timed=False, temporaries=None))
  assert _table.table([counts]).endswith("| a | b | 1 (0.75 to 2) | 1/2 | - | - |")
  nothing = row._replace(samples=np.zeros(0), rival_samples=np.zeros(0))
  cells = _table.table([_measure.record(nothing)]).splitlines()[-1]
  assert cells == "| a | b | not measured | 1/2 | - | 2.5 MB, - |"


def test_each_machine_has_a_table():
  records = [_record(what=str(i), machine=f"machine {i % 2}") for i in range(4)]
  first, second = _table.markdown(records).split("machine 1")
  assert first.startswith("machine 0\n\n| what |")
  assert [line.split()[1] for line in first.split("\n") if "not" in line] == ["0", "2"]
  assert [line.split()[1] for line in second.split("\n") if "not" in line] == ["1", "3"]


@pytest.mark.parametrize(("backend", "calls"), [("cpu", 4), ("gpu", 40)])
def test_seconds_are_of_one_call(monkeypatch, backend, calls):
  monkeypatch.setattr(_measure.jax, "default_backend", lambda: backend)
  ticks, turns = itertools.count(), [0, 0]
  monkeypatch.setattr(_measure.time, "perf_counter", lambda: float(next(ticks)))

  def turn(i):
    turns[i] += 1
    return np.zeros(1)

  pair = [_measure.Contender(lambda i=i: turn(i), 0) for i in range(2)]
  found = _measure.measure("toy", pair, 3, calls=4)
  assert turns == [4 * calls] * 2  # one round more, to warm up
  # The clock ticks once a round, as only the last call is waited for.
  np.testing.assert_allclose(found, np.full([2, 3], 1 / calls))
  apart = _measure.measure("toy", pair, 3, calls=4, apart=True)
  np.testing.assert_allclose(apart, np.ones([2, 3, 4]))


@pytest.mark.parametrize("name", ["performance.csv", "gpu.csv"])
def test_readme_has_the_table_of_the_file(name):
  path = ROOT / "docs" / name
  readme = (ROOT / "benchmarks" / "README.md").read_text()
  records = _table.read(path)
  assert len(records) > 20
  assert _table.markdown(records) in readme

"""The detection study: its draws, its figures, and a run on a small set."""

import argparse
import pathlib

import numpy as np
import pytest

from benchmarks import _table
from benchmarks.learning import detection
from benchmarks.learning.problems._source import Source


def _source(n=600, classes=4, seed=0):
  rng = np.random.default_rng(seed)
  y = rng.integers(0, classes, n)
  x = 3 * np.eye(classes)[y] + rng.standard_normal([n, classes])
  return Source(x.astype(np.float32), y, classes, given={"people": (y + 1) % classes})


def test_draws_share_the_examples():
  source = _source()
  one = detection.drawn(source, "symmetric", 0.2, 0, 400)
  other = detection.drawn(source, "asymmetric", 0.4, 1, 400)
  np.testing.assert_array_equal(one.features, other.features)
  np.testing.assert_array_equal(one.true, other.true)
  assert len(one.true) == 400
  assert abs((one.given != one.true).mean() - 0.2) < 0.05
  wrong = other.given != other.true
  assert abs(wrong.mean() - 0.4) < 0.06
  np.testing.assert_array_equal(other.given[wrong], (other.true[wrong] + 1) % 4)
  again = detection.drawn(source, "symmetric", 0.2, 1, 400)
  assert (again.given != one.given).any()


def test_the_long_tail_halves_every_class():
  one = detection.drawn(_source(4000), *detection._LONG_TAIL, 0, 4000)
  counts = np.bincount(one.true)
  np.testing.assert_allclose(counts[1:] / counts[:-1], 0.5, atol=0.15)


def test_labels_of_people_are_those_of_the_examples(monkeypatch):
  source = _source()
  kinds = {**detection._noise.KINDS, "people": detection._noise.human}
  monkeypatch.setattr(detection._noise, "KINDS", kinds)
  one = detection.drawn(source, "people", 0.5, 0, 300)
  np.testing.assert_array_equal(one.given, (one.true + 1) % 4)


def test_figures_equal_counting():
  true = np.zeros(6, np.int32)
  given = np.array([1, 1, 0, 0, 0, 1], np.int32)
  backing = np.array([0.1, 0.9, 0.2, 0.8, np.nan, 0.3])
  found = detection.Found(backing, 2.0, 1.0)
  row = detection.judged(detection.Set(np.zeros([6, 1]), given, true), found)
  # Flagged are 0, 2 and 5, of which 0 and 5 are wrong; at the estimate 0 and 2.
  assert float(row["false_negatives"]) == pytest.approx(1 / 3, abs=1e-4)
  assert float(row["precision"]) == pytest.approx(1 / 2)
  assert float(row["wrong"]) == pytest.approx(1 / 2)
  # Of nine pairs of a wrong and a right label, six are in order (NaN comes last).
  assert float(row["auc"]) == pytest.approx(6 / 9, abs=1e-4)


@pytest.mark.slow
def test_every_method_runs(capsys):
  one = detection.drawn(_source(300), "symmetric", 0.2, 0, 300)
  args = argparse.Namespace(epochs=2, cleanlab_python="no-such-python")
  found = dict(detection.methods(one, args))
  assert "SKIPPED: cleanlab" in capsys.readouterr().out
  assert len(found) == 10
  rows = {name: detection.judged(one, each) for name, each in found.items()}
  assert float(rows["posterior: votes, held-out"]["auc"]) > 0.95
  assert float(rows["k-NN votes"]["auc"]) > 0.9
  records = [
    {"set": "toy", "seed": "0", "method": name, **row} for name, row in rows.items()
  ]
  first, second = detection.report(records).split("\n\n")
  assert first.splitlines()[0] == second.splitlines()[0]
  *cells, absent = first.splitlines()[-1].strip("| ").split(" | ")
  assert cells[:2] == ["toy", "300"]
  assert cells[3] == f"{float(rows['k-NN votes']['false_negatives']):.3f}"
  assert absent == "-"  # cleanlab


def test_docs_have_the_tables_of_the_file():
  docs = pathlib.Path(__file__).parents[3] / "docs"
  tables = detection.report(_table.read(docs / "detection.csv")).split("\n\n")
  page = (docs / "graph.md").read_text()
  assert all(table in page for table in tables)

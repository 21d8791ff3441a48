"""The table of other noise: what the makers do to the data, and what is run again."""

import collections
import pathlib

import jax
import numpy as np
import pytest

from benchmarks import _table
from benchmarks.learning.other_noise import methods
from benchmarks.learning.other_noise import noise as noises
from benchmarks.learning.other_noise import report
from benchmarks.learning.other_noise import training
from benchmarks.learning.other_noise import work

CELLS = [
  (problem, noise, rate)
  for problem in ("wine", "diabetes")
  for noise, kind in noises.NOISES.items()
  if noises.task(problem) in kind.tasks
  for rate in kind.rates
]


def given(problem, noise, rate, seed=0):
  """Noisy rows that are there, and the clean ones."""
  data, clean = noises.load(problem, noise, rate, seed), None
  if noise != "none":
    clean = noises.load(problem, "none", 0.0, seed)
  return data, clean or data, int(data.count)


@pytest.mark.parametrize(("problem", "noise", "rate"), CELLS)
def test_noise_is_of_the_seed_and_spares_the_test(problem, noise, rate):
  data, clean, count = given(problem, noise, rate)
  again, other = (noises.load(problem, noise, rate, seed) for seed in (0, 1))
  for field, same in zip(data, again, strict=True):
    np.testing.assert_array_equal(field, same)
  assert (data.test_x != other.test_x).any()
  np.testing.assert_array_equal(data.test_x, clean.test_x)
  np.testing.assert_array_equal(data.test_y, clean.test_y)
  assert [leaf.shape for leaf in data] == [leaf.shape for leaf in clean]
  assert np.isfinite(data.x[:count]).all()
  assert np.isfinite(data.y[:count]).all()
  assert np.isnan(data.x[count:]).all()


@pytest.mark.parametrize("rate", [0.1, 0.3])
@pytest.mark.parametrize("problem", ["wine", "diabetes"])
def test_outliers_keep_their_labels(problem, rate):
  data, clean, count = given(problem, "outlier features", rate)
  np.testing.assert_array_equal(data.y, clean.y)
  moved = (data.x != clean.x)[:count]
  bad = moved.any(axis=1)
  assert abs(bad.mean() - rate) < 0.02
  assert 0.3 < moved[bad].mean() < 0.6
  # Half of the bad rows have entries that no clean row comes near.
  wild = np.abs(data.x[:count]).max(axis=1) > 2 * np.abs(clean.x[:count]).max()
  assert 0.2 * rate < wild.mean() < 0.7 * rate


def test_duplicates_contradict():
  data, clean, count = given("wine", "conflicting duplicates", 0.2)
  before = int(clean.count)
  copies = data.x[before:count]
  np.testing.assert_array_equal(data.x[:before], clean.x[:before])
  np.testing.assert_array_equal(data.y[:before], clean.y[:before])
  away = np.linalg.norm(copies[:, None] - clean.x[None, :before], axis=2)
  source = away.argmin(axis=1)
  assert 0 < away.min(axis=1).min() <= away.min(axis=1).max() < 0.2
  assert (data.y[before:count] != clean.y[source]).all()
  times = collections.Counter(source.tolist())
  assert len(times) == round(0.2 * before)
  assert set(times.values()) == {3, 4, 5}


def test_boundary_labels_flip_where_classes_meet():
  rng = np.random.default_rng(0)
  position = rng.uniform(-3, 3, 2000)
  doubt = np.stack([-position, position, np.full(2000, -9.0)], axis=1)
  y = (position > 0).astype(int)
  for rate in (0.2, 0.4):
    _, noisy = noises.boundary(rng, position[:, None], y, rate, doubt)
    flipped = noisy != y
    assert abs(flipped.mean() - rate) < 0.04
    near = np.abs(position) < 1.5
    assert flipped[near].mean() > 2 * flipped[~near].mean() > 0
    np.testing.assert_array_equal(noisy[flipped], 1 - y[flipped])  # the runner-up


def test_targets_get_heavy_tails_and_gross_errors():
  data, clean, _ = given("diabetes", "gross errors", 0.2)
  wrong = data.y != clean.y
  assert abs(wrong.mean() - 0.2) < 0.01
  assert np.median(np.abs(data.y[wrong])) > 3
  data, clean, _ = given("diabetes", "heavy tails", 0.5)
  added = np.abs(data.y - clean.y)
  # Median and 99th percentile of |t| with 1.5 degrees: 0.9 and 18.
  assert 0.3 < np.median(added) < 0.6
  assert added.max() > 4


def test_rows_that_fill_up_are_never_trained_on():
  for noise, rate in (("none", 0.0), ("conflicting duplicates", 0.2)):
    data = noises.load("wine", noise, rate, 0)
    run = training.start("wine", data, 0, rounds=20)
    np.testing.assert_array_equal(np.unique(run.ids), np.arange(data.count))


def test_pieces_in_the_file_are_not_run_again(tmp_path, monkeypatch):
  ran = []
  run = work.run
  monkeypatch.setattr(
    work, "run", lambda piece, *args: ran.append(piece) or run(piece, *args)
  )
  path = tmp_path / "trials.csv"
  todo = [
    ("wine", "plain", "none", 0.0),
    ("wine", "plain", "conflicting duplicates", 0.2),
    ("wine", "plain", "boundary labels", 0.4),
  ]
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    work.collect(path, todo[:2], 2, 3)
    trials = work.collect(path, todo, 2, 3)
  assert ran == todo
  assert _table.read(path) == trials
  assert len(trials) == 3 * 2 * len(methods.METHODS["plain"].settings)
  for row in trials:
    assert tuple(row) == work.TRIAL_COLUMNS
    assert all(0 <= float(row[key]) <= 1 for key in ("validation", "last", "selected"))

  rows = report.chosen(trials)
  assert len(rows) == 3 * 2
  assert tuple(rows[0]) == work.COLUMNS
  text = report.table(rows)
  assert "**wine**" in text
  assert text.count("±") == 3
  assert report.settings_table(trials).count("rate=") == 3
  report.draw(tmp_path / "picture.png", rows)
  assert (tmp_path / "picture.png").stat().st_size > 1000


def test_the_setting_is_chosen_on_validation_over_all_problems():
  row = lambda problem, setting, validation, selected: {
    **dict.fromkeys(work.TRIAL_COLUMNS, "0"),
    "problem": problem,
    "method": "EMA",
    "setting": setting,
    "validation": str(validation),
    "selected": str(selected),
  }
  trials = [
    row("wine", "a", 0.9, 0.1),
    row("wine", "b", 0.8, 0.9),
    row("digits", "a", 0.5, 0.2),
    row("digits", "b", 0.7, 0.8),
    row("diabetes", "a", -0.1, 0.3),
    row("diabetes", "b", -0.2, 0.4),
  ]
  found = {r["problem"]: r["selected"] for r in report.chosen(trials)}
  assert found == {"wine": "0.9", "digits": "0.8", "diabetes": "0.3"}


def test_every_method_has_three_settings_of_the_same_names():
  for name, method in methods.METHODS.items():
    assert len(method.settings) == 3, name
    assert len({frozenset(settings) for settings in method.settings}) == 1, name


def test_docs_have_the_table_of_their_figures():
  docs = pathlib.Path(__file__).parents[2] / "docs"
  rows = _table.read(docs / "other_noise.csv")
  page = (docs / "other_noise.md").read_text()
  for figure in (0, 1):
    for line in report.table(rows, figure).strip().splitlines():
      assert line in page

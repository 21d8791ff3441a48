"""Pieces, files and tables of the studies; and that they resume."""

import collections
import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import _table
from benchmarks.learning import __main__ as command
from benchmarks.learning import _method
from benchmarks.learning import _ranger
from benchmarks.learning import _report
from benchmarks.learning import _rivals
from benchmarks.learning import _runner
from benchmarks.learning import attacks
from benchmarks.learning import learning_rates
from benchmarks.learning import other_noise
from benchmarks.learning import outer_momentum
from benchmarks.learning import problems
from benchmarks.learning import windows
from benchmarks.learning import wrong_labels

ROOT = pathlib.Path(__file__).parents[3]
DOCS = ROOT / "docs"
_FASHION = ("fashion-mnist", "mlp")
_NOISES = problems.SPECS["fashion-mnist"].noises
_TRIAL = (*_runner.CELL, "settings")
_OPTIONS = _runner.Options({}, quick=True)


def _piece(name, noise, seed, **cells):
  return {**_runner.piece(*_FASHION, name, noise, seed), **cells}


def _row(name, noise, seed, last, selected=0.0, tuning=0.0):
  figures = {"last": last, "selected": selected, "tuning_last": tuning}
  rest = {"selected_epoch": 2, "tuning_selected": 0.0, "seconds": 1}
  return {
    k: str(v) for k, v in {**_piece(name, noise, seed), **figures, **rest}.items()
  }


def test_pieces_in_the_file_are_not_run_again(tmp_path):
  ran, path = [], tmp_path / "some.csv"
  columns = {"": _runner.FIGURES, "curves": _runner.CURVES}

  def run(piece, options):
    assert options is _OPTIONS
    if piece["method"] == "broken":
      raise RuntimeError
    ran.append(piece)
    curve = {key: piece[key] for key in _runner.CELL}
    figures = dict.fromkeys(("last", "selected", "tuning_last", "tuning_selected"), 0.5)
    row = {**piece, **figures, "selected_epoch": 1, "seconds": 2.0}
    curve |= {"epoch": 1, "validation": 0.1, "test": 0.2, "wrong_share": 0.3}
    return {"": [row], "curves": [curve]}

  def collect(todo, **rest):
    tables = _runner.Tables(path, columns)
    key = wrong_labels.STUDY.key
    _runner.collect(tables, todo, key, run, _OPTIONS, workers=0, **rest)
    return tables

  todo = [_piece("sce", noise, 0) for noise in _NOISES]
  collect(todo[:2])
  tables = collect(todo)
  assert ran == todo
  assert _table.read(path) == tables.rows[""]
  assert len(tables.rows["curves"]) == len(todo)
  collect(todo)
  assert ran == todo
  tables = collect(todo[:1], fresh=True)
  assert ran == [*todo, todo[0]]
  assert [len(rows) for rows in tables.rows.values()] == [5, 5]
  # Written down after every piece: an error loses none that is done.
  more = [_piece("sce", _NOISES[0], 1), _piece("broken", _NOISES[0], 1)]
  with pytest.raises(RuntimeError):
    collect(more)
  assert len(_table.read(path)) == 6
  assert not list(tmp_path.glob("*.new"))


def test_only_selects_by_column():
  pieces = [
    _piece(name, noise, 0) for name in ("sce", "elr", "gce") for noise in _NOISES
  ]
  found = command.selected(pieces, "sce,elr,symmetric")
  assert {(piece["method"], piece["noise"]) for piece in found} == {
    ("sce", "symmetric"),
    ("elr", "symmetric"),
  }
  assert command.selected(pieces, "") == pieces
  with pytest.raises(SystemExit, match=r"--only knows .*gce.*; got 'nonsense'"):
    command.selected(pieces, "nonsense")


def test_missing_data_is_skipped(tmp_path, capsys):
  folders = problems.folders_of([f"fashion-mnist={tmp_path}"])
  pieces = [
    _piece("sce", _NOISES[0], 0),
    _runner.piece("wine", "small", "x", _NOISES[0], 0),
  ]
  assert command.present(pieces, folders) == pieces[1:]
  assert "SKIPPED: fashion-mnist" in capsys.readouterr().err
  everything = problems.folders_of([str(tmp_path)])
  assert set(everything.values()) == {tmp_path}
  assert set(everything) >= {*problems.SPECS, "Fashion-MNIST"}
  # The same images.
  assert problems.folders_of([f"Fashion-MNIST={tmp_path}"])["CNN"] == tmp_path
  own = problems.folders_of(["Fashion-MNIST=here", f"CNN={tmp_path}"])
  assert own["CNN"] == tmp_path


def test_rates_are_counted_that_are_about_as_good():
  def rows(problem, optimizer, *values):
    rates = learning_rates.RATES[: len(values)]
    cell = {"problem": problem, "optimizer": optimizer, "train_loss": "1"}
    return [
      cell | {"rate": f"{rate:g}", "test": str(value)}
      for rate, value in zip(rates, values, strict=True)
    ]

  table = [
    *rows("digits", "cosine adamw", 0.1, 0.5, 0.9, 0.97, 0.9, 0.1),
    *rows("digits", "NGS", 0.96, 0.95, 0.98, 0.97, 0.99, 0.961),
    *rows("digits", "nadamw", 0.98),
    *rows("quadratic", "cosine adamw", 9, 9, 1e-3, 9, 9, np.inf),
    *rows("quadratic", "NGS", 2e-3, 2e-2, 9e-3, 0.0, 1.0, np.inf),
    *rows("factorization", "NGS", 1, 1, 1, 1, 1, 1),
  ]
  solved = [
    {"problem": "small", "optimizer": "NGS", "small": name, "solved": done}
    for name, done in zip(problems.small.PROBLEMS, "1" * 4 + "0" * 11, strict=True)
  ]
  found = learning_rates.report({"": table, "small": solved})
  assert "| NGS | 0.960 | 0.950 | 0.980 | 0.970 | 0.990 | 0.961 | 5 |" in found
  assert "| nadamw | 0.980 |  |  |  |  |  | 1 |" in found
  assert "| NGS | 0.002 | 0.02 | 0.009 | 0 | 1 | inf | 3 |" in found
  assert "| NGS | 1 | 1 | 1 | 1 | 1 | 1 | - |" in found
  assert "| - | 4 |" in found


def test_steps_to_a_loss():
  losses = np.array([3.0, 2.0, 1.5, 2.5, 1.0])
  for goal, steps in ((3, 10), (2.0, 20), (1.2, 50), (0.9, np.inf)):
    assert outer_momentum.steps_to(goal, losses, 50) == steps


def test_shares_of_the_best_fixed_window():
  """One seed gets there at look 30 of 60, one never, and their mean in between."""
  looks, end = windows._LOOKS + windows._MORE, windows._LOOKS
  words = lambda values: " ".join(map(str, values))

  def row(method, seed, losses, steps_a_look):
    steps = steps_a_look * np.arange(1, looks + 1)
    cells = {"problem": "p", "method": method, "seed": str(seed), "window": "2"}
    return {**cells, "losses": words(losses), "steps": words(steps)}

  falling = np.linspace(looks, 1, looks)
  rows = [
    row(str(every), seed, falling + 10 * (every != 4), 8 / every)
    for every in windows.FIXED
    for seed in (3, 4)
  ]
  # At twice the speed, and never.
  rows += [row("noise scale", 3, np.linspace(looks, 1 - looks, looks), 1)]
  rows += [row("noise scale", 4, falling + looks, 1)]
  found = windows.Found(rows, "p")
  assert found.best == "4"
  np.testing.assert_allclose(found.last("4"), falling[end - windows._MEAN : end].mean())
  np.testing.assert_allclose(found.shares("4"), (1, 1))
  half = found.shares("noise scale", "3")
  np.testing.assert_allclose(half, (0.5, 0.25), rtol=0.06)
  assert found.shares("noise scale", "4") == (np.inf, np.inf)
  # The mean starts half of the looks higher, and falls one and a half times as fast.
  both = found.shares("noise scale")
  np.testing.assert_allclose(both[0], (60 + 36) / 1.5 / 60, rtol=0.05)


def test_settings_of_the_table_are_those_tuned(tmp_path):
  path = tmp_path / "wrong_labels_tuning.csv"
  rows = [
    {**_row("sce", _NOISES[0], seed, 0.0, tuning=score), "settings": settings}
    for settings, score in (("decay=0.1", 0.7), ("decay=0.2", 0.8), ("decay=0.3", 0.6))
    for seed in wrong_labels.DEVELOPMENT_SEEDS
  ]
  _table.write(path, rows, _runner.FIGURES)
  chosen = wrong_labels.tuned(path)
  assert chosen("fashion-mnist", "mlp", "sce", _NOISES[0]) == "decay=0.2"
  assert chosen("fashion-mnist", "cnn", "sce", _NOISES[0]) == "decay=0.2"
  assert chosen("fashion-mnist", "mlp", "sce", _NOISES[1]) == ""
  assert wrong_labels.tuned(tmp_path / "none.csv")("a", "b", "c", ("d", 0.1)) == ""


def test_the_setting_is_chosen_on_validation_over_all_problems():
  row = lambda problem, settings, validation, selected: {
    **_row("EMA", ("none", 0.0), 0, 0.0, selected),
    "problem": problem,
    "model": "small",
    "settings": settings,
    "tuning_selected": str(validation),
    "tuning_last": "-1",
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
  found = {r["problem"]: r["selected"] for r in other_noise.chosen(trials)}
  assert found == {"wine": "0.9", "digits": "0.8", "diabetes": "0.3"}


def test_verdicts_and_ablations_pair_seeds():
  rows = []
  for noise in _NOISES[:4]:
    for seed, (ours, sce, elr) in [(11, (0.9, 0.78, 0.1)), (2, (0.8, 0.7, 0.1))]:
      rows.append(_row("ranger", noise, seed, ours, 0.1))
      rows.append(_row("sce", noise, seed, 0.1, sce))
      # Noisy examples choose the rival that is worse on clean ones.
      rows.append(_row("elr", noise, seed, elr, 0.6, tuning=0.5))
    rows += [_row("ngs", noise, seed, last) for seed, last in [(2, 0.78), (11, 0.86)]]
    rows.append(_row("ranger", noise, 3, 0.1))  # A seed that others lack.
  figures, titles = _report.Figures(rows), _report.titles(wrong_labels.EVERYTHING)
  found = _report.ablations(figures, _FASHION, _report.titles(_ranger.ABLATIONS))
  assert found.count("| -3.0 ± 1.0 ") == 4
  found = _report.verdicts(figures, _FASHION, titles, _rivals.RIVALS)
  assert found.count("| 0.8500 | 0.7400 | SCE, selected | +0.1100 ± 0.0100 |") == 4
  found = _report.verdicts(figures, _FASHION, titles, _rivals.RIVALS, told=False)
  assert found.count("| 0.8500 | 0.1000 | ELR, last | +0.7500 ± 0.0500 |") == 4
  short = _report.summary(figures, _FASHION, titles)
  assert "| SCE | 0.740 | 0.740 | 0.740 | 0.740 | - |" in short


def test_columns_and_methods_have_names():
  args = command.argparse.Namespace(quick=False, seeds=2, out=pathlib.Path("nowhere"))
  for study, methods in (
    (wrong_labels, wrong_labels.EVERYTHING),
    (other_noise, other_noise.METHODS),
  ):
    pieces = study.pieces(args)
    assert len({tuple(x[key] for key in study.STUDY.key) for x in pieces}) == len(
      pieces
    )
    for piece in pieces:
      assert piece["method"] in methods
      assert piece["model"] in problems.SPECS[piece["problem"]].models


def test_trials_are_of_one_network_and_of_seeds_that_no_table_has():
  args = command.argparse.Namespace(quick=False, seeds=5, out=pathlib.Path("nowhere"))
  pieces, trials = wrong_labels.pieces(args), wrong_labels.trials(args)
  assert {piece["seed"] for piece in trials} == {"100"}
  assert not {piece["seed"] for piece in pieces} & {"100"}
  found = collections.Counter(tuple(piece[key] for key in _TRIAL) for piece in trials)
  assert set(found.values()) == {1}
  wanted = {
    (problem, problems.SPECS[problem].models[0], name, kind, f"{rate:g}", spelled)
    for problem in wrong_labels.PROBLEMS
    for name, method in wrong_labels.METHODS.items()
    for kind, rate in problems.SPECS[problem].noises
    for spelled in map(_method.spelled, method.trials)
  }
  assert set(found) == wanted
  # Whatever network a table has, there are trials of the MLP to choose by.
  tried = {(piece["problem"], piece["model"]) for piece in trials}
  assert {(piece["problem"], "mlp") for piece in pieces} == tried
  args.quick = True
  assert {piece["method"] for piece in wrong_labels.trials(args)} < set(
    wrong_labels.METHODS
  )


def test_pages_have_the_committed_figures():
  rows = {"": _table.read(DOCS / "noisy_labels.csv")}
  figures, titles = _report.Figures(rows[""]), _report.titles(wrong_labels.EVERYTHING)
  page = (DOCS / "noisy_labels.md").read_text()
  places = figures.places()
  assert {("cifar10n", "mlp"), _FASHION} <= set(places)
  for place in places:
    assert wrong_labels.table(figures, place) in page
    for ours, told in itertools.product(("ranger", "ranger_tuned"), (True, False)):
      judged = _report.verdicts(
        figures, place, titles, _rivals.RIVALS, ours=ours, told=told
      )
      assert judged.count("\n") == 1 or judged in page
  changes = _report.ablations(figures, _FASHION, _report.titles(_ranger.ABLATIONS))
  assert changes in page
  short = _report.summary(figures, _FASHION, wrong_labels.SHORT)
  assert short in (ROOT / "README.md").read_text()


def _committed(study):
  name = study.__name__.rpartition(".")[2]
  return _runner.Tables(DOCS / f"{name}.csv", study.STUDY.columns).rows


@pytest.mark.parametrize(
  ("study", "page"),
  [
    (other_noise, "other_noise.md"),
    (learning_rates, "learning_rates.md"),
    (outer_momentum, "smoothing.md"),
    (windows, "windows.md"),
    (attacks, "aggregation.md"),
  ],
)
def test_other_pages_have_the_committed_figures(study, page):
  page = (DOCS / page).read_text()
  for part in study.report(_committed(study)).split("\n\n"):
    assert part in page


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path):
  rows = {"": _table.read(DOCS / "noisy_labels.csv")}
  for name in ("curves", "confusion"):
    rows[name] = _table.read(DOCS / f"noisy_labels_{name}.csv")
  wrong_labels.draw(tmp_path / "wrong.png", rows)
  for study in (other_noise, learning_rates):
    name = study.__name__.rpartition(".")[2]
    study.draw(tmp_path / f"{name}.png", _committed(study))
  found = {path.stem: path.stat().st_size for path in tmp_path.glob("*.png")}
  assert set(found) == {
    "wrong_cifar10n",
    "wrong_cifar10n_confusion",
    "wrong_fashion-mnist",
    "wrong_fashion-mnist_confusion",
    "wrong_letter",
    "wrong_satellite",
    "wrong_sklearn-digits",
    "wrong_text",
    "other_noise",
    "learning_rates",
  }
  assert min(found.values()) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["averaged", "ranger"])
def test_a_piece_gives_rows_and_curves(method):
  piece = _runner.piece("sklearn-digits", "mlp", method, _NOISES[1], 0)
  found = wrong_labels.run(piece, _OPTIONS)
  (row,) = found[""]
  assert set(row) == set(_runner.FIGURES)
  assert 0.5 < float(row["last"]) <= 1
  assert all(set(curve) == set(_runner.CURVES) for curve in found["curves"])
  assert len(found["curves"]) == wrong_labels._QUICK_EPOCHS
  assert ("confusion" in found) == (method == "ranger")
  if method == "ranger":
    matrix = np.zeros([10, 10])
    for cell in found["confusion"]:
      matrix[cell["class"], cell["label"]] = float(cell["chance"])
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("study", "only", "pieces"),
  [
    ("wrong_labels", "sklearn-digits", 8),
    ("other_noise", "wine,EMA", 9),
    ("learning_rates", "quadratic", len(learning_rates.OPTIMIZERS)),
    ("learning_rates", "small,cosine adamw", 1),
    ("outer_momentum", "characters", 1),
    ("windows", "digits", len(windows.METHODS)),
    ("attacks", "digits,mixed median,3", 1),
  ],
)
def test_a_quick_study(tmp_path, study, only, pieces):
  arguments = ["--quick", "--only", only, "--out", str(tmp_path)]
  for wanted in (f"0/{pieces} ", ""):
    done = subprocess.run(
      [sys.executable, "-m", "benchmarks.learning", study, *arguments],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    # The second time, nothing is left to run.
    assert (wanted in done.stderr) if wanted else ("piece" not in done.stderr)
    heads = ("method", "starting rate", "optimizer", "window", "aggregator")
    assert any(f"| {head} |" in done.stdout for head in heads)
  without = ("outer_momentum", "windows", "attacks")
  assert list(tmp_path.glob("*.png")) or study in without

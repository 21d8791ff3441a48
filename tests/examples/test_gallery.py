"""The programs of the gallery, and the table of what they gained."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "gallery"


def _gallery():
  path = ROOT / "docs" / "_extensions" / "gallery.py"
  spec = importlib.util.spec_from_file_location("gallery", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


GALLERY = _gallery()
PROGRAMS = GALLERY.programs()
MEASURED = [name for name in PROGRAMS if GALLERY.results(name)]
# The demo, and several processes with checkpoints.
LONG = {"multi_host", "noisy_labels"}


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - LONG))
def test_a_program_is_short_and_uses_public_names(name):
  code = (ROOT / "examples" / f"{name}.py").read_text()
  assert len(code.splitlines()) <= 150
  for private in ("optax_ranger._", "ranger._", "benchmarks", "from tests"):
    assert private not in code


@pytest.mark.parametrize("name", MEASURED)
def test_results_are_complete(name):
  found = GALLERY.results(name)
  assert {found["baseline"], found["ours"]} <= set(found["results"])
  assert found["better"] in ("higher", "lower")
  assert all(found["results"].values())
  assert 1000 < (FOLDER / f"{name}.png").stat().st_size < 200_000


def test_the_table_shows_the_results():
  assert GALLERY.table() in (FOLDER / "index.md").read_text()


@pytest.mark.parametrize(
  ("ours", "better", "expected"),
  [
    ([0.9, 0.91], "higher", "+0.205"),
    ([0.9, 0.5], "higher", "none (+0.000 ± 0.200)"),
    ([0.9, 0.91], "lower", "+0.205, worse"),
    ([0.9], "higher", "+0.200 (one seed)"),
  ],
)
def test_gain(ours, better, expected):
  results = {"a": [0.7, 0.7][: len(ours)], "b": ours}
  found = {"results": results, "better": better, "baseline": "a", "ours": "b"}
  assert GALLERY.gain(found) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_a_program_runs(name, tmp_path):
  script = ROOT / "examples" / f"{name}.py"
  done = subprocess.run(
    [sys.executable, script, "--quick", "--out", tmp_path],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found, kept = (
    json.loads((tmp_path / f"{name}.json").read_text()),
    GALLERY.results(name),
  )
  assert {found["baseline"], found["ours"]} == {kept["baseline"], kept["ours"]}
  assert set(found["results"]) <= set(kept["results"])
  assert (tmp_path / f"{name}.png").stat().st_size > 1000

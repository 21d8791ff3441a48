"""The step that CONTRIBUTING.md adds satisfies every law."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def _add(name, step, to_steps, to_package, case, folder):
  """The four edits of the page."""
  path = folder / name
  assert not path.exists(), f"{name} is a file of the package already"
  path.write_text(step)
  for name, lines in (("steps/", to_steps), ("", to_package)):
    path = folder / f"optax_ranger/{name}__init__.py"
    path.write_text(path.read_text() + lines)
  path = folder / "tests/laws/registry.py"
  before, start, rest = path.read_text().partition("\nCASES = (")
  cases, end, after = rest.partition("\n)\n")
  path.write_text(f"{before}{start}{cases}\n{case}{end}{after}")


@pytest.mark.slow
def test_the_worked_example_satisfies_every_law(tmp_path):
  for name in ("optax_ranger", "tests"):
    shutil.copytree(ROOT / name, tmp_path / name)
  for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
    shutil.copy(ROOT / name, tmp_path)
  page = (ROOT / "CONTRIBUTING.md").read_text()
  (name,) = re.findall(r"`(\S+)`, the step:", page)
  edits = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  edits += re.findall(r"```diff\n\+(.*?)\n```", page, re.DOTALL)
  _add(name, *edits, tmp_path)
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
  command += ["tests/laws", "-k", "clip_entries"]
  done = subprocess.run(
    command, cwd=tmp_path, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout[-2000:]
  passed = re.search(r"(\d+) passed", done.stdout)
  assert passed is not None
  assert int(passed[1]) >= 25

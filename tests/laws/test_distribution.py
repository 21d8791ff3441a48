"""The wheel and the sdist: built, installed and tried."""

import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

import optax_ranger as ranger

ROOT = pathlib.Path(__file__).parents[2]
_TRY = """
import pathlib, sys
import jax.numpy as jnp, optax, optax_ranger as ranger
assert pathlib.Path(ranger.__file__).is_relative_to(sys.argv[1]), ranger.__file__
tx = optax.chain(ranger.skip_nonfinite(optax.sgd(1.0)), ranger.smooth_by_ema(0.9))
params = {"w": jnp.ones(3)}
updates, state = tx.update(params, tx.init(params), params)
assert (updates["w"] == -1).all()
print(ranger.__version__)
"""


def _run(*command, **options):
  command = [sys.executable, *map(str, command)]
  done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow
def test_the_wheel_of_the_sdist_is_installed_and_works(tmp_path):
  _run("-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=ROOT)
  (sdist,) = tmp_path.glob("*.tar.gz")
  with tarfile.open(sdist) as archive:
    archive.extractall(tmp_path / "sdist", filter="data")
  (source,) = (tmp_path / "sdist").iterdir()
  for name in ("tests/laws", "docs", "examples", "benchmarks/speed", "CHANGELOG.md"):
    assert (source / name).exists(), name
  _run("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=source)
  (wheel,) = tmp_path.glob("*.whl")
  files = {str(p.relative_to(ROOT)) for p in (ROOT / "optax_ranger").rglob("*.py")}
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
  assert files | {"optax_ranger/py.typed"} == {
    name for name in names if name.startswith("optax_ranger/")
  }
  place = tmp_path / "installed"
  _run("-m", "pip", "install", "--quiet", "--no-deps", "--target", place, wheel)
  environment = {"PYTHONPATH": str(place), "PATH": "", "JAX_PLATFORMS": "cpu"}
  version = _run("-c", _TRY, place, env=environment, cwd=tmp_path)
  assert version.strip() == ranger.__version__

"""The examples run as they stand.

`tests/recipes/test_ranger.py` runs the demo, `tests/processes/test_hosts.py` the one
of many hosts.
"""

import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def test_batch_norm():
  done = subprocess.run(
    [sys.executable, EXAMPLES / "batch_norm.py", "--epochs", "4"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  accuracies = re.findall(r"(0\.\d{3})$", done.stdout, re.M)
  assert len(accuracies) == 4
  assert min(map(float, accuracies)) > 0.9


@pytest.mark.slow
def test_multi_host_on_one():
  done = subprocess.run(
    [sys.executable, EXAMPLES / "multi_host.py", "--devices", "8"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  (accuracy,) = re.findall(r"^8 devices, test accuracy: (0\.\d{3})$", done.stdout, re.M)
  assert float(accuracy) > 0.95  # with two wrong labels of five

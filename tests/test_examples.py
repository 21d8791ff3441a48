"""The examples run as they stand; `tests/test_ranger.py` has the demo's."""

import pathlib
import re
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


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

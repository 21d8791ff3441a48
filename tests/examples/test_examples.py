"""The demo's picture, and the example of many hosts on one.

`tests/recipes/test_ranger.py` runs the demo, `tests/processes/test_hosts.py` the one of
many hosts, and `test_gallery.py` all others.
"""

import importlib.util
import pathlib
import re
import subprocess
import sys

from matplotlib import text as text_
import numpy as np
import pytest

import optax_ranger as ranger

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


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


@pytest.mark.slow
def test_the_picture_of_the_demo_cuts_nothing_off(tmp_path, monkeypatch):
  from matplotlib import pyplot as plt

  spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "noisy_labels.py")
  demo = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(demo)
  figures = []
  monkeypatch.setattr(plt, "close", figures.append)
  results = {"plain": {"label": "AdamW", "curves": np.array([[0.5, 0.6]])}}
  data = demo.load_digits(0.4, 0)
  known = ranger.robust_labels(10).init(data[0], data[1])
  demo.draw(tmp_path / "demo.png", results, 0.4, data, known)
  (figure,) = figures
  figure.draw_without_rendering()
  # Titles, labels and the legend: tick labels may be kept beyond the limits, unseen.
  texts = [text for text in figure.findobj(text_.Text) if text.get_text()]
  words = [text for text in texts if not text.get_text().replace(".", "").isdigit()]
  boxes = [text.get_window_extent() for text in words]
  assert len(boxes) > 20
  assert min(box.x0 for box in boxes) >= figure.bbox.x0
  assert max(box.x1 for box in boxes) <= figure.bbox.x1

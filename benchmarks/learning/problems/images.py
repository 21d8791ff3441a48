"""Images: Fashion-MNIST from a folder, and scikit-learn's digits."""

import pathlib
from typing import Any

import numpy as np
from sklearn import datasets

from benchmarks import _fashion
from benchmarks.learning.problems._source import Missing
from benchmarks.learning.problems._source import Source

FOLDER = _fashion.FOLDER
# Fashion-MNIST: shirt to T-shirt, coat to pullover, sneaker to sandal, ankle boot to
# sneaker, dress to coat. Digits use the same pairs.
MISTAKEN_FOR = np.array([0, 1, 2, 4, 2, 5, 0, 5, 8, 7])


def fashion(folder: pathlib.Path | None) -> Source:
  """Fashion-MNIST, 60,000 images to draw from and 10,000 to test on."""
  if folder is None or not (folder / _fashion.FILES[0]).is_file():
    raise Missing(
      f"Fashion-MNIST is not in {folder}; install Debian's dataset-fashion-mnist, or"
      f" pass --folder with a folder that holds {', '.join(_fashion.FILES)}."
    )
  files = [_fashion.read_idx(folder / file) for file in _fashion.FILES]
  flat = lambda array: array.reshape(len(array), -1).astype(np.float32) / 255
  x, y, test_x, test_y = flat(files[0]), files[1], flat(files[2]), files[3]
  return Source(x, y.astype(int), 10, (test_x, test_y.astype(int)), MISTAKEN_FOR)


def digits(folder: pathlib.Path | None) -> Source:
  """Scikit-learn's digits: 1,797 images of 8 x 8."""
  del folder
  load: Any = datasets.load_digits
  x, y = load(return_X_y=True)
  return Source(np.asarray(x, np.float32) / 16, y, 10, next_class=MISTAKEN_FOR)

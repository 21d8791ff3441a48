"""Images, and labels of which some are wrong by a seed."""

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from benchmarks import _fashion

NUM_CLASSES = 10
# Fashion-MNIST: shirt to T-shirt, coat to pullover, sneaker to sandal, ankle boot to
# sneaker, dress to coat; digits have the same pairs, for want of better ones.
_CONFUSED_WITH = np.array([0, 1, 2, 4, 2, 5, 0, 5, 8, 7])
NOISES = (
  ("symmetric", 0.2),
  ("symmetric", 0.4),
  ("symmetric", 0.6),
  ("asymmetric", 0.4),
  ("symmetric", 0.0),
)


class Sizes(NamedTuple):
  """How many images each part has, and a batch: so many that steps are as many."""

  train: int
  validation: int
  tuning: int
  batch: int


SIZES = {
  "fashion-mnist": Sizes(10_000, 2_000, 10_000, 128),
  "digits": Sizes(1_000, 300, 0, 16),
}


class Problem(NamedTuple):
  """What a method is given, and what it is judged by.

  Attributes:
    images, labels: ``float32 [n, d]`` and ``int32 [n]``, wrong ones among them.
    true_labels: what nothing but a picture may see.
    validation_images, validation_labels: wrong ones among these too; the epoch is
      selected by them.
    tuning_images, tuning_labels: as those; only settings are chosen by them.
    test_images, test_labels: clean.
    confusion: ``float [10, 10]``, the chance of each label given the class.
    wrong: the share of wrong labels, which co-teaching is told.
    batch: how many images a step has.
  """

  images: jax.Array
  labels: jax.Array
  true_labels: jax.Array
  validation_images: jax.Array
  validation_labels: jax.Array
  tuning_images: jax.Array
  tuning_labels: jax.Array
  test_images: jax.Array
  test_labels: jax.Array
  confusion: np.ndarray
  wrong: float
  batch: int


def confusion_of(noise: str, rate: float) -> np.ndarray:
  """The matrix of a kind of noise: the chance of each label, given the class."""
  if noise == "symmetric":
    others = np.full([NUM_CLASSES] * 2, rate / (NUM_CLASSES - 1))
    return np.where(np.eye(NUM_CLASSES) > 0, 1 - rate, others)
  if noise == "asymmetric":
    kept = np.eye(NUM_CLASSES)
    return (1 - rate) * kept + rate * kept[_CONFUSED_WITH]
  raise ValueError(f"noise must be symmetric or asymmetric, got {noise!r}.")


def corrupt(labels: np.ndarray, confusion: np.ndarray, seed: int) -> np.ndarray:
  """Draws each label anew from its class's row."""
  draws = np.random.default_rng([seed, 1]).random([len(labels), 1])
  return (draws > confusion.cumsum(axis=1)[labels]).sum(axis=1).clip(0, 9)


@functools.lru_cache(maxsize=2)
def problem(
  name: str, noise: str, rate: float, seed: int, folder: pathlib.Path
) -> Problem:
  """Draws images by the seed, and then their labels."""
  images, labels, test_images, test_labels = _read(name, folder)
  sizes = SIZES[name]
  order = np.random.default_rng(seed).permutation(len(images))[: sum(sizes[:3])]
  confusion = confusion_of(noise, rate)
  true = labels[order]
  given = corrupt(true, confusion, seed)
  bounds = np.cumsum(sizes)[:2]
  x = [jnp.asarray(part) for part in np.split(images[order], bounds)]
  y = [jnp.asarray(part, jnp.int32) for part in np.split(given, bounds)]
  return Problem(
    images=x[0],
    labels=y[0],
    true_labels=jnp.asarray(true[: sizes.train], jnp.int32),
    validation_images=x[1],
    validation_labels=y[1],
    tuning_images=x[2],
    tuning_labels=y[2],
    test_images=jnp.asarray(test_images),
    test_labels=jnp.asarray(test_labels, jnp.int32),
    confusion=confusion,
    wrong=float((confusion.sum(axis=1) - np.diag(confusion)).mean()),
    batch=sizes.batch,
  )


@functools.lru_cache(maxsize=1)
def _read(name: str, folder: pathlib.Path) -> tuple[np.ndarray, ...]:
  if name == "digits":
    images, labels = datasets.load_digits(return_X_y=True)
    images = np.asarray(images, np.float32) / 16
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    return images[:1300], labels[:1300], images[1300:], labels[1300:]
  files = [_fashion.read_idx(folder / file) for file in _fashion.FILES]
  flat = lambda array: array.reshape(len(array), -1).astype(np.float32) / 255
  return flat(files[0]), files[1], flat(files[2]), files[3]

"""The data of the learning studies: what noise does, how data is split and read."""

import collections
import io
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from benchmarks.learning import _noise
from benchmarks.learning import problems
from benchmarks.learning.problems import cifar10n
from benchmarks.learning.problems import text
from benchmarks.learning.problems._source import Missing
from benchmarks.learning.problems._source import Source

_FLIPS = [
  ("symmetric", 0.2, 10),
  ("symmetric", 0.6, 3),
  ("asymmetric", 0.4, 10),
  ("asymmetric", 0.4, 26),
  ("symmetric", 0.0, 4),
]
_CELLS = [
  (problem, *noise)
  for problem in ("wine", "diabetes")
  for noise in problems.SPECS[problem].noises
]


@pytest.mark.parametrize(("noise", "rate", "classes"), _FLIPS)
def test_labels_are_drawn_by_their_matrix(noise, rate, classes):
  confusion = _noise.confusion_of(noise, rate, classes)
  true = np.repeat(np.arange(classes), 20_000)
  given = _noise.corrupt(np.random.default_rng(3), true, confusion)
  counted = np.zeros([classes] * 2)
  np.add.at(counted, (true, given), 1 / 20_000)
  np.testing.assert_allclose(confusion.sum(axis=1), 1)
  np.testing.assert_allclose(np.diag(confusion), 1 - rate)
  np.testing.assert_allclose(counted, confusion, atol=0.015)
  if noise == "asymmetric":
    assert (np.count_nonzero(confusion, axis=1) == 2).all()


def test_images_are_called_what_they_look_like():
  confusion = _noise.confusion_of("asymmetric", 0.4, 10, problems.images.MISTAKEN_FOR)
  pairs = {(a, b) for a, b in zip(*np.nonzero(confusion), strict=True) if a != b}
  assert pairs == {(6, 0), (4, 2), (7, 5), (9, 7), (3, 4)}


def test_seeds_change_images_and_labels():
  one, other = (problems.draw("sklearn-digits", "symmetric", 0.4, s) for s in (0, 1))
  assert not np.array_equal(one.train.x, other.train.x)
  assert 0.35 < float((one.train.y != one.true).mean()) < 0.45
  assert one.wrong == pytest.approx(0.4)
  assert (len(one.train.y), len(one.valid.y), len(one.test.y)) == (1000, 300, 497)
  shared = {row.tobytes() for row in np.asarray(one.train.x)}
  # Digits has no two images alike.
  for part in (one.valid, one.test):
    assert not any(row.tobytes() in shared for row in np.asarray(part.x))


def test_parts_hold_every_class_in_proportion():
  labels = np.repeat(np.arange(3), [600, 300, 100])
  source = Source(np.zeros([1000, 1]), labels, 3)
  parts = problems._split(source, (0.6, 0.15, 0.0), 0)
  assert [len(part) for part in parts] == [600, 150, 0, 250]
  assert sorted(np.concatenate(parts)) == list(range(1000))
  for part in (parts[0], parts[1], parts[3]):
    shares = np.bincount(labels[part]) / len(part)
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.02)


@pytest.mark.parametrize(("problem", "noise", "rate"), _CELLS)
def test_noise_is_of_the_seed_and_spares_the_test(problem, noise, rate):
  data, clean = (
    problems.draw(problem, *of, 0) for of in ((noise, rate), ("none", 0.0))
  )
  problems.draw.cache_clear()
  again, other = (problems.draw(problem, noise, rate, seed) for seed in (0, 1))
  for part in ("train", "valid", "test"):
    for field, same in zip(getattr(data, part), getattr(again, part), strict=True):
      np.testing.assert_array_equal(field, same)
      assert np.isfinite(field).all()
  assert (data.test.x != other.test.x).any()
  np.testing.assert_array_equal(data.test.x, clean.test.x)
  np.testing.assert_array_equal(data.test.y, clean.test.y)
  assert data.steps == clean.steps


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_outliers_keep_their_labels(rate):
  data, clean = (
    problems.draw("diabetes", *of, 0).train
    for of in (("outlier features", rate), ("none", 0.0))
  )
  np.testing.assert_array_equal(data.y, clean.y)
  moved = np.asarray(data.x != clean.x)
  bad = moved.any(axis=1)
  assert abs(bad.mean() - rate) < 0.02
  assert 0.3 < moved[bad].mean() < 0.6
  # Half of the bad rows have entries that no clean row comes near.
  wild = np.abs(data.x).max(axis=1) > 2 * np.abs(clean.x).max()
  assert 0.2 * rate < wild.mean() < 0.7 * rate


def test_duplicates_contradict():
  data, clean = (
    problems.draw("wine", *of, 0).train
    for of in (("conflicting duplicates", 0.2), ("none", 0.0))
  )
  before = len(clean.y)
  copies = np.asarray(data.x[before:])
  np.testing.assert_array_equal(data.x[:before], clean.x)
  np.testing.assert_array_equal(data.y[:before], clean.y)
  away = np.linalg.norm(copies[:, None] - np.asarray(clean.x)[None], axis=2)
  source = away.argmin(axis=1)
  assert 0 < away.min(axis=1).min() <= away.min(axis=1).max() < 0.2
  assert (np.asarray(data.y[before:]) != np.asarray(clean.y)[source]).all()
  times = collections.Counter(source.tolist())
  assert len(times) == round(0.2 * before)
  assert set(times.values()) == {3, 4, 5}


def test_boundary_labels_flip_where_classes_meet():
  rng = np.random.default_rng(0)
  position = rng.uniform(-3, 3, 2000)
  chances = np.stack([-position, position, np.full(2000, -9.0)], axis=1)
  facts = _noise.Facts(3, _noise.next_of(3), log_chances=lambda x: chances)
  y = (position > 0).astype(int)
  for rate in (0.2, 0.4):
    _, noisy = _noise.boundary(rng, position[:, None], y, rate, facts)
    flipped = noisy != y
    assert abs(flipped.mean() - rate) < 0.04
    near = np.abs(position) < 1.5
    assert flipped[near].mean() > 2 * flipped[~near].mean() > 0
    np.testing.assert_array_equal(noisy[flipped], 1 - y[flipped])  # the runner-up


def test_targets_get_heavy_tails_and_gross_errors():
  draw = lambda *of: np.asarray(problems.draw("diabetes", *of, 0).train.y)
  clean, data = draw("none", 0.0), draw("gross errors", 0.2)
  wrong = data != clean
  assert abs(wrong.mean() - 0.2) < 0.01
  assert np.median(np.abs(data[wrong])) > 3
  added = np.abs(draw("heavy tails", 0.5) - clean)
  # Median and 99th percentile of |t| with 1.5 degrees: 0.9 and 18.
  assert 0.3 < np.median(added) < 0.6
  assert added.max() > 4


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10n", "satellite", "text"])
def test_missing_data_is_named(name, tmp_path):
  with pytest.raises(Missing, match=r"--folder"):
    problems.check(name, tmp_path)


def test_text_is_read_from_a_library(tmp_path):
  for i, package in enumerate(text.PACKAGES):
    (tmp_path / package / "tests").mkdir(parents=True)
    words = " ".join(f"word{i}x{j} shared{j}" for j in range(20))
    docs = [f'def f{j}():\n  """{words} number {j} of {package}."""' for j in range(15)]
    (tmp_path / package / "one.py").write_text("\n\n".join(docs))
    (tmp_path / package / "tests" / "two.py").write_text("\n\n".join(docs[:1]))
  source = text.load(tmp_path)
  np.testing.assert_array_equal(np.bincount(source.y), [15] * len(text.PACKAGES))
  assert source.classes == len(text.PACKAGES)
  np.testing.assert_allclose(np.linalg.norm(source.x, axis=1), 1, rtol=1e-5)


def _label_file(path: pathlib.Path, content) -> pathlib.Path:
  raw = io.BytesIO()
  pickle.dump(content, raw, protocol=2)
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("archive/data.pkl", raw.getvalue())
  return path


def test_human_labels_follow_the_images(tmp_path):
  rng = np.random.default_rng(0)
  true = rng.integers(0, 10, 400)
  # Each label says which image of its class it is for.
  place = np.zeros(400, int)
  for c in range(10):
    place[true == c] = np.arange((true == c).sum())
  names = dict.fromkeys(cifar10n._NAMES.values(), place)
  labels = cifar10n.read_labels(
    _label_file(tmp_path / "labels.pt", {"clean_label": true, **names})
  )
  classes = np.sort(true)
  base = np.diag(np.linspace(3, 0.1, 300))
  x, test = rng.standard_normal([400, 300]) @ base, rng.standard_normal([50, 300])
  cifar10n.save(tmp_path, (x, classes), (test, np.zeros(50, int)), labels)
  source = cifar10n.load(tmp_path)
  np.testing.assert_array_equal(source.y, classes)
  wanted = np.concatenate([np.arange((true == c).sum()) for c in range(10)])
  for name in cifar10n.NOISES:
    np.testing.assert_array_equal(source.given[name], wanted)
  # Principal components: uncorrelated, in order, the first of variance one.
  covariance = np.cov(source.x.T)
  np.testing.assert_allclose(covariance[0, 0], 1, rtol=1e-4)
  assert (np.diff(np.diag(covariance)) <= 1e-6).all()
  np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4)
  assert source.test is not None
  assert source.test[0].shape == (50, 256)
  with pytest.raises(ValueError, match="sizes of the classes"):
    cifar10n.align(classes[:-1], labels)


def test_label_files_hold_nothing_but_arrays(tmp_path):
  path = _label_file(
    tmp_path / "labels.pt", {"clean_label": pathlib.PurePosixPath("x")}
  )
  with pytest.raises(pickle.UnpicklingError, match="only arrays are"):
    cifar10n.read_labels(path)

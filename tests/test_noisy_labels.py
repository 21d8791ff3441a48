"""The benchmark of wrong labels: its noise, its rivals, and that it resumes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.noisy_labels import data
from benchmarks.noisy_labels import methods
from benchmarks.noisy_labels import models
from benchmarks.noisy_labels import recipe
from benchmarks.noisy_labels import report
from benchmarks.noisy_labels import training
from benchmarks.noisy_labels import work
import optax_ranger as ranger

_NOWHERE = pathlib.Path("nowhere")


@pytest.fixture(autouse=True)
def _as_people_run_it():
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


@pytest.mark.parametrize(
  "noise", data.NOISES, ids=lambda noise: f"{noise[0]} {noise[1]}"
)
def test_labels_are_drawn_by_their_matrix(noise):
  confusion = data.confusion_of(*noise)
  true = np.repeat(np.arange(10), 20_000)
  given = data.corrupt(true, confusion, seed=3)
  counted = np.zeros([10, 10])
  np.add.at(counted, (true, given), 1 / 20_000)
  np.testing.assert_allclose(confusion.sum(axis=1), 1)
  np.testing.assert_allclose(counted, confusion, atol=0.015)
  assert (given == data.corrupt(true, confusion, seed=3)).all()
  assert noise[1] == 0 or (given != data.corrupt(true, confusion, seed=4)).any()


def test_seeds_change_images_and_labels():
  one, other = (data.problem("digits", "symmetric", 0.4, s, _NOWHERE) for s in (0, 1))
  assert not np.array_equal(one.images, other.images)
  share = float((one.labels != one.true_labels).mean())
  assert 0.35 < share < 0.45
  assert one.wrong == pytest.approx(0.4)
  shared = {image.tobytes() for image in np.asarray(one.images)}
  parts = (one.validation_images, one.test_images)
  # Digits has no two images alike.
  assert not any(
    image.tobytes() in shared for part in parts for image in np.asarray(part)
  )


def _logits(n=64):
  logits = jnp.asarray(np.random.default_rng(0).standard_normal([n, 10]), jnp.float32)
  return logits, jnp.arange(n) % 10, jnp.arange(n)


def _losses(name, memory=(), **settings):
  method = methods.RIVALS[name]
  return method.losses(*_logits(), memory, {**method.settings, **settings})


def test_rivals_have_cross_entropy_as_their_limit():
  plain, _ = _losses("cross_entropy")
  kept = 1 - jax.nn.one_hot(_logits()[1], 10) @ jax.nn.softmax(_logits()[0]).T
  gce, _ = _losses("gce", exponent=1e-3)
  sce, _ = _losses("sce", forward=1.0, reverse=0.0)
  smoothed, _ = _losses("label_smoothing", smoothing=0.0)
  elr, _ = _losses("elr", jnp.zeros([64, 10]), strength=0.0)
  np.testing.assert_allclose(gce, plain, rtol=0.01)
  for losses in (sce, smoothed, elr):
    np.testing.assert_allclose(losses, plain, rtol=1e-5)
  mae, _ = _losses("gce", exponent=1.0)
  np.testing.assert_allclose(mae, jnp.diagonal(kept), rtol=1e-5)
  reverse, _ = _losses("sce", forward=0.0, reverse=1.0)
  np.testing.assert_allclose(reverse, 9.21 * mae, rtol=1e-5)


def test_elr_is_cross_entropy_and_the_regularizer():
  logits, labels, ids = _logits()
  start = jnp.full([64, 10], 0.05)
  losses, after = _losses("elr", start, strength=2.0)
  plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  regularizer = ranger.early_learning_regularizer(logits, after[ids])
  np.testing.assert_allclose(losses, plain + 2 * regularizer, rtol=1e-5)
  settings = methods.RIVALS["elr"].settings
  mean = settings["prediction_decay"] * start + (
    1 - settings["prediction_decay"]
  ) * jax.nn.softmax(logits)
  np.testing.assert_allclose(after, mean, atol=1e-3)


def test_co_teaching_learns_what_the_other_finds_easy():
  logits, labels, ids = _logits()
  both = jnp.stack([logits, logits[::-1]])
  losses, _ = methods.RIVALS["co_teaching"].losses(
    both, labels, ids, jnp.float32(0.25), {}
  )
  each = [optax.softmax_cross_entropy_with_integer_labels(one, labels) for one in both]
  for learner, teacher in ((0, 1), (1, 0)):
    kept = np.asarray(losses[learner]) > 0
    assert kept.sum() == 48
    taught = np.asarray(each[teacher])
    assert taught[kept].max() < taught[~kept].min()


def test_ranger_without_anything_is_cross_entropy():
  logits, labels, ids = _logits()
  settings = {**recipe.SETTINGS, "warm_exponent": 0.0, "smoothing": 0.0}
  losses, _ = recipe.losses(logits, labels, ids, recipe.memory(64, settings), settings)
  plain, _ = _losses("cross_entropy")
  np.testing.assert_allclose(losses, plain, rtol=1e-5)


def test_the_filter_selects():
  logits, labels, ids = _logits()
  kept = ids < 16
  logits = logits.at[40].set(jnp.nan)
  losses, _ = methods.RIVALS["deep_knn"].losses(logits, labels, ids, kept, {})
  plain, _ = _losses("cross_entropy")
  np.testing.assert_allclose(losses[:16], 4 * plain[:16], rtol=1e-5)
  assert not losses[16:].any()


def test_the_filter_keeps_right_labels():
  problem = data.problem("digits", "symmetric", 0.4, 0, _NOWHERE)
  model = models.MODELS["mlp"]
  # Features that tell the class, as those of a trained network would.
  table = jnp.asarray(np.eye(10)[problem.true_labels], jnp.float32)
  told = model._replace(features=lambda params, images: table)
  params = {"head": (10 * jnp.eye(10), jnp.zeros(10))}
  keep = training._supported(told, params, problem, 50)
  np.testing.assert_array_equal(keep, problem.labels == problem.true_labels)


def _distance(confusion, problem):
  return abs(confusion - problem.confusion).sum(axis=1).mean()


def test_ranger_trains_and_learns_the_confusion():
  problem = data.problem("digits", "asymmetric", 0.4, 0, _NOWHERE)
  settings = {**recipe.SETTINGS, "warm_up": 9}
  history = training.train(
    recipe.RANGER, models.MODELS["mlp"], problem, settings, 0, 10, pull=True
  )
  print("accuracy", history.last, "distance", _distance(history.confusion, problem))
  assert history.last > 0.75
  assert len(history.wrong_share) == 10
  # Nothing learned, the identity, is 0.4 away.
  assert _distance(history.confusion, problem) < 0.25
  assert history.epoch == 1 + int(np.argmax(history.validation))


def test_pieces_in_the_table_are_not_run_again(tmp_path):
  paths = report.Paths.of(tmp_path, "some")
  results = report.Results.read(paths, fresh=False)
  key = ("mlp", "sce", "symmetric", 0.4, 0)
  assert not results.has(key)
  row = dict(zip(("model", "method", "noise", "rate", "seed"), key, strict=True))
  figures = {"data": "digits", "last": "0.5", "selected": "0.6", "selected_epoch": 2}
  rest = {"tuning_last": "0.5", "tuning_selected": "0.6", "seconds": "1.0"}
  results.add({**row, **figures, **rest}, [], None)
  results.write(paths)
  again = report.Results.read(paths, fresh=False)
  assert again.has(key)
  assert not again.has((*key[:4], 1))
  assert not report.Results.read(paths, fresh=True).has(key)
  assert "| SCE |" in report.tables(again, work.EVERYTHING)


def test_pages_have_the_committed_figures():
  root = pathlib.Path(__file__).parent.parent
  results = report.Results.read(report.Paths.of(root / "docs", "noisy_labels"), False)
  page = (root / "docs" / "noisy_labels.md").read_text()
  assert report.tables(results, work.EVERYTHING) in page
  assert report.verdicts(results, work.EVERYTHING) in page
  assert report.summary(results, work.EVERYTHING) in (root / "README.md").read_text()

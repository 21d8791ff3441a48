"""The benchmark of wrong labels: its noise, its rivals, and that it resumes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.learning.noisy_labels import data
from benchmarks.learning.noisy_labels import methods
from benchmarks.learning.noisy_labels import models
from benchmarks.learning.noisy_labels import recipe
from benchmarks.learning.noisy_labels import report
from benchmarks.learning.noisy_labels import training
from benchmarks.learning.noisy_labels import work
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
  regularizer = ranger.labels.early_learning_regularizer(logits, after[ids])
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


@pytest.mark.parametrize("side", [7, 8])
def test_patches_make_a_convolution(side):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal([3, side, side + 4, 2]), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal([5, 5, 2, 4]), jnp.float32)
  wanted = jax.lax.conv_general_dilated(
    x, kernel, (2, 2), [(2, 2)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  found = models._patches(x) @ kernel.reshape(50, 4)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def _distance(confusion, problem):
  return abs(confusion - problem.confusion).sum(axis=1).mean()


def _view(problem, epoch=5):
  """Features that tell the class, and predictions of labels that were memorized."""
  n = len(problem.labels)
  features = jnp.eye(10)[problem.true_labels]
  features += 0.01 * jax.random.normal(jax.random.key(0), [n, 10])
  tx = ranger.smooth_predictions(n, 10, 0.0)
  memorized = 0.9 * jnp.eye(10)[problem.labels] + 0.01
  told = {"predictions": memorized, "example_ids": jnp.arange(n)}
  _, state = tx.update(jnp.zeros(1), tx.init(jnp.zeros(1)), **told)
  return methods.View(
    epoch,
    jax.random.key(1),
    problem.images,
    problem.labels,
    lambda images: features,
    state,
  )


@pytest.mark.parametrize("noise", data.NOISES[1:4:2], ids=lambda noise: noise[0])
def test_neighbors_tell_exponent_and_weights(monkeypatch, noise):
  # Blocks that do not divide the examples: some are left out, with weight one.
  monkeypatch.setattr(recipe, "_BLOCK", 300)
  problem = data.problem("digits", *noise, 0, _NOWHERE)
  view, before = _view(problem), recipe.memory(1000, recipe.SETTINGS)
  after = recipe.between(view, before, recipe.SETTINGS)
  # The identity is twice as far.
  assert _distance(after["confusion"], problem) < problem.wrong
  spread = ranger.labels.confusion_spread(after["confusion"])
  np.testing.assert_allclose(after["exponent"], 0.4 * spread, rtol=1e-6)
  weights = np.asarray(after["weights"])
  np.testing.assert_allclose(weights.mean(), 1, rtol=1e-4)
  if noise[0] == "asymmetric":
    assert spread < 0.2
    assert weights.std() < 0.1
    return
  assert spread > 0.8
  left_out = weights == 1
  assert left_out.sum() == 100
  wrong = np.asarray(problem.labels != problem.true_labels)
  right, wrong = (weights[part & ~left_out].mean() for part in (~wrong, wrong))
  assert wrong < 0.4 * right


def test_what_ablations_leave_out():
  problem = data.problem("digits", "asymmetric", 0.4, 0, _NOWHERE)
  view, before = _view(problem), recipe.memory(1000, recipe.SETTINGS)
  settings = {**recipe.SETTINGS, "confusion": problem.confusion}
  whole = recipe.between(view, before, settings)
  after = {
    name: recipe.ABLATIONS[name].between(view, before, settings)
    for name in recipe.ABLATIONS
  }
  assert after["no_confusion"] is before
  # A network that has memorized the labels believes them all.
  own = after["own_confusion"]["confusion"]
  np.testing.assert_allclose(own, np.eye(10), atol=0.02)
  np.testing.assert_array_equal(
    after["true_confusion"]["confusion"], problem.confusion.astype(np.float32)
  )
  assert (after["no_weights"]["weights"] == 1).all()
  np.testing.assert_array_equal(after["no_correction"]["confusion"], np.eye(10))
  assert after["no_correction"]["exponent"] == whole["exponent"]
  np.testing.assert_allclose(after["even"]["exponent"], 0.4, rtol=1e-6)
  assert after["even"]["weights"].std() > 0.2 > whole["weights"].std()


def test_ranger_weighs_and_corrects():
  logits, labels, ids = _logits()
  confusion = jnp.asarray(data.confusion_of("asymmetric", 0.4), jnp.float32)
  weights = jnp.arange(64.0)
  memory = {"confusion": confusion, "exponent": jnp.float32(0.3), "weights": weights}
  losses, _ = recipe.losses(logits, labels, ids[::-1], memory, recipe.SETTINGS)
  each = ranger.labels.forward_corrected_loss(
    logits, labels, confusion, exponent=0.3, smoothing=0.05
  )
  np.testing.assert_allclose(losses, np.arange(64)[::-1] * each, rtol=1e-5)


def test_weights_are_posteriors_to_the_spread():
  confusion = jnp.asarray(data.confusion_of("asymmetric", 0.4), jnp.float32)
  # 6 is called 0; what the first of the two may be is believed half and half.
  beliefs = jnp.zeros([2, 10]).at[0, jnp.array([0, 6])].set(0.5).at[1, 0].set(1.0)
  labels, ids = jnp.array([0, 6, 0]), jnp.array([2, 0])
  found = recipe._supported(labels, ids, beliefs, confusion, jnp.float32(0.5))
  right = np.array([1 / 1.4, 1]) ** 0.5
  np.testing.assert_allclose(found[ids], right / right.mean(), rtol=1e-5)
  assert found[1] == 1


def test_neighbors_are_asked_twice():
  problem = data.problem("digits", "symmetric", 0.4, 0, _NOWHERE)
  before = recipe.memory(1000, recipe.SETTINGS)
  asked = [
    epoch
    for epoch in range(30)
    if recipe.between(
      _view(problem)._replace(epoch=epoch),
      before,
      recipe.SETTINGS,
      beliefs_of=lambda view, settings: (jnp.eye(10)[view.labels], jnp.arange(1000)),
    )
    is not before
  ]
  assert asked == [5, 15]


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


def test_epochs_are_chosen_by_noisy_labels_only():
  problem = data.problem("digits", "symmetric", 0.4, 0, _NOWHERE)
  blind = problem._replace(
    true_labels=0 * problem.true_labels,
    test_labels=0 * problem.test_labels,
    confusion=np.eye(10),
    wrong=0.0,
  )
  settings = {**recipe.SETTINGS, "warm_up": 1}
  seen, unseen = (
    training.train(recipe.RANGER, models.MODELS["mlp"], part, settings, 0, 3)
    for part in (problem, blind)
  )
  assert (seen.validation, seen.epoch) == (unseen.validation, unseen.epoch)
  np.testing.assert_array_equal(seen.confusion, unseen.confusion)


def test_last_and_selected_epochs():
  problem = data.problem("digits", "symmetric", 0.4, 0, _NOWHERE)
  plain, model = methods.RIVALS["cross_entropy"], models.MODELS["mlp"]
  got = training.train(plain, model, problem, plain.settings, 0, 12, pull=True)
  assert got.epoch == 12 - int(np.argmax(got.validation[::-1]))
  assert got.selected == got.test[got.epoch - 1]
  assert got.last == got.test[-1] != got.selected
  still = {**plain.settings, "rate": 0.0}
  start = training.train(plain, model, problem, still, 0, 1, pull=True)
  assert start.wrong_share[0] == pytest.approx(0.4, abs=0.1)


def test_tuning_accuracy_is_corrected_for_the_noise():
  problem = data.problem("digits", "asymmetric", 0.4, 0, _NOWHERE)
  true = np.tile(problem.test_labels, 10)
  given = data.corrupt(true, problem.confusion, seed=5)
  problem = problem._replace(
    labels=problem.true_labels,
    tuning_images=jnp.tile(problem.test_images, (10, 1)),
    tuning_labels=jnp.asarray(given, jnp.int32),
  )
  plain = methods.RIVALS["averaged"]
  got = training.train(plain, models.MODELS["mlp"], problem, plain.settings, 0, 4)
  assert got.last > 0.8
  assert got.tuning_last == pytest.approx(got.last, abs=0.03)
  assert (given == true).mean() < 0.85


def test_pieces_in_the_table_are_not_run_again(tmp_path):
  paths = report.Paths.of(tmp_path, "some")
  results = report.Results.read(paths)
  key = ("mlp", "sce", "symmetric", 0.4, 0)
  assert not results.has(key)
  row = dict(zip(("model", "method", "noise", "rate", "seed"), key, strict=True))
  figures = {"data": "digits", "last": "0.5", "selected": "0.6", "selected_epoch": 2}
  rest = {"tuning_last": "0.5", "tuning_selected": "0.6", "seconds": "1.0"}
  results.add({**row, **figures, **rest}, [], None)
  results.write(paths)
  again = report.Results.read(paths)
  assert again.has(key)
  assert not again.has((*key[:4], 1))
  assert "| SCE |" in report.tables(again, work.METHODS)
  assert "| SCE | - | 0.600 | - |" in report.summary(again, work.METHODS)
  again.drop([("mlp", "elr", *key[2:])])
  assert again.has(key)
  again.drop([key])
  assert not again.has(key)


def _row(name, noise, seed, last, selected=0.0):
  key = {"model": "mlp", "method": name, "noise": noise[0], "rate": noise[1]}
  return {**key, "seed": seed, "last": last, "selected": selected, "seconds": 1}


def test_verdicts_and_ablations_pair_seeds():
  results = report.Results([], [], [])
  for noise in data.NOISES[:4]:
    for seed, (ours, sce, elr) in [(11, (0.9, 0.78, 0.1)), (2, (0.8, 0.7, 0.1))]:
      results.add(_row("ranger", noise, seed, ours, 0.1), [], None)
      results.add(_row("sce", noise, seed, 0.1, sce), [], None)
      results.add(_row("elr", noise, seed, elr, 0.6), [], None)
    for seed, last in [(2, 0.78), (11, 0.86)]:
      results.add(_row("ngs", noise, seed, last), [], None)
    results.add(_row("ranger", noise, 3, 0.1), [], None)  # A seed that others lack.
  assert "± 1.0 |" in report.ablations(results, recipe.ABLATIONS)
  assert "| -3.0 ±" in report.ablations(results, recipe.ABLATIONS)
  verdicts = report.verdicts(results, work.METHODS)
  assert verdicts.count("| 0.8500 | 0.7400 | SCE, selected | +0.1100 ± 0.0100 |") == 4
  assert "| SCE | 0.740 | 0.740 | 0.740 | 0.740 | - |" in report.summary(
    results, work.METHODS
  )


def test_pages_have_the_committed_figures():
  root = pathlib.Path(__file__).parents[2]
  results = report.Results.read(report.Paths.of(root / "docs", "noisy_labels"))
  assert {row["model"] for row in results.rows} == {"mlp", "cnn"}
  page = (root / "docs" / "noisy_labels.md").read_text()
  assert report.tables(results, work.METHODS) in page
  assert report.verdicts(results, work.METHODS) in page
  assert report.ablations(results, recipe.ABLATIONS) in page
  assert report.summary(results, work.METHODS) in (root / "README.md").read_text()

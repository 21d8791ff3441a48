"""The rivals and Ranger: losses, filters and what happens between epochs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.learning import _confident
from benchmarks.learning import _method
from benchmarks.learning import _models
from benchmarks.learning import _noise
from benchmarks.learning import _ranger
from benchmarks.learning import _rivals
from benchmarks.learning import other_noise
from benchmarks.learning import problems
from benchmarks.learning import wrong_labels
import optax_ranger as ranger

_SIZES = _method.Sizes(64, 10)
_NOISES = problems.SPECS["sklearn-digits"].noises


def _logits(n=64):
  logits = jnp.asarray(np.random.default_rng(0).standard_normal([n, 10]), jnp.float32)
  return logits, jnp.arange(n) % 10, jnp.arange(n)


def _losses(name, memory=(), **settings):
  method = _rivals.RIVALS[name]
  return method.losses(*_logits(), memory, {**method.settings, **settings})


def _memory(settings=_ranger.SETTINGS, n=64):
  sizes = _method.Sizes(n, 10)
  return _ranger.memory(jnp.zeros([n, 1]), jnp.zeros(n, jnp.int32), sizes, settings)


def test_rivals_have_cross_entropy_as_their_limit():
  plain, _ = _losses("cross_entropy")
  kept = 1 - jax.nn.one_hot(_logits()[1], 10) @ jax.nn.softmax(_logits()[0]).T
  gce, _ = _losses("gce", exponent=1e-3)
  sce, _ = _losses("sce", forward=1.0, reverse=0.0)
  smoothed, _ = _losses("label_smoothing", smoothing=0.0)
  elr, _ = _losses("elr", jnp.zeros([64, 10]), strength=0.0)
  floor, _ = _losses("floor", wrong=0.0)
  np.testing.assert_allclose(gce, plain, rtol=0.01)
  for losses in (sce, smoothed, elr, floor):
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
  beta = _rivals.RIVALS["elr"].settings["prediction_decay"]
  mean = beta * start + (1 - beta) * jax.nn.softmax(logits)
  np.testing.assert_allclose(after, mean, atol=1e-3)


def test_co_teaching_learns_what_the_other_finds_easy():
  logits, labels, ids = _logits()
  both = jnp.stack([logits, logits[::-1]])
  losses, _ = _rivals.co_teaching(both, labels, ids, jnp.float32(0.25), {})
  each = [optax.softmax_cross_entropy_with_integer_labels(one, labels) for one in both]
  for learner, teacher in ((0, 1), (1, 0)):
    kept = np.asarray(losses[learner]) > 0
    assert kept.sum() == 48
    taught = np.asarray(each[teacher])
    assert taught[kept].max() < taught[~kept].min()


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_no_classifier_is_better_than_the_floor(spread):
  classes, wrong, n = 10, 0.4, 20_000
  kind = "symmetric" if spread else "asymmetric"
  truth = _noise.confusion_of(kind, wrong, classes)
  true = np.repeat(np.arange(classes), n // classes)
  labels = _noise.corrupt(np.random.default_rng(0), true, truth)
  # The entropy of the labels given the class, counted.
  counted = -np.log(truth[true, labels]).mean()
  settings = {"wrong": jnp.float32(wrong), "spread": jnp.float32(spread)}

  def mean(logits):
    losses, _ = _rivals.floored(logits, jnp.asarray(labels), None, (), settings)
    return losses.mean()

  bad = jnp.zeros([n, classes])
  assert float(mean(bad)) == pytest.approx(np.log(10), rel=1e-3)  # above the floor
  memorized = 20 * jax.nn.one_hot(labels, classes)
  entropy = -(wrong * np.log(wrong) + (1 - wrong) * np.log(1 - wrong))
  floor = entropy + spread * wrong * np.log(classes - 1)
  assert floor == pytest.approx(counted, rel=0.02)
  below = -np.log(1 - wrong)  # forward-corrected, and every label believed
  assert float(mean(memorized)) == pytest.approx(2 * floor - below, rel=1e-3)
  # Below the floor the loss is climbed, above it descended.
  toward = lambda at: float((jax.grad(mean)(at) * jax.nn.one_hot(labels, 10)).sum())
  assert toward(bad) < 0 < toward(6 * jax.nn.one_hot(labels, 10))


def test_events_are_counted_and_weigh():
  logits, labels, ids = _logits()
  memory = _rivals.no_events(jnp.zeros([64, 1]), labels, _SIZES, {})
  losses, after = _rivals.count_events(logits, labels, ids[::-1], memory, {})
  plain, _ = _losses("cross_entropy")
  np.testing.assert_allclose(losses, plain, rtol=1e-5)
  wrong = np.asarray(logits.argmax(axis=1) != labels)
  np.testing.assert_array_equal(after["events"][::-1], wrong)
  none = {**after, "right": jnp.zeros(256)}
  losses, after = _rivals.count_events(logits, labels, ids[::-1], none, {})
  chances = np.asarray(jax.nn.softmax(logits), float)
  entropy = -(chances * np.log(chances)).sum(axis=1)
  np.testing.assert_allclose(losses, entropy, rtol=1e-3)
  np.testing.assert_array_equal(after["events"][::-1], 2 * wrong)


def test_the_mixture_separates_few_events_from_many():
  rng = np.random.default_rng(0)
  few, many = rng.binomial(10, 0.1, 3000), rng.binomial(10, 0.9, 1000)
  start = np.array([[1.0, 2.0, 0.5], [2.0, 1.0, 0.5]])
  events = np.concatenate([few, many]).astype(float)
  mixture, right = _rivals.fit_mixture(events, start, 20, 11)
  assert mixture[0, 2] == pytest.approx(0.75, abs=0.03)
  assert right[:3].min() > 0.95
  assert right[8:].max() < 0.05


def test_the_filter_selects():
  logits, labels, ids = _logits()
  kept = ids < 16
  logits = logits.at[40].set(jnp.nan)
  losses, _ = _rivals.chosen_losses(logits, labels, ids, kept, {})
  plain, _ = _losses("cross_entropy")
  np.testing.assert_allclose(losses[:16], 4 * plain[:16], rtol=1e-5)
  assert not losses[16:].any()


def _telling(problem, seed=0):
  """A first training that tells the class, as a good network would."""

  def fit(part, **kwargs):
    del kwargs
    table = {
      row.tobytes(): 10.0 * np.eye(10)[label]
      for row, label in zip(np.asarray(problem.train.x), problem.true, strict=True)
    }
    return lambda x: jnp.asarray([table[row.tobytes()] for row in np.asarray(x)])

  fit.seed = seed
  return fit


@pytest.mark.parametrize("name", ["deep_knn", "cleanlab"])
def test_filters_keep_right_labels(name):
  problem = problems.draw("sklearn-digits", "symmetric", 0.4, 0)
  method = _rivals.RIVALS[name]
  keep = method.choose(problem, _telling(problem), method.settings)
  np.testing.assert_array_equal(keep, problem.train.y == problem.true)


def _chances(n=2000, classes=5):
  rng = np.random.default_rng(1)
  true = rng.integers(0, classes, n)
  confusion = _noise.confusion_of("asymmetric", 0.3, classes)
  labels = _noise.corrupt(rng, true, confusion)
  logits = 3 * np.eye(classes)[true] + rng.standard_normal([n, classes])
  chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  return labels, true, chances


def test_the_joint_is_that_of_the_equations():
  labels, true, chances = _chances()
  found, counts = _confident.confident_joint(labels, chances), np.zeros([5, 5])
  thresholds = [chances[labels == c, c].mean() for c in range(5)]
  for i, label in enumerate(labels):
    reached = [c for c in range(5) if chances[i, c] >= thresholds[c] - 1e-6]
    if reached:
      best = max(reached, key=lambda c: chances[i, c]) if len(reached) == 1 else None
      counts[label, chances[i].argmax() if best is None else best] += 1
  counts *= (np.bincount(labels) / counts.sum(axis=1))[:, None]
  np.testing.assert_allclose(found, counts)
  wanted = np.zeros([5, 5])
  np.add.at(wanted, (labels, true), 1)
  assert abs(found - wanted).sum() / len(labels) < 0.15


def test_pruning_finds_wrong_labels():
  labels, true, chances = _chances()
  marked = _confident.prune_by_noise_rate(labels, chances)
  wrong = labels != true
  assert wrong[marked].mean() > 0.9
  assert marked[wrong].mean() > 0.8


def test_pruning_is_that_of_cleanlab():
  filters = pytest.importorskip("cleanlab.filter")
  labels, _, chances = _chances()
  theirs = filters.find_label_issues(
    labels, chances, filter_by="prune_by_noise_rate", n_jobs=1
  )
  ours = _confident.prune_by_noise_rate(labels, chances)
  assert (ours == theirs).mean() > 0.995  # they round row by row


@pytest.mark.parametrize("side", [7, 8])
def test_patches_make_a_convolution(side):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal([3, side, side + 4, 2]), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal([5, 5, 2, 4]), jnp.float32)
  wanted = jax.lax.conv_general_dilated(
    x, kernel, (2, 2), [(2, 2)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  found = _models.patches(x) @ kernel.reshape(50, 4)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", _models.MODELS)
def test_the_head_sees_the_features(name):
  network = _models.Network(name, 64, 7)
  params, other = network.init(0), network.init(1)
  x = jnp.asarray(np.random.default_rng(0).random([5, 64]), jnp.float32)
  head = params["head"]
  features = network.features(params, x)
  wanted = features @ head["kernel"][...] + head["bias"][...]
  np.testing.assert_allclose(network.logits(params, x), wanted, rtol=1e-5)
  assert wanted.shape == (5, 7)
  assert not np.allclose(wanted, network.logits(other, x))


def _distance(confusion, problem):
  return abs(confusion - problem.confusion).sum(axis=1).mean()


def _view(problem, epoch=5):
  """Features that tell the class, and predictions of labels that were memorized."""
  n = len(problem.train.y)
  features = jnp.eye(10)[problem.true]
  features += 0.01 * jax.random.normal(jax.random.key(0), [n, 10])
  tx = ranger.smooth_predictions(n, 10, 0.0)
  memorized = 0.9 * jnp.eye(10)[problem.train.y] + 0.01
  told = {"predictions": memorized, "example_ids": jnp.arange(n)}
  _, state = tx.update(jnp.zeros(1), tx.init(jnp.zeros(1)), **told)
  key = jax.random.key(1)
  same = lambda: features
  return _method.View(epoch, 30, key, *problem.train, same, same, state)


@pytest.mark.parametrize("noise", _NOISES[1:4:2], ids=lambda noise: noise[0])
def test_neighbors_tell_exponent_and_weights(monkeypatch, noise):
  # Blocks that do not divide the examples: some are left out, with weight one.
  monkeypatch.setattr(_ranger, "_BLOCK", 300)
  problem = problems.draw("sklearn-digits", *noise, 0)
  after = _ranger.between(_view(problem), _memory(n=1000), _ranger.SETTINGS)
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
  wrong = np.asarray(problem.train.y != problem.true)
  right, wrong = (weights[part & ~left_out].mean() for part in (~wrong, wrong))
  assert wrong < 0.4 * right


def test_what_ablations_leave_out():
  problem = problems.draw("sklearn-digits", "asymmetric", 0.4, 0)
  view, before = _view(problem), _memory(n=1000)
  settings = {**_ranger.SETTINGS, "confusion": problem.confusion}
  whole = _ranger.between(view, before, settings)
  after = {
    name: method.between(view, before, settings)
    for name, method in _ranger.ABLATIONS.items()
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
  assert after["even"]["weights"].std() > 0.15 > whole["weights"].std()


def test_ranger_weighs_and_corrects():
  logits, labels, ids = _logits()
  confusion = jnp.asarray(_noise.confusion_of("asymmetric", 0.4, 10), jnp.float32)
  weights = jnp.arange(64.0)
  memory = {"confusion": confusion, "exponent": jnp.float32(0.3), "weights": weights}
  losses, _ = _ranger.losses(logits, labels, ids[::-1], memory, _ranger.SETTINGS)
  each = ranger.labels.forward_corrected_loss(
    logits, labels, confusion, exponent=0.3, smoothing=0.05
  )
  np.testing.assert_allclose(losses, np.arange(64)[::-1] * each, rtol=1e-5)
  settings = {**_ranger.SETTINGS, "warm_exponent": 0.0, "smoothing": 0.0}
  losses, _ = _ranger.losses(logits, labels, ids, _memory(settings), settings)
  np.testing.assert_allclose(losses, _losses("cross_entropy")[0], rtol=1e-5)


def test_weights_are_posteriors_to_the_spread():
  to = problems.images.MISTAKEN_FOR
  confusion = jnp.asarray(_noise.confusion_of("asymmetric", 0.4, 10, to), jnp.float32)
  # 6 is called 0; what the first of the two may be is believed half and half.
  beliefs = jnp.zeros([2, 10]).at[0, jnp.array([0, 6])].set(0.5).at[1, 0].set(1.0)
  labels, ids = jnp.array([0, 6, 0]), jnp.array([2, 0])
  found = _ranger.supported(labels, ids, beliefs, confusion, jnp.float32(0.5))
  right = np.array([1 / 1.4, 1]) ** 0.5
  np.testing.assert_allclose(found[ids], right / right.mean(), rtol=1e-5)
  assert found[1] == 1


def test_neighbors_are_asked_twice():
  problem = problems.draw("sklearn-digits", "symmetric", 0.4, 0)
  view, before = _view(problem), _memory(n=1000)
  believe = lambda view, settings: (jnp.eye(10)[view.labels], jnp.arange(1000))
  asked = [
    epoch
    for epoch in range(30)
    if _ranger.between(
      view._replace(epoch=epoch), before, _ranger.SETTINGS, beliefs_of=believe
    )
    is not before
  ]
  assert asked == [5, 15]


def test_targets_far_from_their_neighbors_are_dropped():
  problem = problems.draw("diabetes", "gross errors", 0.2, 0)
  keep = other_noise.choose_by_targets(problem, None, {"deviations": 5.0})
  wrong = np.abs(np.asarray(problem.train.y - problem.true)) > 5
  assert not np.asarray(keep)[wrong].any()
  assert np.asarray(keep)[~wrong].mean() > 0.8


def test_neighbors_back_right_labels_and_targets():
  problem = problems.draw("wine", "boundary labels", 0.2, 0)
  sizes = _method.Sizes(len(problem.train.y), 3)
  settings = {"k": 10.0, "gaussian": 1.0}
  weights = other_noise.backed(*problem.train, sizes, settings)["weights"]
  wrong = np.asarray(problem.train.y != problem.true)
  assert np.asarray(weights)[wrong].mean() < 0.8 * np.asarray(weights)[~wrong].mean()
  problem = problems.draw("friedman1", "gross errors", 0.2, 0)
  sizes = _method.Sizes(len(problem.train.y), 0)
  found = other_noise.backed(*problem.train, sizes, {"target_scale": 2.0})
  wrong = np.abs(np.asarray(problem.train.y - problem.true)) > 5
  weights = np.asarray(found["weights"])
  assert weights[wrong].mean() < 0.3 * weights[~wrong].mean()


def test_rivals_have_as_many_trials_and_settings_of_the_same_names():
  for name, method in wrong_labels.METHODS.items():
    if name not in ("cross_entropy", "ranger"):
      assert len(method.trials) == 6, name
    for trial in method.trials:
      assert set(trial) <= set(method.settings), name
  for name, method in other_noise.METHODS.items():
    assert len(method.trials) == 3, name
    assert len({frozenset(trial) for trial in method.trials}) == 1, name


def test_settings_are_spelled_and_read():
  settings = {"rate": 0.05, "decay": 1e-3, "k": 20.0}
  assert _method.read(_method.spelled(settings)) == settings
  assert _method.read("") == {}

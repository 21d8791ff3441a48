"""The rivals and Ranger: losses, filters and what happens between epochs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

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
  logits = np.random.default_rng(0).standard_normal([n, 10]).astype(np.float32)
  ids = np.arange(n, dtype=np.int32)
  return logits, ids % 10, ids


def _losses(name, memory=(), **settings):
  method = _rivals.RIVALS[name]
  settings = {**method.settings, **settings}
  of = jax.jit(lambda memory, *given: method.losses(*given, memory, settings))
  return jax.device_get(of(memory, *_logits()))


def _cross_entropy(logits, labels):
  right = np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  return special.logsumexp(logits.astype(float), axis=-1) - right


def _memory(problem, settings=_ranger.SETTINGS):
  sizes = _method.Sizes(len(problem.train.y), problem.classes)
  return _ranger.memory(*problem.train, sizes, settings)


@pytest.mark.slow
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
  start = np.full([64, 10], 0.05, np.float32)
  losses, after = _losses("elr", start, strength=2.0)
  plain = _cross_entropy(logits, labels)
  regularizer = jax.jit(ranger.labels.early_learning_regularizer)(logits, after[ids])
  np.testing.assert_allclose(losses, plain + 2 * regularizer, rtol=1e-5)
  beta = _rivals.RIVALS["elr"].settings["prediction_decay"]
  mean = beta * start + (1 - beta) * special.softmax(logits, axis=1)
  np.testing.assert_allclose(after, mean, atol=1e-3)


def test_co_teaching_learns_what_the_other_finds_easy():
  logits, labels, ids = _logits()
  both = np.stack([logits, logits[::-1]])
  losses = jax.jit(lambda *given: _rivals.co_teaching(*given, {})[0])
  losses = np.asarray(losses(both, labels, ids, np.float32(0.25)))
  each = [_cross_entropy(one, labels) for one in both]
  for learner, teacher in ((0, 1), (1, 0)):
    kept = losses[learner] > 0
    assert kept.sum() == 48
    taught = each[teacher]
    assert taught[kept].max() < taught[~kept].min()


@pytest.mark.slow
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
  count = jax.jit(lambda m: _rivals.count_events(logits, labels, ids[::-1], m, {}))
  memory = _rivals.no_events(np.zeros([64, 1], np.float32), labels, _SIZES, {})
  losses, after = jax.device_get(count(memory))
  plain, _ = _losses("cross_entropy")
  np.testing.assert_allclose(losses, plain, rtol=1e-5)
  wrong = logits.argmax(axis=1) != labels
  np.testing.assert_array_equal(after["events"][::-1], wrong)
  none = {**after, "right": np.zeros(256, np.float32)}
  losses, after = jax.device_get(count(none))
  chances = np.exp(logits.astype(float))
  chances /= chances.sum(axis=1, keepdims=True)
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
  logits[40] = np.nan
  losses = jax.jit(lambda *given: _rivals.chosen_losses(*given, {})[0])
  losses = np.asarray(losses(logits, labels, ids, kept))
  plain, _ = _losses("cross_entropy")
  np.testing.assert_allclose(losses[:16], 4 * plain[:16], rtol=1e-5)
  assert not losses[16:].any()


def _telling(problem, seed=0):
  """A first training that tells the class, as a good network would."""

  def fit(part, **kwargs):
    del kwargs
    rows, labels = map(np.asarray, (problem.train.x, problem.true))
    table = {
      row.tobytes(): 10.0 * np.eye(10)[label]
      for row, label in zip(rows, labels, strict=True)
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
  x = rng.standard_normal([3, side, side + 4, 2]).astype(np.float32)
  kernel = rng.standard_normal([5, 5, 2, 4]).astype(np.float32)
  wanted = jax.lax.conv_general_dilated(
    x, kernel, (2, 2), [(2, 2)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  found = np.asarray(jax.jit(_models.patches)(x)) @ kernel.reshape(50, 4)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", _models.MODELS)
def test_the_head_sees_the_features(name):
  network = _models.Network(name, 64, 7)
  params, other = network.init(0), network.init(1)
  x = np.random.default_rng(0).random([5, 64]).astype(np.float32)
  head = jax.device_get(params["head"])
  features, logits = jax.jit(network.features), jax.jit(network.logits)
  wanted = np.asarray(features(params, x)) @ head["kernel"][...] + head["bias"][...]
  np.testing.assert_allclose(logits(params, x), wanted, rtol=1e-5)
  assert wanted.shape == (5, 7)
  assert not np.allclose(wanted, logits(other, x))


def _distance(confusion, problem):
  return abs(confusion - problem.confusion).sum(axis=1).mean()


def _digits(noise="symmetric", rate=0.4):
  return problems.draw("sklearn-digits", noise, rate, 0)


def _view(problem, epoch=10, epochs=30, classes=None):
  """Features that tell the class, or another column of labels."""
  told = problem.true if classes is None else classes
  features = jnp.eye(10)[told]
  features += 0.01 * jax.random.normal(jax.random.key(0), features.shape)
  key, same = jax.random.key(1), lambda: features
  return _method.View(epoch, epochs, key, *problem.train, same, same, ())


def _same(one, other):
  for name, field in one._asdict().items():
    np.testing.assert_array_equal(field, getattr(other, name), err_msg=name)


_OTHER = {"exponent": 0.2, "smoothing": 0.1, "belief": 0.4, "sharpness": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{}, _OTHER], ids=["defaults", "others"])
def test_ranger_is_the_public_recipe(changed):
  problem, settings = _digits(), {**_ranger.SETTINGS, **changed}
  robust = ranger.robust_labels(10, **changed)
  x, labels = problem.train
  known, memory = robust.init(x, labels), _memory(problem, settings)
  _same(memory, known)
  _same(
    _ranger.ask(_view(problem), memory, settings),
    robust.ask(known, _view(problem).features(), labels),
  )
  ids = jnp.asarray(np.random.default_rng(1).permutation(1000)[:64])
  batch = 3 * _logits()[0], labels[ids], ids
  losses, after = _ranger.losses(*batch, memory, settings)
  np.testing.assert_array_equal(losses, robust.losses(known, *batch))
  assert after is memory
  # As the studies run it: compiled, with settings that are traced.
  traced = jax.tree.map(jnp.float32, settings)
  compiled, _ = jax.jit(_ranger.losses)(*batch, memory, traced)
  np.testing.assert_allclose(compiled, losses, rtol=1e-4, atol=1e-5)


def _known(n=64, **fields):
  """Trust in every label, until fields say otherwise; noise enough to do anything."""
  labels = jnp.arange(n) % 10
  known = ranger.robust_labels(10).init(jnp.eye(10)[labels], labels)
  whole = {"confusion": jnp.eye(10), "weights": jnp.ones(n), "spread": jnp.float32(1)}
  whole["noise"] = jnp.float32(0.2)
  return known._replace(**{**whole, **fields})


@pytest.mark.slow
def test_ranger_weighs_corrects_and_pulls_to_beliefs():
  logits, labels, ids = _logits()
  confusion = jnp.asarray(_noise.confusion_of("asymmetric", 0.4, 10), jnp.float32)
  beliefs = jax.nn.softmax(jax.random.normal(jax.random.key(0), [64, 10]))
  memory = _known(
    confusion=confusion,
    weights=jnp.arange(64.0),
    beliefs=beliefs,
    spread=jnp.float32(0.5),
  )
  losses, _ = _ranger.losses(logits, labels, ids[::-1], memory, _ranger.SETTINGS)
  each = ranger.labels.forward_corrected_loss(
    logits, labels, confusion, exponent=0.225, smoothing=0.2
  )
  pull = 0.15 * optax.softmax_cross_entropy(logits, beliefs[::-1])
  np.testing.assert_allclose(losses, np.arange(64)[::-1] * each + pull, rtol=1e-5)
  nothing = dict.fromkeys(("exponent", "smoothing", "belief"), 0.0)
  settings = {**_ranger.SETTINGS, **nothing}
  losses, _ = _ranger.losses(logits, labels, ids, _known(), settings)
  np.testing.assert_allclose(losses, _losses("cross_entropy")[0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("noise", _NOISES[1:4:2], ids=lambda noise: noise[0])
def test_asking_tells_confusion_and_weights(noise):
  problem = _digits(*noise)
  before = _memory(problem)
  after = _ranger.ask(_view(problem), before, _ranger.SETTINGS)
  assert (int(after.asked), int(after.believed)) == (1, 1)
  assert _distance(after.confusion, problem) < _distance(before.confusion, problem)
  # The identity is twice as far as wrong labels are many.
  assert _distance(after.confusion, problem) < 0.5 * problem.wrong
  weights = np.asarray(after.weights)
  np.testing.assert_allclose(weights.mean(), 1, rtol=1e-4)
  if noise[0] == "asymmetric":
    assert after.spread < 0.2
    assert weights.std() < 0.2
    return
  assert after.spread > 0.8
  wrong = np.asarray(problem.train.y != problem.true)
  assert weights[wrong].mean() < 0.2 * weights[~wrong].mean()


@pytest.mark.slow
def test_memorized_features_change_nothing():
  problem = _digits()
  before = _memory(problem)
  view = _view(problem, classes=problem.train.y)
  after = _ranger.ask(view, before, _ranger.SETTINGS)
  assert (int(after.asked), int(after.believed)) == (1, 0)
  assert after.learned_noise < 0.6 * before.noise
  told = {"asked": before.asked, "learned_noise": before.learned_noise}
  _same(after._replace(**told), before)


@pytest.mark.few(1)
@pytest.mark.slow
@pytest.mark.parametrize(
  ("asks", "epochs", "when"),
  [
    (5, 1, []), (5, 3, [1, 2]), (5, 30, [5, 10, 15, 20, 25]), (1, 30, [15]), (0, 30, [])
  ],
)  # fmt: skip
def test_ranger_asks_evenly_over_the_epochs(monkeypatch, asks, epochs, when):
  problem, looked, asked = _digits(), [], []
  before = _known(1000)
  recipe = lambda settings, classes: ranger.robust_labels(classes)._replace(
    ask=lambda known, features, labels: asked.append((features, labels)) or "asked"
  )
  monkeypatch.setattr(_ranger, "recipe", recipe)
  given = _view(problem)
  for epoch in range(epochs):
    features = lambda epoch=epoch: looked.append(epoch) or given.features()
    view = given._replace(epoch=epoch, epochs=epochs, features=features)
    settings = {**_ranger.SETTINGS, "asks": float(asks)}
    after = _ranger.ask(view, before, settings)
    assert after == "asked" if epoch in when else after is before
  assert looked == when
  for features, labels in asked:
    np.testing.assert_array_equal(features, given.features())
    np.testing.assert_array_equal(labels, problem.train.y)
  assert len(asked) == len(when)


@pytest.mark.slow
def test_features_that_are_the_inputs_hold_back_less():
  problem = _digits()
  before, view = _memory(problem), _view(problem)
  n, width = problem.train.x.shape
  same = view._replace(features=lambda: 1 * problem.train.x)
  after = _ranger.ask(same, before, _ranger.SETTINGS)
  assert float(after.capacity) == pytest.approx(2 * width / n)
  # Learned features may be as many as the inputs.
  learned = jnp.pad(view.features(), ((0, 0), (0, width - 10)))
  after = _ranger.ask(view._replace(features=lambda: learned), before, _ranger.SETTINGS)
  assert float(after.capacity) == 1


@pytest.mark.slow
def test_ablations_change_the_memory_as_they_say():
  problem = _digits()
  start = _memory(problem)
  for name, method in _ranger.ABLATIONS.items():
    if name in ("alone_accumulate", "alone_ngs", "alone_ema"):
      assert method.memory(*problem.train, _SIZES, method.settings) == ()
      assert method.between(_view(problem), (), method.settings) == ()
      continue
    assert method.memory is _ranger.memory
    assert method.between is _ranger.ask
    usual, found = _ranger.SETTINGS, method.settings
    same = [key for key in ("sharpness", "asks") if found[key] == usual[key]]
    left = {"no_weights": ["asks"]}
    left |= {key: ["sharpness"] for key in ("no_ask", "ask_once")}
    assert same == left.get(name, ["sharpness", "asks"]), name
  # Weights are one from the start, and after asking.
  settings = _ranger.ABLATIONS["no_weights"].settings
  even = _memory(problem, settings)
  assert start.weights.std() > 0.15
  _same(even._replace(weights=start.weights), start)
  for known in (even, _ranger.ask(_view(problem), even, settings)):
    np.testing.assert_array_equal(known.weights, np.ones(1000))


@pytest.mark.slow
def test_ablations_of_the_matrix_change_nothing_else():
  problem = _digits()
  known, ids = _memory(problem), jnp.arange(20)
  logits = jnp.asarray(np.random.default_rng(0).normal(size=[20, 10]), jnp.float32)
  settings = {**_ranger.SETTINGS, "confusion": problem.confusion}
  matrices = {"no_correction": np.eye(10), "true_confusion": problem.confusion}
  for name, matrix in matrices.items():
    losses = _ranger.ABLATIONS[name].losses
    found, after = losses(logits, problem.train.y[:20], ids, known, settings)
    _same(after, known)
    own = known._replace(confusion=jnp.asarray(matrix, jnp.float32))
    expected = _ranger.losses(logits, problem.train.y[:20], ids, own, settings)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    usual = _ranger.losses(logits, problem.train.y[:20], ids, known, settings)[0]
    assert float(jnp.abs(found - usual).max()) > 1e-3


@pytest.mark.slow
def test_without_asking_it_is_never_asked():
  method, before = _ranger.ABLATIONS["no_ask"], _known(1000)
  view = _view(_digits())
  for epochs in (1, 2, 8, 30):
    for epoch in range(epochs):
      now = view._replace(epoch=epoch, epochs=epochs)
      assert method.between(now, before, method.settings) is before


@pytest.mark.slow
def test_ablations_change_the_losses_as_they_say():
  batch = _logits()
  beliefs = jax.nn.softmax(jax.random.normal(jax.random.key(0), [64, 10]))
  known = _known(beliefs=beliefs)
  of = lambda method: np.asarray(method.losses(*batch, known, method.settings)[0])
  whole = of(_ranger.RANGER)
  left_out = {"no_beliefs": "belief", "no_exponent": "exponent"}
  left_out["no_smoothing"] = "smoothing"
  for name, method in _ranger.ABLATIONS.items():
    if name in ("no_correction", "true_confusion"):
      continue  # a test of their own
    found = of(method)
    if name in left_out:
      without = ranger.robust_labels(10, **{left_out[name]: 0.0})
      np.testing.assert_array_equal(found, without.losses(known, *batch))
      assert abs(found - whole).max() > 0.01, name
    elif name in ("alone_accumulate", "alone_ngs", "alone_ema"):
      np.testing.assert_allclose(found, _losses("cross_entropy")[0], rtol=1e-5)
    else:
      np.testing.assert_array_equal(found, whole, err_msg=name)


def _walk(method, gradients, start):
  """Parameters after each step, and their average."""
  tx = optax.with_extra_args_support(method.optimizer(method.settings, _SIZES))
  params = jnp.full(3, start)
  state, path = tx.init(params), [params]
  for gradient in gradients:
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    path.append(params)
  return np.asarray(path), np.asarray(ranger.eval_params(state, params))


@pytest.mark.slow
def test_ablations_change_the_optimizer_as_they_say():
  usual = {"decays", "averages"}
  wanted = dict.fromkeys(_ranger.ABLATIONS, usual) | {
    "no_ema": {"decays"},
    "no_decay": {"averages"},
    "ngs": {*usual, "starts small"},
    "accumulated": {*usual, "waits"},
    "alone_neighbors": set(),
    "alone_accumulate": {"waits"},
    "alone_ngs": {"starts small"},
    "alone_ema": {"averages"},
  }
  for name, method in {**_ranger.ABLATIONS, "ranger": _ranger.RANGER}.items():
    gradients = jnp.asarray(np.random.default_rng(0).random([4, 3]), jnp.float32)
    path, mean = _walk(method, gradients, 0.0)
    still, _ = _walk(method, 0 * gradients, 1.0)
    found = {
      "decays": (still[-1] < 1).all(),
      "averages": not np.allclose(mean, path[-1]),
      "starts small": abs(path[2]).max() < 0.01 * method.settings["rate"],
      "waits": (path[1] == path[0]).all() and (path[3] == path[2]).all(),
    }
    assert (path[2] < 0).all(), name
    told = {what for what, is_so in found.items() if is_so}
    assert told == wanted.get(name, usual), name


def test_targets_far_from_their_neighbors_are_dropped():
  problem = problems.draw("diabetes", "gross errors", 0.2, 0)
  keep = other_noise.choose_by_targets(problem, None, {"deviations": 5.0})
  wrong = np.abs(np.asarray(problem.train.y - problem.true)) > 5
  assert not np.asarray(keep)[wrong].any()
  assert np.asarray(keep)[~wrong].mean() > 0.8


@pytest.mark.slow
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


@pytest.mark.slow
def test_robust_regression_weighs_and_rescales():
  problem = problems.draw("friedman1", "gross errors", 0.2, 0)
  (x, y), sizes = problem.train, _method.Sizes(len(problem.train.y), 0)
  settings = {"sharpness": 1.0, "slope": 0.5}
  memory = other_noise.scaled(x, y, sizes, settings)
  wrong = np.abs(np.asarray(y - problem.true)) > 5
  weights = np.asarray(memory["weights"])
  assert weights[wrong].mean() < 0.3 * weights[~wrong].mean()
  np.testing.assert_allclose(weights.mean(), 1, rtol=1e-5)
  even = other_noise.scaled(x, y, sizes, {**settings, "sharpness": 0.0})
  np.testing.assert_array_equal(even["weights"], np.ones(len(y)))
  ids = jnp.arange(20)
  losses, after = other_noise.regressed(
    jnp.zeros([20, 1]), y[:20], ids, memory, settings
  )
  plain = ranger.labels.robust_regression_loss(
    jnp.zeros(20), y[:20], memory["scale"], slope=0.5
  )
  np.testing.assert_allclose(losses, weights[:20] * plain, rtol=1e-6)
  assert after is memory

  def view(epoch, residuals):
    logits = lambda: (y + residuals)[:, None]
    return _method.View(epoch, 40, jax.random.key(0), x, y, logits, logits, ())

  noise = 0.3 * jax.random.normal(jax.random.key(1), y.shape)
  assert other_noise.scale_again(view(0, noise), memory, settings) is memory
  found = other_noise.scale_again(view(1, noise), memory, settings)
  np.testing.assert_allclose(found["scale"], 0.3, rtol=0.1)
  least = other_noise.scale_again(view(1, 0 * noise), memory, settings)
  np.testing.assert_allclose(least["scale"], 1e-3 * memory["scale"], rtol=1e-6)


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

"""The training loop: what it may see, and what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.learning import _method
from benchmarks.learning import _models
from benchmarks.learning import _noise
from benchmarks.learning import _ranger
from benchmarks.learning import _rivals
from benchmarks.learning import _training
from benchmarks.learning import other_noise
from benchmarks.learning import problems
import optax_ranger as ranger

_PLAIN = _rivals.RIVALS["cross_entropy"]


def _digits(noise="symmetric", rate=0.4):
  return problems.draw("sklearn-digits", noise, rate, 0)


def _train(method, problem, epochs, *, model="small", pull=False, **settings):
  settings = {**method.settings, **settings}
  return _training.train(method, model, problem, settings, 0, epochs, pull)


@pytest.mark.slow
def test_ranger_trains_and_learns_the_confusion():
  problem = _digits("asymmetric")
  history = _training.train(
    _ranger.RANGER, "mlp", problem, _ranger.SETTINGS, 0, 10, True
  )
  assert history.last > 0.75
  assert len(history.wrong_share) == 10
  # Nothing learned, the identity, is 0.8 away.
  assert abs(history.confusion - problem.confusion).sum(axis=1).mean() < 0.25


# The features of "small" are as many as the pixels of digits.
@pytest.mark.few(1)
@pytest.mark.parametrize("model", ["linear", "mlp", "small"])
def test_ranger_asks_the_features_of_the_last_layer(model):
  asked, capacities = [], []

  def between(view, memory, settings):
    after = _ranger.ask(view, memory, settings)
    asked.append((int(memory.asked), int(after.asked)))
    capacities.append(float(after.capacity))
    return after

  method = _ranger.RANGER._replace(between=between)
  settings = {**_ranger.SETTINGS, "asks": 1.0}
  problem = _digits()
  _training.train(method, model, problem, settings, 0, 4)
  assert asked == [(0, 0), (0, 0), (0, 1), (1, 1)]
  n, width = problem.train.x.shape
  after = 2 * width / n if model == "linear" else 1
  np.testing.assert_allclose(capacities, [1, 1, after, after])


@pytest.mark.slow
def test_epochs_are_chosen_by_noisy_labels_only():
  problem = _digits()
  blind = problem._replace(
    true=0 * problem.true,
    test=problem.test._replace(y=0 * problem.test.y),
    confusion=np.eye(10),
    wrong=0.0,
  )
  seen, unseen = (_train(_ranger.RANGER, x, 3) for x in (problem, blind))
  assert (seen.validation, seen.epoch) == (unseen.validation, unseen.epoch)
  np.testing.assert_array_equal(seen.confusion, unseen.confusion)


def test_last_and_selected_epochs():
  got = _train(_PLAIN, _digits(), 12, pull=True)
  assert got.epoch == 12 - int(np.argmax(got.validation[::-1]))
  assert got.selected == got.test[got.epoch - 1]
  assert got.last == got.test[-1] != got.selected
  # Without tuning examples, settings are judged by validation.
  assert got.tuning_last == got.validation[-1]
  assert got.tuning_selected == max(got.validation)
  start = _train(_PLAIN, _digits(), 1, pull=True, rate=0.0)
  assert start.wrong_share[0] == pytest.approx(0.4, abs=0.1)


def test_tuning_accuracy_is_corrected_for_the_noise():
  problem = _digits("asymmetric")
  true = np.tile(problem.test.y, 10)
  given = _noise.corrupt(np.random.default_rng(5), true, problem.confusion)
  tuning = problems.Rows(jnp.tile(problem.test.x, (10, 1)), jnp.asarray(given))
  problem = problem._replace(
    train=problem.train._replace(y=problem.true), tuning=tuning
  )
  got = _train(_rivals.RIVALS["averaged"], problem, 4)
  assert got.last > 0.8
  assert got.tuning_last == pytest.approx(got.last, abs=0.03)
  assert (given == true).mean() < 0.85
  # Noise that depends on more than the class is not corrected for.
  raw = _train(_rivals.RIVALS["averaged"], problem._replace(confusion=None), 4)
  assert raw.tuning_last < got.tuning_last - 0.1


def test_every_example_is_visited_as_often():
  problem = problems.draw("wine", "conflicting duplicates", 0.2, 0)
  count = lambda logits, labels, ids, memory, settings: (
    _method.usual(logits, labels),
    memory.at[ids].add(1),
  )
  seen = []
  method = _PLAIN._replace(
    losses=count,
    memory=lambda x, labels, sizes, settings: jnp.zeros(len(x), jnp.int32),
    between=lambda view, memory, settings: seen.append(np.asarray(memory)) or memory,
  )
  _train(method, problem, 3, model="linear")
  per_epoch = problem.steps * problem.batch
  assert [visits.sum() for visits in seen] == [0, per_epoch, 2 * per_epoch]
  assert np.ptp(seen[1]) <= 1


def test_a_method_sees_data_features_and_extra_args():
  problem, views, told = _digits(), [], []

  def memory(x, labels, sizes, settings):
    assert (sizes.examples, sizes.classes) == (1000, 10)
    np.testing.assert_array_equal(x, problem.train.x)
    np.testing.assert_array_equal(labels, problem.train.y)
    return {"meter": jnp.float32(0.0)}

  def between(view, memory, settings):
    views.append((view.epoch, view.epochs, view.features().shape, view.logits().shape))
    return {"meter": jnp.float32(view.epoch)}

  def optimizer(settings, sizes):
    # Multiplies the updates by a meter that the method measures.
    def update(updates, state, params=None, *, meter, **extra):
      told.append(sorted(extra))
      return jax.tree.map(lambda u: -0.1 * meter * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)

  method = _method.Method(
    "metered",
    memory=memory,
    between=between,
    optimizer=optimizer,
    extra=lambda memory: {"meter": memory["meter"]},
  )
  history = _train(method, problem, 3, pull=True)
  assert views == [(i, 3, (1000, 64), (1000, 10)) for i in range(3)]
  assert told[0] == ["example_ids", "predictions"]
  # The meter is 0 in the first epoch, and nothing moves.
  assert history.test[0] != history.test[1]
  assert history.test[0] == _train(_PLAIN, problem, 1, rate=0.0).last


@pytest.mark.slow
@pytest.mark.parametrize("name", other_noise.METHODS)
def test_every_method_of_other_noise_trains(name):
  method = other_noise.METHODS[name]
  problem = "wine" if other_noise.suits(name, "wine", "none") else "diabetes"
  problem = problems.draw(problem, "outlier features", 0.1, 0)
  for trial in method.trials[::2]:
    history = _train(method, problem, 4, **trial)
    assert np.isfinite([history.last, *history.validation]).all()


@pytest.mark.slow
@pytest.mark.parametrize("networks", [1, 2])
def test_aggregation_of_examples_by_their_mean_is_plain_training(networks):
  if networks > 1:
    method = _rivals.RIVALS["co_teaching"]
    assert _train(method, _digits(), 4, ramp=1.0).last > 0.6
    return
  problem = problems.draw("wine", "none", 0.0, 0)
  plain = other_noise.METHODS["plain"]
  mean = plain._replace(aggregate=lambda settings: ranger.aggregate_by_mean())
  one, other = (_train(method, problem, 3) for method in (plain, mean))
  np.testing.assert_allclose(one.validation, other.validation)


def test_regression_is_judged_by_its_variance():
  problem = problems.draw("friedman1", "none", 0.0, 0)
  plain = other_noise.METHODS["plain"]
  got = _train(plain, problem, 15, model="linear", pull=True)
  assert 0.5 < got.last < 1
  still = _train(plain, problem, 1, model="linear", rate=0.0)
  assert still.last < 0.3
  error = np.exp(-got.validation[-1])
  assert 0 < error < 0.7  # of targets with variance one


def test_ido_gets_robust():
  robust = []
  method = _rivals.RIVALS["ido"]
  between = lambda *args: robust.append(method.between(*args)) or robust[-1]
  got = _train(method._replace(between=between), _digits(), 12)
  stages = [bool(memory["robust"]) for memory in robust]
  assert stages[0] is False
  assert stages[4:] == [True] * 8  # a third of the epochs at the latest
  problem = _digits()
  wrong = np.asarray(problem.train.y != problem.true)
  last = robust[-1]
  right = np.asarray(last["right"])[np.asarray(last["events"]).astype(int)]
  assert right[~wrong].mean() > right[wrong].mean() + 0.3
  assert got.last > 0.8


@pytest.mark.parametrize("networks", [1, 2])
def test_blocks_of_rows_change_nothing(networks):
  network, sizes = _models.Network("small", 5, 3), _method.Sizes(300, 3)
  programs = _training._compiled(
    _PLAIN.losses, _PLAIN.optimizer, _PLAIN.extra, None, networks, network, sizes
  )
  x = np.random.default_rng(0).standard_normal([300, 5]).astype(np.float32)
  each = [network.init(seed) for seed in range(networks)]
  params = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
  if networks == 1:
    params = each[0]
  for found, function in (
    (programs.logits(params, x), network.logits),
    (programs.features(params, x), network.features),
  ):
    function = jax.jit(function)
    expected = [function(one, x) for one in each]
    expected = expected[0] if networks == 1 else np.stack(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

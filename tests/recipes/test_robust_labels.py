"""The recipe against wrong labels."""

import dataclasses
import functools

import chex
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest
from scipy import special

import optax_ranger as ranger

N, C = 300, 3
IDS = np.arange(N, dtype=np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
  x: jax.Array
  labels: jax.Array
  true: np.ndarray


def one_hot(labels):
  return np.eye(C, dtype=np.float32)[np.asarray(labels)]


@functools.cache
def _data(share=0.3, n=N, seed=0):
  rng = np.random.default_rng(seed)
  true = rng.integers(0, C, n)
  x = 3 * np.eye(C)[true] + 0.7 * rng.standard_normal([n, C])
  labels = np.where(rng.random(n) < share, rng.integers(0, C, n), true)
  return Data(jnp.asarray(x, jnp.float32), jnp.asarray(labels, jnp.int32), true)


def learned(x):
  """Features as good as these, but other ones."""
  return x[:, ::-1]


ROBUST = ranger.robust_labels(C)  # One for all, so that `jit` knows its functions.
spread_of = jax.jit(ranger.labels.confusion_spread)


@functools.cache
def _init(data):
  return ROBUST, ROBUST.init(data.x, data.labels)


@pytest.mark.slow
def test_it_tells_how_many_and_which():
  for share in (0.0, 0.3, 0.6):
    data = _data(share, n=1000)
    _, known = _init(data)
    wrong = np.asarray(data.labels) != data.true
    assert abs(float(known.noise) - wrong.mean()) < 0.04
    if share:
      flagged = np.asarray(known.trust) < 0.5
      assert (flagged == wrong).mean() > 0.95
    np.testing.assert_allclose(known.weights.mean(), 1, rtol=1e-5)


@pytest.mark.guarantees(
  "robust_labels", "If every label is trusted, the loss is the cross-entropy"
)
def test_without_noise_it_is_the_cross_entropy():
  data = _data(0.0)
  robust = ranger.robust_labels(C, smoothing=0.0, belief=0.0)
  known = robust.init(data.x, data.labels)
  known = known._replace(
    confusion=np.eye(C, dtype=np.float32),
    spread=np.float32(0),
    weights=np.ones(N, np.float32),
  )
  logits = 3 * np.asarray(data.x)

  @jax.jit
  def both(known):
    plain = optax.softmax_cross_entropy_with_integer_labels
    return robust.losses(known, logits, data.labels, IDS), plain(logits, data.labels)

  found, expected = both(known)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.guarantees(
  "robust_labels", "The losses of a batch depend on its examples only, in any"
)
def test_ids_shuffled_repeated_or_absent():
  data = _data()
  robust, known = _init(data)
  logits = np.random.default_rng(1).standard_normal([N, C]).astype(np.float32)
  labels, ids = np.asarray(data.labels), np.array([7, 3, 7, 199, 0])

  @jax.jit
  def all_losses():
    plain = ranger.labels.forward_corrected_loss(
      logits[:2],
      labels[:2],
      known.confusion,
      exponent=0.45 * known.spread,
      smoothing=0.2,
    )
    return (
      robust.losses(known, logits, labels, IDS),
      robust.losses(known, logits[ids], labels[ids], ids),
      robust.losses(known, logits[:2], labels[:2], np.array([-1, N])),
      plain,
      robust.losses(known, logits[:1], np.array([-1]), np.array([0])),
    )

  whole, some, absent, plain, unlabeled = jax.device_get(all_losses())
  np.testing.assert_allclose(some, whole[ids], rtol=1e-5)
  np.testing.assert_allclose(absent, plain, rtol=1e-5)
  said = -(np.asarray(known.beliefs)[0] * special.log_softmax(logits[0])).sum()
  np.testing.assert_allclose(unlabeled[0], 0.15 * said, rtol=1e-5)


def test_what_is_known_may_be_of_numpy():
  """As it comes from a checkpoint, and closed over."""
  data = _data()
  robust, known = _init(data)
  given = 3 * np.asarray(data.x), np.asarray(data.labels), IDS
  restored = jax.device_get(known)
  found = jax.jit(lambda ids: robust.losses(restored, *given[:2], ids))(IDS)
  np.testing.assert_allclose(found, jax.jit(robust.losses)(known, *given), atol=1e-5)
  wanted = robust.ask(known, data.x, data.labels)
  after = robust.ask(restored, *jax.device_get((data.x, data.labels)))
  np.testing.assert_allclose(after.weights, wanted.weights, atol=1e-5)
  for memory, labels in ((restored, given[1]), (known, data.labels)):
    metrics = robust.metrics(memory, given[0], labels)
    assert float(metrics["noise"]) == float(known.noise)


@pytest.mark.guarantees(
  "robust_labels", "Features that have memorized the labels are refused"
)
def test_memorized_features_are_refused():
  data = _data(0.4)
  robust, known = _init(data)
  memorized = one_hot(data.labels) + np.float32(0.01) * np.asarray(data.x)
  after = robust.ask(known, memorized, data.labels)
  assert float(after.learned_noise) < 0.1 < float(after.noise)
  assert (int(after.asked), int(after.believed)) == (1, 0)
  np.testing.assert_array_equal(after.weights, known.weights)
  np.testing.assert_array_equal(after.beliefs, known.beliefs)


def test_weights_are_sharper_where_the_network_memorizes():
  data = _data(0.4)
  robust, known = _init(data)

  def logarithms(share):
    """Of the weights, where learned features see this share of the noise."""
    seen = robust.ask(known, learned(data.x), data.labels).learned_noise
    told = known._replace(noise=seen / share)
    weights = robust.ask(told, learned(data.x), data.labels).weights
    return np.log(np.asarray(weights) / weights[0])

  least, most = logarithms(0.97), logarithms(0.8)
  assert least.std() > 0.1
  np.testing.assert_allclose(most, 2 * least, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(logarithms(0.9), 1.5 * least, rtol=1e-3, atol=1e-4)


def test_good_features_are_believed():
  data = _data(0.4)
  noise = 2 * np.random.default_rng(1).standard_normal([N, C], np.float32)
  blurred = dataclasses.replace(data, x=jnp.asarray(np.asarray(data.x) + noise))
  robust, known = _init(blurred)
  after = robust.ask(known, data.x, data.labels)
  assert (int(after.asked), int(after.believed)) == (1, 1)
  assert float(after.noise) == float(known.noise) != float(after.learned_noise)
  np.testing.assert_allclose(after.spread, spread_of(after.confusion), atol=1e-6)
  assert abs(float(after.spread) - float(known.spread)) > 1e-3
  wrong = np.asarray(data.labels) != data.true

  def gap(known):
    weights = np.asarray(known.weights)
    return weights[~wrong].mean() - weights[wrong].mean()

  assert gap(after) > gap(known) + 0.2
  again = robust.ask(after, data.x, data.labels)
  np.testing.assert_allclose(again.trust, known.trust)


def test_given_features_keep_half_of_the_say():
  data = _data(0.4)
  robust, known = _init(data)
  rows = learned(np.asarray(data.x))
  after = robust.ask(known, rows, data.labels)
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  lib, labels = ranger.labels, data.labels
  heard = lib.held_out_beliefs(rows / norms, labels, num_classes=C, num_random=256)

  @jax.jit
  def by_hand(learned):
    mixed = lib.mix_beliefs([learned, known.beliefs @ known.confusion], labels)
    confusion = lib.label_confusion(labels, mixed)
    beliefs = lib.clean_beliefs(mixed, confusion)
    targets = lib.refine_targets(labels, beliefs, confusion=confusion)
    return targets, lib.confusion_spread(confusion)

  targets, spread = jax.device_get(by_hand(heard))
  right = targets[IDS, np.asarray(labels)]
  seen = float(after.learned_noise / known.noise)
  memorizing = np.clip((0.95 - seen) / 0.1, 0, 1)
  weights = np.sqrt(right * known.trust) ** ((1 + memorizing) * spread)
  np.testing.assert_allclose(after.weights, weights / weights.mean(), rtol=2e-3)
  assert float(after.learned_noise) == pytest.approx(1 - right.mean(), abs=1e-3)


@pytest.mark.guarantees("robust_labels", "With a linear head on d features")
def test_a_linear_head_is_held_back_by_what_it_can_memorize():
  data = _data(0.4)
  robust, known = _init(data)
  after = robust.ask(known, np.asarray(data.x, jnp.bfloat16), data.labels)
  known, after = jax.device_get((known, after))
  capacity = 2 * C / N  # Cover, 1965
  assert float(known.capacity) == 1
  assert float(after.capacity) == pytest.approx(capacity)
  assert (int(after.asked), int(after.believed)) == (1, 1)
  weights = known.trust ** (2 * known.spread * capacity)
  np.testing.assert_allclose(after.weights, weights / weights.mean(), rtol=1e-5)
  np.testing.assert_array_equal(after.beliefs, known.beliefs)
  np.testing.assert_array_equal(after.confusion, known.confusion)
  np.testing.assert_array_equal(after.trust, known.trust)
  assert (after.noise, after.spread) == (known.noise, known.spread)
  assert abs(float(after.learned_noise - known.noise)) < 0.05
  again = robust.ask(after, learned(data.x), data.labels)
  assert float(again.capacity) == 1
  assert (int(again.asked), int(again.believed)) == (2, 2)
  third = robust.ask(again, data.x, data.labels)
  assert float(third.capacity) == pytest.approx(capacity)

  logits = np.random.default_rng(1).standard_normal([N, C], np.float32)
  losses = jax.jit(robust.losses)(after, logits, data.labels, IDS)
  corrected = jax.jit(ranger.labels.forward_corrected_loss)(
    logits,
    data.labels,
    known.confusion,
    exponent=0.45 * known.spread * capacity,
    smoothing=0.2 * capacity,
  )
  pull = -(known.beliefs * special.log_softmax(logits, axis=1)).sum(axis=1)
  expected = after.weights * corrected + 0.15 * pull
  np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(("noise", "doubt"), [(0.04, 0), (0.07, 0.5), (0.1, 1)])
def test_few_labels_that_look_wrong_are_hard_examples(noise, doubt):
  data = _data(0.4)
  robust, known = _init(data)
  known = known._replace(noise=jnp.float32(noise))
  labels = np.where(IDS == 3, -1, data.labels).astype(np.int32)
  logits = np.random.default_rng(1).standard_normal([N, C], np.float32)
  losses = jax.jit(robust.losses)(known, logits, labels, IDS)
  corrected = jax.jit(ranger.labels.forward_corrected_loss)(
    logits, labels, known.confusion, exponent=0.45 * known.spread * doubt, smoothing=0.2
  )
  pull = -(known.beliefs * special.log_softmax(logits, axis=1)).sum(axis=1)
  share = np.where(IDS == 3, 1, doubt)  # What has no label follows its belief.
  expected = known.weights * corrected + 0.15 * share * pull
  np.testing.assert_allclose(losses, expected, rtol=1e-4)
  # Also in the weights, whichever features are asked.
  for rows in (learned(data.x), data.x):
    weights = robust.ask(known, rows, data.labels).weights
    assert (np.ptp(weights) < 1e-5) == (doubt == 0)


def test_without_noise_all_weights_are_one():
  _, known = _init(_data(0.0))
  assert float(known.noise) < 0.04
  np.testing.assert_allclose(known.weights, 1, rtol=1e-5)


def test_given_features_are_known_again_in_64_bits():
  with jax.enable_x64(True):
    data = _data(0.4)
    robust = ranger.robust_labels(C)
    x = np.asarray(data.x, np.float64)
    known = robust.init(x, data.labels)
    assert known.projection.dtype == jnp.float32
    after = robust.ask(known, x, data.labels)
    losses = jax.jit(robust.losses)(after, data.x, data.labels, IDS)
    asked = robust.ask(after, learned(x), data.labels)
    assert float(after.capacity) == np.float32(2 * C / N)
    chex.assert_tree_all_finite((losses, asked._replace(learned_noise=None)))
    assert {leaf.dtype.itemsize for leaf in (*after, *asked, losses)} == {4}


@pytest.mark.parametrize("size", [1e-37, 1.0, 1e37])
def test_given_features_are_known_again(size):
  """Learned ones of one column have the same two directions as given ones."""
  data = _data(0.4)
  column = np.abs(np.asarray(data.x)[:, :1]) * np.float32(size)
  known = ROBUST.init(column, data.labels)
  assert float(ROBUST.ask(known, column, data.labels).capacity) == np.float32(2 / N)
  other = column + np.float32(size)
  assert float(ROBUST.ask(known, other, data.labels).capacity) == 1


def test_a_linear_head_with_few_rows_is_held_back_as_any_network():
  data = _data(0.4, n=5)
  robust, known = _init(data)
  after = robust.ask(known, data.x, data.labels)
  assert float(after.capacity) == 1
  np.testing.assert_allclose(after.weights, known.weights, rtol=1e-5)


def test_learned_features_are_directions_whatever_their_signs():
  data = _data(0.4)
  x, rng = np.asarray(data.x), np.random.default_rng(1)
  # The given features tell less than the learned ones.
  known = ROBUST.init(x + 2 * rng.standard_normal([N, C], np.float32), data.labels)
  negative = -np.exp(learned(x))
  scaled = negative * np.logspace(-30, 30, N, dtype=np.float32)[:, None]
  after, again = (ROBUST.ask(known, rows, data.labels) for rows in (negative, scaled))
  np.testing.assert_allclose(again.beliefs, after.beliefs, atol=1e-3)
  right = lambda known: (np.asarray(known.beliefs).argmax(axis=1) == data.true).mean()
  assert right(after) > right(known) + 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_learned_rows_that_are_not_finite_are_left_out(value):
  data = _data(0.4)
  robust, known = _init(data)
  rows = np.array(learned(data.x))
  rows[0, 1] = value
  other = np.where(np.arange(N)[:, None] == 0, np.float32(np.nan), rows)
  after, again = (robust.ask(known, x, data.labels) for x in (rows, other))
  jax.tree.map(np.testing.assert_array_equal, after, again)
  chex.assert_tree_all_finite((after.beliefs, after.weights))
  rows = np.array(data.x)
  rows[0, 1] = value
  known = robust.init(rows, data.labels)
  assert float(robust.ask(known, rows, data.labels).capacity) < 1


@pytest.mark.guarantees("robust_labels", "Asking again compiles nothing")
def test_asking_again_compiles_nothing():
  data = _data()
  robust, known = _init(data)

  @jax.jit
  @chex.assert_max_traces(1)
  def ask(known, features, labels):
    return robust.ask(known, features, labels)

  known = ask(known, learned(data.x), data.labels)
  known = ask(known, 2 * data.x + 1, data.labels)

  @jax.jit
  @chex.assert_max_traces(1)
  def losses(known, logits, labels, ids):
    return robust.losses(known, logits, labels, ids)

  losses(known, data.x, data.labels, IDS)
  losses(ask(known, data.x, data.labels), data.x, data.labels, IDS)


def test_init_under_jit_is_the_same():
  data = _data()
  robust, known = _init(data)
  compiled = jax.jit(robust.init)(data.x, data.labels)
  for one, other in zip(known, compiled, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_metrics_see_memorizing():
  data = _data(0.4)
  robust, known = _init(data)
  right = robust.metrics(known, one_hot(data.true), data.labels)
  memorized = robust.metrics(known, one_hot(data.labels), data.labels)
  assert float(right["memorized"]) < 0.1
  assert float(memorized["memorized"]) == pytest.approx(1)
  assert float(right["noise"]) == float(known.noise)


def test_metrics_equal_numpy():
  data = _data(0.4)
  robust, known = _init(data)
  known = jax.device_get(known._replace(learned_noise=jnp.float32(0.25)))
  labels = np.where(IDS % 7 == 0, -1, data.labels).astype(np.int32)
  predictions = np.random.default_rng(0).standard_normal([N, C], np.float32)
  at = (labels >= 0) & (known.trust < 0.5)
  assert ((known.trust < 0.5) & ~at).any()
  agreement = (predictions.argmax(axis=1) == labels)[at].mean()
  expected = known.trust[at].mean()
  wanted = {
    "noise": known.noise,
    "learned_noise": 0.25,
    "contradicted": at.mean(),
    "expected_agreement": expected,
    "agreement": agreement,
    "memorized": (agreement - expected) / (1 - expected),
  }
  found = robust.metrics(known, predictions, labels)
  assert 0 < expected < agreement < 1
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)
  never = np.eye(C, dtype=np.float32)[(labels + 1) % C]
  assert float(robust.metrics(known, never, labels)["memorized"]) == 0


def test_sharpness_is_the_power_of_the_weights():
  data = _data(0.4)
  robust, known = _init(data)
  mild = ranger.robust_labels(C, sharpness=1.0)
  for of in (
    lambda recipe: recipe.init(data.x, data.labels),
    lambda recipe: recipe.ask(known, learned(data.x), data.labels),
    lambda recipe: recipe.ask(known, data.x, data.labels),
  ):
    roots = np.sqrt(np.asarray(of(robust).weights))
    assert np.ptp(roots) > 1e-3
    np.testing.assert_allclose(of(mild).weights, roots / roots.mean(), rtol=1e-4)


def test_names_soft_labels_and_missing_ones():
  data = _data(0.3)
  robust, known = _init(data)
  names = np.array(["a", "b", "c"])[np.asarray(data.labels)]
  named = robust.init(data.x, names)
  np.testing.assert_allclose(named.trust, known.trust)
  soft = robust.init(data.x, one_hot(data.labels))
  np.testing.assert_allclose(soft.trust, known.trust, atol=1e-3)
  missing = np.array(data.labels)
  missing[:20] = -1
  some = jax.device_get(robust.init(data.x, missing))
  np.testing.assert_array_equal(some.weights[:20], 1)
  blank = one_hot(data.labels)
  blank[:20] = 0
  for found in (some, jax.device_get(robust.init(data.x, blank))):
    np.testing.assert_allclose(found.noise, 1 - found.trust[20:].mean(), rtol=1e-4)
    np.testing.assert_allclose(found.weights[20:].mean(), 1, rtol=1e-4)
  assert (some.beliefs[:20].argmax(axis=1) == data.true[:20]).mean() > 0.9


def test_bad_data_poisons_nobody():
  data, robust = _data(), ROBUST
  rows, logits = np.array(data.x), np.array(data.x)
  rows[3] = logits[0] = np.nan
  known = robust.init(rows, data.labels)
  chex.assert_tree_all_finite(known._replace(learned_noise=np.float32(0)))
  np.testing.assert_array_equal(known.beliefs[3], 0)
  bad = robust.ask(known, np.full([N, 1], np.nan, np.float32), data.labels)
  chex.assert_tree_all_finite(bad.weights)
  losses = np.asarray(jax.jit(robust.losses)(known, logits, data.labels, IDS))
  chex.assert_tree_all_finite(losses[1:])


def test_wrong_use_is_refused():
  data = _data()
  robust, known = _init(data)
  x, labels = np.asarray(data.x), np.asarray(data.labels)
  with pytest.raises(ValueError, match="num_classes"):
    ranger.robust_labels(1)
  with pytest.raises(ValueError, match="exponent"):
    ranger.robust_labels(C, exponent=1.5)
  with pytest.raises(ValueError, match="belief"):
    ranger.robust_labels(C, belief=-1.0)
  with pytest.raises(ValueError, match=r"logits must have shape \[n, 3\]"):
    robust.losses(known, x[:, :2], labels, IDS)
  with pytest.raises(ValueError, match="ids"):
    robust.losses(known, x, labels, IDS[:5])
  with pytest.raises(TypeError, match="ids"):
    robust.losses(known, x, labels, IDS.astype(np.float32))
  with pytest.raises(ValueError, match="features"):
    robust.ask(known, x[:5], labels[:5])
  with pytest.raises(ValueError, match="multi-label"):
    robust.init(x, np.ones([N, C], np.float32))


def _train(data, update, steps=60):
  rng = np.random.default_rng(0)
  for _ in range(steps):
    update(jnp.asarray(rng.permutation(N)[:64]))


def test_in_an_nnx_optimizer():
  data = _data(0.4)
  robust, known = _init(data)
  model = nnx.Linear(C, C, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, known, ids):
    def loss(model):
      return robust.losses(known, model(data.x[ids]), data.labels[ids], ids).mean()

    optimizer.update(model, nnx.grad(loss)(model))

  _train(data, lambda ids: step(model, optimizer, known, ids))
  assert (model(data.x).argmax(axis=1) == data.true).mean() > 0.95


def test_in_equinox():
  eqx = pytest.importorskip("equinox")
  data = _data(0.4)
  robust, known = _init(data)
  model = eqx.nn.Linear(C, C, key=jax.random.key(0))
  tx = optax.sgd(0.5)
  state = tx.init(eqx.filter(model, eqx.is_array))

  @eqx.filter_jit
  def step(model, state, known, ids):
    def loss(model):
      logits = jax.vmap(model)(data.x[ids])
      return robust.losses(known, logits, data.labels[ids], ids).mean()

    updates, state = tx.update(eqx.filter_grad(loss)(model), state)
    return eqx.apply_updates(model, updates), state

  holder = [model, state]

  def update(ids):
    holder[:] = step(*holder, known, ids)

  _train(data, update)
  found = jax.vmap(holder[0])(data.x).argmax(axis=1)
  assert (found == data.true).mean() > 0.95


@pytest.mark.few(1)
@pytest.mark.parametrize("explicit", [False, True])
def test_under_train_step_on_a_mesh(explicit):
  if jax.device_count() < 8:
    pytest.skip("needs 8 devices")
  kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  data = _data(0.4)
  robust, known = _init(data)

  def losses(params, batch, known):
    logits = batch["x"] @ params["kernel"] + params["bias"][None]
    return robust.losses(known, logits, batch["label"], batch["id"])

  params = {"kernel": jnp.zeros([C, C]), "bias": jnp.zeros(C)}
  tx = optax.sgd(0.5)
  x, labels, found = np.asarray(data.x), np.asarray(data.labels), []
  for place in (None, mesh):
    step = ranger.train_step(losses, tx, **({} if place is None else {"mesh": place}))
    own = jax.tree.map(jnp.copy, params)  # The step donates them.
    state = step.init(own)
    rng = np.random.default_rng(0)
    for _ in range(20):
      ids = rng.permutation(N)[:64]
      batch = {"x": x[ids], "label": labels[ids], "id": ids}
      own, state, _ = step(own, state, batch, known=known)
    found.append(own)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found
  )


@pytest.mark.slow
def test_rows_split_over_devices():
  if jax.device_count() < 8:
    pytest.skip("needs 8 devices")
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
  data = _data(0.4, n=N // 8 * 8)
  robust, known = _init(data)
  split = NamedSharding(mesh, PartitionSpec("data"))
  with jax.set_mesh(mesh):
    x, labels = jax.device_put(data.x, split), jax.device_put(data.labels, split)
    found = robust.init(x, labels)
    asked = robust.ask(found, learned(x), labels)
    linear = robust.ask(found, x, labels)
    losses = robust.losses(found, x, labels, jax.device_put(jnp.arange(len(x)), split))
  np.testing.assert_allclose(found.trust, known.trust, atol=1e-3)
  expected = robust.ask(known, learned(data.x), data.labels)
  np.testing.assert_allclose(asked.weights, expected.weights, atol=1e-2)
  expected = robust.ask(known, data.x, data.labels)
  np.testing.assert_allclose(linear.weights, expected.weights, atol=1e-2)
  np.testing.assert_array_equal(linear.capacity, expected.capacity)
  expected = robust.losses(known, data.x, data.labels, jnp.arange(len(x)))
  np.testing.assert_allclose(losses, expected, atol=1e-3)

"""Votes of several raters as labels, and losses of tokens and pixels."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

import optax_ranger as ranger

ONES = np.ones([2, 1], np.float32)
PAIR = ranger.Neighbors(np.array([[1], [0]], np.int32), ONES, ONES)
CONFUSION = np.array([[0.7, 0.2, 0.1], [0.0, 0.9, 0.1], [0.3, 0.1, 0.6]], np.float32)


def forward(logits, labels, confusion, exponent=0.0, smoothing=0.0, mask=None):
  return ranger.labels.forward_corrected_loss(
    logits, labels, confusion, exponent=exponent, smoothing=smoothing, mask=mask
  )


losses_of = jax.jit(forward)


@jax.jit
def both(*given):
  """The losses, and the gradient of their sum."""
  total = lambda logits: forward(logits, *given[1:]).sum()
  return forward(*given), jax.grad(total)(given[0])


def known(function, *given):
  """The result in one program, of arrays whose values are known while it is traced."""
  return jax.jit(lambda: function(*given))()


def known_each(function, *kinds):
  """As `known`, for each of several."""
  return jax.device_get(known(lambda: [function(kind) for kind in kinds]))


def neighbors_of(n, k=4, seed=0):
  rng = np.random.default_rng(seed)
  indices, weights = rng.integers(-1, n + 1, [n, k]), rng.uniform(0, 1, [n, k])
  weights[0], weights[1, 0] = 0, np.nan
  return ranger.Neighbors(
    indices.astype(np.int32), np.ones([n, k], np.float32), weights.astype(np.float32)
  )


def votes_of(n, classes=3, seed=0):
  """Distributions; the last three rows are none."""
  rng = np.random.default_rng(seed)
  votes = rng.multinomial(5, np.ones(classes) / classes, n) / 5
  votes[-3], votes[-2, 0], votes[-1] = 0, np.nan, [-1, 1, 1]
  return votes.astype(np.float32)


@pytest.mark.guarantees(
  "labels.forward_corrected_loss",
  "One-hot rows act as integers. The clean posterior",
)
@pytest.mark.guarantees(
  "labels.label_support", "One-hot rows are integers, and soft labels like their"
)
def test_one_hot_rows_are_integers():
  rng = np.random.default_rng(0)
  labels = rng.integers(-1, 3, 20).astype(np.int32)
  rows = (labels[:, None] == np.arange(3)).astype(np.float32)
  beliefs = rng.dirichlet(np.ones(3), 20).astype(np.float32)
  beliefs[3] = 0
  close = {"rtol": 2e-6, "atol": 1e-6}
  for scale, exponent in ((1.0, 0.0), (30.0, 0.4), (1e4, 0.0)):
    logits = (scale * rng.standard_normal([20, 3])).astype(np.float32)
    for matrix in (CONFUSION, np.eye(3, dtype=np.float32)):
      whole = both(logits, labels, matrix, np.float32(exponent), np.float32(0.1))
      found = both(logits, rows, matrix, np.float32(exponent), np.float32(0.1))
      for one, other in zip(found, whole, strict=True):
        np.testing.assert_allclose(one, other, **close)
  neighbors = neighbors_of(20)
  support = known(ranger.labels.label_support, neighbors, labels)
  kinds = rows, rows.astype(bool), rows.tolist(), jnp.asarray(rows.astype("float16"))
  for function in (
    lambda y: ranger.labels.label_support(neighbors, y),
    lambda y: ranger.labels.label_confusion(y, beliefs),
    lambda y: ranger.labels.refine_targets(y, beliefs),
    lambda y: ranger.labels.refine_targets(y, beliefs, confusion=CONFUSION),
    lambda y: ranger.labels.refine_targets(y, beliefs, support=support),
  ):
    wanted, *found = known_each(function, labels, *kinds)
    for one in found:
      np.testing.assert_allclose(one, wanted, **close)


def minimizer(labels, loss, steps=400):
  """What gradient descent makes of the softmax of one example."""

  def step(logits, _):
    return logits - jax.grad(lambda x: loss(x[None], labels)[0])(logits), None

  logits, _ = jax.lax.scan(step, jnp.zeros([3]), None, length=steps)
  return jax.nn.softmax(logits)


@pytest.mark.guarantees(
  "labels.forward_corrected_loss",
  "One-hot rows act as integers. The clean posterior",
)
def test_soft_loss_finds_the_clean_posterior():
  """And the logarithm of the expected chance does not: it becomes certain."""
  clean = np.array([0.5, 0.3, 0.2], np.float32)
  votes = jnp.asarray(clean @ CONFUSION)[None]
  found = jax.jit(lambda r: minimizer(r, lambda x, r: forward(x, r, CONFUSION)))(votes)
  np.testing.assert_allclose(found, clean, atol=5e-3)
  other = lambda x, r: -jnp.log((jax.nn.softmax(x) @ CONFUSION * r).sum(axis=1))
  found = jax.jit(lambda r: minimizer(r, other))(votes)
  assert found.max() > 0.9


def test_soft_losses_are_means():
  rng = np.random.default_rng(0)
  logits = 3 * rng.standard_normal([20, 3])
  votes = votes_of(20)
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  u = p @ CONFUSION.astype(np.float64)
  given = logits.astype(np.float32), votes, CONFUSION
  for q in (0.0, 0.5):
    each = (1 - u**q) / q if q else -np.log(u)
    wanted = (votes * each).sum(axis=1) - 0.1 * np.log(p).mean(axis=1)
    wanted[-3:] = 0
    found = both(*given, np.float32(q), np.float32(0.1))
    np.testing.assert_allclose(found[0], wanted, rtol=1e-5, atol=1e-6)
    assert np.isfinite(found[1]).all()
    assert not found[1][-3:].any()


@pytest.mark.guarantees(
  "labels.refine_targets", "One-hot rows act as integers. Soft labels give the mean"
)
def test_soft_targets_are_means():
  """Of the targets of each label, weighed by its share."""
  rng = np.random.default_rng(0)
  votes = votes_of(12)[:9]
  beliefs = rng.dirichlet(np.ones(3), 9).astype(np.float32)
  beliefs[0], beliefs[1] = 0, np.nan
  support = rng.uniform(0, 1, 9).astype(np.float32)
  for given in ({}, {"confusion": CONFUSION}, {"support": support}):
    labels = [np.full([9], y) for y in range(3)]
    targets = lambda y, given=given: ranger.labels.refine_targets(y, beliefs, **given)
    found, *each = known_each(targets, votes, *labels)
    wanted = sum(votes[:, [y]] * each[y] for y in range(3))
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)


def test_no_soft_label_no_part():
  votes, beliefs = votes_of(9), np.full([9, 3], [0.5, 0.3, 0.2], np.float32)
  refine = lambda votes: ranger.labels.refine_targets(
    votes, beliefs, confusion=CONFUSION
  )
  targets = np.asarray(known(refine, votes))
  np.testing.assert_allclose(targets[-3:], beliefs[-3:], rtol=1e-6)
  found = known(ranger.labels.label_confusion, votes, beliefs)
  wanted = known(ranger.labels.label_confusion, votes[:6], beliefs[:6])
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.guarantees(
  "labels.label_confusion", "Votes of r raters count as r examples of weight 1/r each"
)
def test_votes_are_counted():
  rng = np.random.default_rng(0)
  ballots = rng.integers(0, 3, [10, 4])
  votes = (ballots[:, :, None] == np.arange(3)).mean(axis=1)
  beliefs = rng.dirichlet(np.ones(3), 10).astype(np.float32)
  found = known(ranger.labels.label_confusion, votes, beliefs)
  each = ballots.reshape(-1), np.repeat(beliefs, 4, axis=0)
  wanted = known(ranger.labels.label_confusion, *each)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.guarantees(
  "labels.label_support", "One-hot rows are integers, and soft labels like their"
)
def test_support_of_soft_labels_equals_a_loop():
  votes, neighbors = votes_of(20).astype(np.float64), neighbors_of(20)
  votes[4] = votes[5] = [0.4, 0.6, 0]
  usable = (np.isfinite(votes) & (votes >= 0)).all(axis=1) & (votes.sum(axis=1) > 0)
  wanted = np.zeros(20)
  for i, (indices, weights) in enumerate(
    zip(neighbors.indices, neighbors.weights, strict=True)
  ):
    total, mean = 0.0, np.zeros(3)
    for j, weight in zip(indices, weights, strict=True):
      if 0 <= j < 20 and weight > 0 and usable[j]:
        total, mean = total + weight, mean + weight * votes[j]
    if total and usable[i]:
      wanted[i] = np.minimum(votes[i], mean / total).sum()
  found = known(ranger.labels.label_support, neighbors, votes)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  found = known(ranger.labels.label_support, PAIR, [[0.4, 0.6], [0.4, 0.6]])
  np.testing.assert_allclose(found, 1, rtol=1e-6)


EVEN = np.full([2, 3], 1 / 3, np.float32)
CALLS = (
  lambda y: forward(EVEN, y, CONFUSION),
  lambda y: ranger.labels.refine_targets(y, EVEN),
  lambda y: ranger.labels.label_confusion(y, EVEN),
  lambda y: ranger.labels.label_support(PAIR, y),
)


@functools.cache
def of_halves():
  """What each makes of an example that is half of one class, half of another."""
  halves = [[0.5, 0.5, 0], [0, 0, 1]]
  return jax.device_get(known(lambda: [call(halves) for call in CALLS]))


@pytest.mark.parametrize("dtype", [np.float32, np.int32, bool])
def test_several_labels_at_once_are_refused(dtype):
  several = np.array([[1, 1, 0], [0, 0, 1]], dtype)
  for call in CALLS:
    with pytest.raises(ValueError, match=r"sums to 2: .* \(multi-label\) are not"):
      call(several)
  traced = jax.jit(lambda y: [call(y) for call in CALLS])(several)
  for one, other in zip(traced, of_halves(), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-6)
  with pytest.raises(TypeError, match="soft labels must hold real numbers"):
    CALLS[0](np.array([["a", "b", "c"]] * 2))
  with pytest.raises(ValueError, match=r"shape \[2\], or \[2, 3\] if they are soft"):
    CALLS[0](np.ones([2, 2]) / 2)


def tokens(seed=0):
  """Five examples of four tokens: some masked, some without a label, some bad."""
  rng = np.random.default_rng(seed)
  logits = 2 * rng.standard_normal([5, 4, 3]).astype(np.float32)
  labels = rng.integers(0, 3, [5, 4]).astype(np.int32)
  mask = rng.random([5, 4]) < 0.7
  labels[0, 0], mask[1], labels[2] = -1, False, -1
  mask[3] = [False, True, True, False]
  logits[3, 0], logits[0, 0] = np.nan, np.inf
  return logits, labels, mask


@pytest.mark.guarantees(
  "labels.forward_corrected_loss",
  "The loss is the mean over unmasked tokens; masked ones",
)
def test_tokens_equal_a_loop():
  logits, labels, mask = tokens()
  found, slopes = both(logits, labels, CONFUSION, 0.3, 0.1, mask)
  wanted = np.zeros(5)
  for i in range(5):
    each = np.asarray(losses_of(logits[i], labels[i], CONFUSION, 0.3, 0.1))
    there = mask[i] & (labels[i] >= 0)
    wanted[i] = each[there].mean() if there.any() else 0
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  np.testing.assert_array_equal(found[1:3], [0, 0])
  counted = mask & (labels >= 0)
  assert np.isfinite(slopes).all()
  np.testing.assert_array_equal(np.asarray(slopes).any(axis=-1), counted)


def test_pixels_are_tokens_in_two_axes():
  logits, labels, mask = tokens()
  wanted = both(logits, labels, CONFUSION, 0.3, 0.1, mask)
  square = lambda array: array.reshape(5, 2, 2, *array.shape[2:])
  given = square(logits), square(labels), CONFUSION, 0.3, 0.1, square(mask)
  found = both(*given)
  np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
  np.testing.assert_allclose(found[1], square(wanted[1]), rtol=1e-5, atol=1e-7)
  names = np.array(["ant", "bee", "cat", None], object)[square(labels)]
  named = known(forward, given[0], names.tolist(), *given[2:])
  np.testing.assert_allclose(named, wanted[0], rtol=1e-6)
  rows = (given[1][..., None] == np.arange(3)).astype(np.float32)
  soft = known(forward, given[0], rows, *given[2:])
  np.testing.assert_allclose(soft, wanted[0], rtol=1e-5)


def test_a_mask_of_examples_and_no_tokens():
  logits, labels = np.zeros([3, 2], np.float32), np.zeros([3], np.int32)
  eye = np.eye(2, dtype=np.float32)
  found = known(forward, logits, labels, eye, 0.0, 0.0, np.array([1, 0, 2]))
  np.testing.assert_allclose(found, np.log(2) * np.array([1, 0, 1]), rtol=1e-6)
  for shape in ([3, 0], [0, 4]):
    more = np.zeros([*shape, 2], np.float32), np.zeros(shape, np.int32)
    empty = known(forward, *more, eye)
    np.testing.assert_array_equal(empty, np.zeros(shape[0]))
  half = known(forward, logits.astype(np.float16), labels, eye)
  assert half.dtype == jnp.float32
  with pytest.raises(TypeError, match=r"mask must hold booleans.*write mask > 0"):
    losses_of(logits, labels, eye, mask=np.ones([3]))
  with pytest.raises(ValueError, match=r"mask must have shape \[3\], got \[3, 2\]"):
    losses_of(logits, labels, eye, mask=np.ones([3, 2], bool))
  with pytest.raises(ValueError, match=r"labels must have shape \[3, 4\], got \[3\]"):
    losses_of(np.zeros([3, 4, 2], np.float32), labels, eye)


@pytest.mark.guarantees(
  "labels.forward_corrected_loss", "Split over devices by rows, the same"
)
@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("whole", ["nothing", "labels"])
def test_soft_labels_and_tokens_split_over_devices(kind, whole):
  rng = np.random.default_rng(0)
  neighbors, votes = neighbors_of(16), jnp.asarray(votes_of(16))
  beliefs = jnp.asarray(rng.dirichlet(np.ones(3), 16), jnp.float32)
  many = [np.concatenate([array] * 4)[:16] for array in tokens()]
  logits, labels, mask = map(jnp.asarray, many)

  def everything(neighbors, beliefs, logits, votes, labels, mask):
    loss = lambda x, y, mask: forward(x, y, CONFUSION, 0.3, 0.1, mask)
    value = jax.value_and_grad(lambda *args: loss(*args).sum())
    return (
      value(logits, labels, mask),
      value(jnp.log(beliefs), votes, None),
      ranger.labels.label_support(neighbors, votes),
      ranger.labels.label_confusion(votes, beliefs),
      ranger.labels.refine_targets(votes, beliefs, confusion=CONFUSION),
    )

  given = neighbors, beliefs, logits, votes, labels, mask
  expected = jax.jit(everything)(*given)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  split = 6 if whole == "nothing" else 3
  given = *jax.device_put(given[:split], rows), *given[split:]
  with jax.set_mesh(mesh):
    found = jax.jit(everything)(*given)
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
    found,
    expected,
  )

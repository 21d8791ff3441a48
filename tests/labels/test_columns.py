"""Labels and ids as people have them: columns of every kind, -1, and 64 bits."""

import enum
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ranger as ranger
from optax_ranger import graph

WANTED = [0, 2, -1, 1]


class NAType:
  """As pandas' NA: no comparison of it is a truth value."""

  def __ne__(self, other):
    return self

  def __eq__(self, other):
    return self

  __hash__ = None

  def __bool__(self):
    raise TypeError("boolean value of NA is ambiguous")


class Arrow:
  """As a column of Arrow, which NumPy would read otherwise."""

  def __init__(self, values):
    self.values = values

  def to_pylist(self):
    return self.values


class Series:
  """As a column of pandas or Polars."""

  def __init__(self, values):
    self.values = np.array(values, object)

  def __array__(self, dtype=None, copy=None):
    return self.values


INTEGERS = {
  "list": [0, 2, -1, 1],
  "tuple with None": (0, 2, None, 1),
  "list with NaN": [0, 2, float("nan"), 1],
  "int8": np.array(WANTED, np.int8),
  "int64": np.array(WANTED, np.int64),
  "float": np.array([0, 2, np.nan, 1]),
  "float16": np.array([0, 2, np.nan, 1], np.float16),
  "object": np.array([0, 2, None, 1], object),
  "masked": np.ma.masked_array([0, 2, 7, 1], [False, False, True, False]),
  "pandas": Series([0, 2, NAType(), 1]),
  "arrow": Arrow([0, 2, None, 1]),
  "jax": jnp.array(WANTED),
  "jax int8": jnp.array(WANTED, jnp.int8),
}
NAMES = {
  "strings": ["ant", "cat", None, "bee"],
  "strings and NaN": ["ant", "cat", float("nan"), "bee"],
  "NumPy": np.array(["ant", "cat", None, "bee"], object),
  "pandas": Series(["ant", "cat", NAType(), "bee"]),
  "arrow": Arrow(["ant", "cat", None, "bee"]),
  "masked": np.ma.masked_array(["ant", "cat", "dog", "bee"], [0, 0, 1, 0]),
}


@functools.cache
def line(n=4, k=3):
  return graph.build(np.arange(float(n))[:, None], k, backend="jax")


@functools.cache
def wanted_outputs():
  return list(outputs(np.array(WANTED, np.int32)))


def outputs(labels):
  """What every function makes of them."""
  neighbors = line()
  found = graph.audit(neighbors, labels)
  yield from (found.order, found.support, found.margin, found.suggested)
  yield from jax.jit(lambda: list(outputs_of_traced(neighbors, labels)))()


def outputs_of_traced(neighbors, labels):
  """Of those that can be traced; the labels are known all the same."""
  beliefs = np.random.default_rng(0).dirichlet(np.ones(3), 4).astype(np.float32)
  logits, confusion = np.log(beliefs), np.full([3, 3], 1 / 3, np.float32)
  yield graph.balance_classes(neighbors, labels, 3).weights
  yield ranger.neighbors.weigh(neighbors, labels=labels).weights
  yield ranger.neighbors.weigh(neighbors, labels=labels, beliefs=beliefs).weights
  yield ranger.labels.label_support(neighbors, labels)
  yield ranger.labels.label_confusion(labels, beliefs)
  yield ranger.labels.refine_targets(labels, beliefs)
  yield ranger.labels.forward_corrected_loss(logits, labels, confusion)


@pytest.mark.few(8)
@pytest.mark.parametrize("kind", [*INTEGERS, *(f"names: {name}" for name in NAMES)])
def test_columns_are_read_alike(kind):
  labels = {**INTEGERS, **{f"names: {name}": NAMES[name] for name in NAMES}}[kind]
  for found, wanted in zip(outputs(labels), wanted_outputs(), strict=True):
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_classes_come_back(name):
  found = graph.audit(line(), NAMES[name])
  assert found.classes.tolist() == ["ant", "bee", "cat"]
  assert found.suggested.dtype == np.int32
  assert graph.audit(line(), WANTED).classes is None


@pytest.mark.parametrize("labels", [[True, False, True, True], np.arange(4) > 1])
def test_flags_are_classes(labels):
  wanted = np.asarray(labels).astype(int)
  for given in (labels, jnp.asarray(labels)):
    found = ranger.labels.label_support(line(), given)
    np.testing.assert_array_equal(found, ranger.labels.label_support(line(), wanted))


def calls(labels):
  """Each function that needs classes, not only equality."""
  beliefs = np.full([4, 3], 1 / 3, np.float32)
  yield lambda: graph.audit(line(), labels)
  yield lambda: graph.balance_classes(line(), labels, 3)
  yield lambda: ranger.neighbors.weigh(line(), labels=labels, beliefs=beliefs)
  yield lambda: ranger.labels.label_confusion(labels, beliefs)
  yield lambda: ranger.labels.refine_targets(labels, beliefs)
  yield lambda: ranger.labels.forward_corrected_loss(beliefs, labels, np.eye(3))


@pytest.mark.parametrize(
  "hashes",
  [
    np.array([0, 1, 1 + 2**32, 2]),
    np.array([0, 1, 2**63 + 5, 2], np.uint64),
    np.array([0, 1, 2**31, 2], np.uint32),
    np.array([0.0, 1, 2.0**40, 2]),
    [0, 1, 2**63 + 5, 2],
    [0, 1, 2**70, None],
  ],
  ids=["int64", "uint64", "uint32", "float", "list", "beyond 64 bits"],
)
def test_hashes_are_refused_as_classes(hashes):
  for call in calls(hashes):
    with pytest.raises(
      ValueError, match=r"labels must fit 32 bits, got \d{10}.*Number"
    ):
      call()


@pytest.mark.parametrize("shift", [0, 2**32, -(2**40), 2**62])
def test_hashes_are_compared_as_they_are(shift):
  """Equal modulo 2**32, and different; -1 is no label among hashes too."""
  labels = np.array([1, 1 + 2**32, -1, 1, 1 + 2**33, -1]) + shift
  labels[[2, 5]] = -1
  ids = np.array([0, 1, -1, 0, 2, -1])
  neighbors = line(6, 5)
  for function in (
    ranger.labels.label_support,
    lambda neighbors, labels: ranger.neighbors.weigh(neighbors, labels=labels).weights,
  ):
    np.testing.assert_array_equal(function(neighbors, labels), function(neighbors, ids))


@pytest.mark.parametrize(
  ("labels", "error", "message"),
  [
    ([0, 1, -2, 0], ValueError, "labels must be at least -1, .* got -2"),
    (np.array([0, 1, -100, 0], np.int8), ValueError, "no label, got -100"),
    (jnp.array([0, 1, -2, 0]), ValueError, "labels must be at least -1"),
    ([0, 1.5, 2, 0], TypeError, "labels must hold integers, got float64 .* 1.5"),
    ([0, np.inf, 2, 0], TypeError, "labels must hold integers, got float64 .* inf"),
    ([0, "a", 2, 0], TypeError, "labels must hold integers or strings, not both"),
    ([0j, 1, 1, 0], TypeError, "labels must hold integers, got"),
    ([enum.Enum("E", ["A"])(1)] * 4, TypeError, "labels must hold integers, got"),
    ([[0], [1], [1], [0]], ValueError, r"labels must have shape \[4\], got \[4, 1\]"),
    (["a"] * 5, ValueError, r"labels must have shape \[4\], got \[5\]"),
    (jnp.zeros(4), TypeError, "labels must hold integers, got float32"),
  ],
)
def test_odd_labels_are_refused(labels, error, message):
  for call in (
    *calls(labels),
    lambda: ranger.labels.label_support(line(), labels),
    lambda: ranger.neighbors.weigh(line(), labels=labels),
  ):
    with pytest.raises(error, match=message):
      call()


@pytest.mark.parametrize("dtype", ["int64", "uint32", "uint64"])
def test_traced_labels_never_wrap(dtype):
  """Under x64 a label that does not fit becomes no label."""
  with jax.enable_x64(True):
    wide = 1 + (2**32 if dtype != "uint32" else 2**31)
    labels = np.array([1, wide, 1, 1], dtype)
    support = jax.jit(ranger.labels.label_support)
    np.testing.assert_array_equal(support(line(), labels), [1, 0, 1, 1])
    loss = jax.jit(ranger.labels.forward_corrected_loss)
    found = loss(np.zeros([4, 2]), labels, np.eye(2))
    np.testing.assert_allclose(found, np.log(2) * np.array([1, 0, 1, 1]), rtol=1e-6)


def test_missing_and_odd_labels_are_none_when_traced():
  neighbors, beliefs = line(), np.full([4, 2], 0.5, np.float32)
  labels = jnp.array([0, -7, 5, 0])
  weights = jax.jit(
    lambda labels: ranger.neighbors.weigh(neighbors, labels=labels, beliefs=beliefs)
  )(labels).weights
  np.testing.assert_array_equal(np.asarray(weights)[1:3], np.zeros([2, 3]))
  np.testing.assert_allclose(weights[0], [0, 0, 0.25 / 3], rtol=1e-6)


@pytest.mark.guarantees(
  "labels.label_support", "Neighbors without a label do not lower it"
)
@pytest.mark.parametrize(
  "labels", [[0, -1, 0, 1], ["a", None, "a", "b"], np.array([7, -1, 7, 3], np.int8)]
)
def test_unlabeled_neighbors_do_not_vote(labels):
  support = ranger.labels.label_support(line(), labels)
  np.testing.assert_allclose(support, [0.5, 0, 0.5, 0], rtol=1e-6)

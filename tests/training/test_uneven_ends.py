"""Small data and uneven ends: early windows, tokens, batches without rows."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from tests.helpers import close_to_largest
from tests.helpers import same

BATCH_SIZE = 16
_RNG = np.random.default_rng(0)
X = _RNG.standard_normal([77, 5]).astype(np.float32)
Y = _RNG.standard_normal([77]).astype(np.float32)
WAYS = {
  "one device": {},
  "on emission": {"mesh": AxisType.Auto, "reduce": "on_emission"},
  "mesh": {"mesh": AxisType.Auto},
  "explicit mesh": {"mesh": AxisType.Explicit, "num_micro_batches": 2},
  "split state": {"mesh": AxisType.Auto, "shard_state": True},
  "compiler": {"mesh": AxisType.Auto, "partition": "jit"},
}
each_way = pytest.mark.parametrize("way", WAYS)


def start():
  normal = np.random.default_rng(1).standard_normal
  return {"w": normal([5, 8]).astype(np.float32), "out": np.ones(8, np.float32)}


def outputs(params, x):
  return jnp.tanh(x @ params["w"]) @ params["out"]


def losses(params, batch):
  return (outputs(params, batch["x"]) - batch["y"]) ** 2


@functools.cache
def build(way, optimizer, loss=losses, **options):
  options = {**WAYS[way], **options}
  if "mesh" in options:
    kind = options["mesh"]
    options["mesh"] = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  return ranger.train_step(loss, optimizer, **options)


@functools.cache
def descent(optimizer, mean_loss):
  @jax.jit
  def update(params, state, batch):
    grads = jax.grad(mean_loss)(params, batch)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return update


def descend(optimizer, mean_loss, batches):
  """One step of a plain loop on each batch."""
  update, params = descent(optimizer, mean_loss), start()
  state = optimizer.init(params)
  for batch in batches:
    params, state = update(params, state, batch)
  return params


# Windows that close early


def rows_of(*rows):
  return {"x": X[slice(*rows)], "y": Y[slice(*rows)]}


# Two epochs of 77 examples in batches of 16: five calls, the last of 13 examples. In
# windows of three, the second one of an epoch has two calls.
EPOCH = [rows_of(16 * i, min(16 * i + 16, 77)) for i in range(5)]
WINDOWS = [rows_of(0, 48), rows_of(48, 77)]


def mean(params, batch):
  return losses(params, batch).mean()


@functools.cache
def optimizers(learning_rate):
  """One without and one with a window of three calls."""
  inner = optax.sgd(learning_rate, momentum=0.9)
  return inner, ranger.accumulate(inner, 3)


@pytest.mark.guarantees(
  "train_step", "last=True closes an open window even if the batch has no"
)
@each_way
@pytest.mark.parametrize("end", ["last batch", "empty batch", "bad batch"])
def test_an_epoch_that_ends_in_mid_window(way, end):
  """Its last window is one batch of the examples that it has."""
  inner, accumulated = optimizers(0.05)
  update = build(way, accumulated, batch_size=BATCH_SIZE)
  params = start()
  state = update.init(params)
  for _ in range(2):
    for call, batch in enumerate(EPOCH):
      last = call == 4 and end == "last batch"
      params, state, _ = update(params, state, batch, last=last, weight=len(batch["x"]))
    # Or the loop learns too late that there is nothing left.
    bad = {
      "empty batch": rows_of(0, 0),
      "bad batch": {"x": X[:16] * np.nan, "y": Y[:16]},
    }
    if end in bad:
      params, state, metrics = update(params, state, bad[end], last=True, weight=16)
      assert float(metrics["weight"]) == 0
    assert int(state.optimizer.mini_step) == 0
  assert int(state.optimizer.gradient_step) == 4
  # A window that is closed already stays so, and its step is not taken again.
  before = jax.tree.map(np.asarray, (params, state.optimizer))
  params, state, _ = update(params, state, rows_of(0, 0), last=True, weight=16)
  same((params, state.optimizer), before)
  close_to_largest(params, descend(inner, mean, 2 * WINDOWS), rtol=1e-6)


@pytest.mark.parametrize("outside", [optax.identity(), ranger.smooth_by_ema(0.9)])
def test_steps_outside_of_a_window_move_when_it_closes_only(outside):
  """Also those with states as large as the parameters, and weight decay."""
  decay = optax.add_decayed_weights(-0.1)
  tx = optax.chain(ranger.accumulate(optax.sgd(1.0), 3), decay, outside)
  update = build("one device", tx, batch_size=BATCH_SIZE)
  params = start()
  state = update.init(params)
  params, state, _ = update(params, state, EPOCH[0])
  for moves in (True, False):
    before = jax.tree.map(np.asarray, (params, state.optimizer))
    params, state, _ = update(params, state, rows_of(0, 0), last=True)
    if moves:
      assert int(optax.tree.get(state, "gradient_step")) == 1
      assert np.abs(params["w"] - before[0]["w"]).max() > 0.01
    else:
      same((params, state.optimizer), before)


# Sequences of uneven lengths


LONGEST = 7
LENGTHS = np.array([7, 1, 3, 0, 2, 7, 5, 1, 1, 4, 6, 2, 1, 3, 1, 2, 1], np.int32)
TOKENS = LENGTHS.astype(np.float32)
SEQUENCES = {
  "x": _RNG.standard_normal([len(LENGTHS), LONGEST, 5]).astype(np.float32),
  "y": _RNG.standard_normal([len(LENGTHS), LONGEST]).astype(np.float32),
  "length": LENGTHS,
}


def token_losses(params, batch):
  """Of all positions, zero behind the end of a sequence; and its tokens."""
  errors = (outputs(params, batch["x"]) - batch["y"]) ** 2
  there = jnp.arange(LONGEST)[None] < batch["length"][:, None]
  return jnp.where(there, errors, 0), batch["length"].astype(jnp.float32)


def mean_over_tokens(params, batch):
  losses, tokens = token_losses(params, batch)
  return losses.sum() / tokens.sum()


value_and_gradient = jax.jit(jax.value_and_grad(mean_over_tokens))


def mean_of_each(params, batch):
  losses, tokens = token_losses(params, batch)
  return losses.sum(axis=1) / jnp.maximum(tokens, 1)


def cut(*ends):
  """Micro-batches of sequences that end there."""
  firsts = (0, *ends)
  pairs = zip(firsts, (*ends, len(LENGTHS)), strict=True)
  return [{name: a[i:j] for name, a in SEQUENCES.items()} for i, j in pairs]


def test_the_mean_over_tokens_is_not_that_over_sequences():
  """If it were, the tests below could not fail."""
  of_each = lambda params, batch: mean_of_each(params, batch).mean()
  _, by_token = value_and_gradient(start(), SEQUENCES)
  by_sequence = jax.jit(jax.grad(of_each))(start(), SEQUENCES)
  assert np.abs(by_token["w"] - by_sequence["w"]).max() > 0.01


@pytest.mark.parametrize("ends", [(4, 5, 13), (3, 4, 16)])
def test_accumulate_is_exact_over_tokens(ends):
  """The second micro-batch is of one sequence, which may have no tokens."""
  step = ranger.accumulate(optax.sgd(1.0), len(ends) + 1)
  update = jax.jit(step.update)
  params = start()
  state = step.init(params)
  for part in cut(*ends):
    _, grads = value_and_gradient(params, part)
    updates, state = update(grads, state, weight=part["length"].sum())
  grads = jax.tree.map(np.negative, jax.device_get(updates))
  close_to_largest(grads, value_and_gradient(params, SEQUENCES)[1], rtol=2e-6)


@pytest.mark.parametrize("num_micro_batches", [2, 5, 17])
def test_micro_batched_is_exact_over_tokens(num_micro_batches):
  grad_fn = ranger.micro_batched(
    jax.value_and_grad(mean_over_tokens),
    num_micro_batches,
    weigh=lambda part: part["length"].sum(),
  )
  value, grads, report = jax.jit(grad_fn)(start(), SEQUENCES)
  expected = value_and_gradient(start(), SEQUENCES)
  close_to_largest((value, grads), expected, rtol=2e-6)
  assert float(report.weight) == TOKENS.sum()


@each_way
def test_train_step_is_exact_over_tokens(way):
  """By weights of the sequences, in one call and in a window of uneven calls."""
  optimizer, accumulated = optimizers(0.1)
  expected = descend(optimizer, mean_over_tokens, [SEQUENCES] * 2)
  # The parts of a window are of as many rows, or are padded to as many.
  for tx, calls in ((optimizer, cut()), (accumulated, cut(8, 9))):
    if tx is optimizer and way == "on emission":
      continue
    update = build(way, tx, mean_of_each, donate=False)
    params = start()
    state = update.init(params)
    for _ in range(2):
      for part in calls:
        weights = part["length"].astype(np.float32)
        params, state, metrics = update(params, state, part, member_weights=weights)
        assert float(metrics["weight"]) == weights.sum()
        if weights.sum():
          loss = metrics["loss"]
    close_to_largest(params, expected, rtol=2e-6)
    assert np.isfinite(loss)

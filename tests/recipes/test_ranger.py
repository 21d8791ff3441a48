"""The recipes, and the main job in small."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from tests.helpers import close
from tests.laws import registry


def run(tx, calls=12):
  @jax.jit
  def step(gradient, state, params):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  params = registry.params()
  state = tx.init(params)
  case = next(case for case in registry.CASES if case.factory == "ranger")
  for call in range(calls):
    params, state = step(registry.gradients(case, call, params), state, params)
  return params, state


# Every option that is off by default.
ALL = {
  "ema_decay": 0.9,
  "clip_norm": 1.0,
  "skip_spikes": 6.0,
  "weight_decay": 0.1,
  "weight_decay_mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
}


@pytest.mark.guarantees(
  "ranger", "Without acceleration, accumulation and smoothing it is"
)
def test_plain_ranger_is_nesterov_sgd():
  params, _ = run(ranger.ranger(0.01, acceleration=1.0, hyper_rate=0.0))
  expected, _ = run(optax.sgd(0.01, momentum=0.9, nesterov=True))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
    params,
    expected,
  )


def test_ranger_reads_as_its_steps_in_order():
  tx = ranger.ranger(0.1, num_examples=3, num_classes=2, **ALL)
  state = tx.init(registry.params())
  assert list(state) == ["predictions", "accumulate"]
  inner = state["accumulate"].inner_state
  names = ["guard", "clip", "ngs", "weight_decay", "learning_rate", "ema"]
  assert list(inner) == names


def test_its_factor_is_that_of_scale_by_ngs():
  tx, step, params = ranger.ranger(0.1), ranger.scale_by_ngs(), jnp.zeros([5])
  state, other, factors = tx.init(params), step.init(params), []
  for size in (1.0, 1.0, -0.01, -1.0, 1.0):
    gradient = np.full([5], size, np.float32)
    _, state = jax.jit(tx.update)(gradient, state, params)
    _, other = jax.jit(step.update)(gradient, other)
    factors.append(float(optax.tree.get(other, "acceleration")))
    found = optax.tree.get(state, "acceleration")
    np.testing.assert_allclose(found, factors[-1], rtol=1e-5)
  assert factors[1] > factors[2] > factors[3]


def test_what_is_off_holds_no_memory():
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  params = registry.params()
  off = size(ranger.ranger(0.1).init(params))
  on = size(ranger.ranger(0.1, ema_decay=0.9).init(params))
  assert on == off + size(params) + 3  # And three scalars.


def test_schedule_counts_optimizer_steps():
  schedule = lambda count: jnp.float32(0.1) / (1 + count.astype(jnp.float32))
  tx = ranger.ranger(schedule, momentum=0.0, acceleration=1.0, hyper_rate=0.0, every=2)
  params = jnp.zeros([1])
  state, moves, update = tx.init(params), [], jax.jit(tx.update)
  for _ in range(4):
    updates, state = update(np.ones([1], np.float32), state, params)
    moves.append(float(updates[0]))
  np.testing.assert_allclose(moves, [0, -0.1, 0, -0.05], rtol=1e-6)


def test_weight_decay_is_decoupled():
  tx = ranger.ranger(0.1, weight_decay=0.5, momentum=0.0)
  params = np.full([2], 4, np.float32)
  updates, _ = jax.jit(tx.update)(0 * params, tx.init(params), params)
  np.testing.assert_allclose(updates, np.full(2, -0.2), rtol=1e-6)


def test_checkpoint_survives_the_insertion_of_a_step():
  """State is addressed by name: what was there stays where it was."""
  params = registry.params()
  _, old = run(ranger.ranger(0.01))
  new = ranger.ranger(0.01, ema_decay=0.9).init(params)
  kept = old["accumulate"]
  inner = {**new["accumulate"].inner_state, **kept.inner_state}
  template = new["accumulate"].inner_state
  restored = kept._replace(inner_state=type(template)(inner))
  state = {**new, "accumulate": restored}
  tx = ranger.ranger(0.01, ema_decay=0.9)
  updates, _ = tx.update(params, type(new)(state), params)
  expected, _ = ranger.ranger(0.01).update(params, old, params)
  jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.guarantees(
  "ranger", "An option that is off has no entry in the state, and does"
)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("off", ALL)
def test_names_do_not_depend_on_other_options(off, every):
  """Without one option, the state is that of all but for the option's own part."""
  own = {"ema_decay": "ema", "clip_norm": "clip", "skip_spikes": "guard"}
  params = registry.params()
  inner = lambda options: (
    ranger.ranger(0.1, every=every, **options).init(params)["accumulate"].inner_state
  )
  whole = inner(ALL)
  part = inner({name: value for name, value in ALL.items() if name != off})
  whole.pop(own.get(off), None)
  assert list(part) == list(whole)
  jax.tree.map(np.testing.assert_array_equal, list(part.values()), list(whole.values()))


def test_a_checkpoint_survives_a_guard():
  """The state of a run without it goes on with it, by name."""
  params = registry.params()
  options = {"acceleration": 1.0, "every": 2}
  _, old = run(ranger.ranger(0.01, **options), calls=6)
  tx = ranger.ranger(0.01, skip_spikes=6.0, **options)
  new = tx.init(params)
  inner = new["accumulate"].inner_state
  inner.update(old["accumulate"].inner_state)
  new["accumulate"] = old["accumulate"]._replace(inner_state=inner)
  guarded, plain = (
    jax.jit(each.update) for each in (tx, ranger.ranger(0.01, **options))
  )
  for _ in range(2):
    updates, new = guarded(params, new, params)
    expected, old = plain(params, old, params)
  # XLA may fuse them otherwise, and round the last digit otherwise.
  close(updates, expected, rtol=1e-6)
  assert int(new["accumulate"].inner_state["guard"].count) == 1


@pytest.mark.few(1)
@pytest.mark.parametrize("mask", ["tree", "function", "prefix"])
def test_weight_decay_may_be_masked(mask):
  ones = lambda *shape: np.ones(shape, np.float32)
  params = {"w": ones(2, 2), "norm": {"scale": ones(2), "b": ones(1)}}
  trees = {
    "tree": {"w": True, "norm": {"scale": False, "b": False}},
    "prefix": {"w": True, "norm": False},
    "function": lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
  }
  tx = ranger.ranger(
    0.1, weight_decay=0.5, weight_decay_mask=trees[mask], momentum=0.0, every=2
  )
  state, zeros = tx.init(params), jax.tree.map(np.zeros_like, params)
  update = jax.jit(tx.update)
  for _ in range(2):
    updates, state = update(zeros, state, params)
  updates = jax.device_get(updates)
  np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)
  assert not any(leaf.any() for leaf in jax.tree.leaves(updates["norm"]))


def test_a_gradient_of_infinite_norm_is_skipped_not_clipped():
  """Divided by its norm it would be zero, and count as a step."""
  tx, params = ranger.ranger(0.1, clip_norm=1.0), np.ones(3, np.float32)
  huge = np.float32(1e30) * params
  _, state = jax.jit(tx.update)(huge, tx.init(params), params)
  assert int(state["accumulate"].inner_state["ngs"].num_skipped) == 1


@pytest.mark.few(2)
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("clip_norm", [0.5, 3.0, 100.0])
def test_the_accumulated_gradient_is_clipped(every, clip_norm):
  """Not the micro-batches: large ones that cancel out are not clipped at all."""
  tx = ranger.ranger(
    1.0,
    momentum=0.0,
    acceleration=1.0,
    hyper_rate=0.0,
    clip_norm=clip_norm,
    every=every,
  )
  rng = np.random.default_rng(0)
  draw = lambda: {"a": rng.standard_normal([3, 2]), "b": 9 * rng.standard_normal([4])}
  gradients = [jax.tree.map(np.float32, draw()) for _ in range(every)]
  params = jax.tree.map(np.zeros_like, gradients[0])
  state, update = tx.init(params), jax.jit(tx.update)
  for gradient in gradients:
    updates, state = update(gradient, state, params)
  mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *gradients)
  norm = np.sqrt(sum((leaf**2).sum() for leaf in mean.values()))
  for name, leaf in mean.items():
    expected = -leaf * min(1, clip_norm / norm)
    np.testing.assert_allclose(updates[name], expected, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 300.0), ("bfloat16", 1e5)])
def test_half_precision_is_clipped_by_its_norm(dtype, size):
  """Whose square is infinite in float16, and has three digits in bfloat16."""
  tx = ranger.ranger(1.0, momentum=0.0, acceleration=1.0, hyper_rate=0.0, clip_norm=2.0)
  gradient = jnp.full([1000], size, dtype)
  updates, _ = jax.jit(tx.update)(gradient, tx.init(gradient), gradient)
  found = np.asarray(updates, np.float64)
  np.testing.assert_allclose(found, -2 / 1000**0.5, rtol=2.0**-8)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("bad", [1e5, np.inf, 1e25])
def test_spikes_are_skipped(every, bad):
  """At once, in a window as well; what is not finite is left out of it."""
  tx = ranger.ranger(0.1, skip_spikes=6.0, every=every)
  rng, params = np.random.default_rng(0), jnp.ones([8])
  state, update = tx.init(params), jax.jit(tx.update)
  for call in range(30 * every):
    gradient = rng.standard_normal([8], np.float32)
    if call == 29 * every:
      gradient = gradient * np.float32(bad)
    updates, state = update(gradient, state, params)
  assert bool(updates.any()) == (every > 1 and not np.isfinite(bad))
  guard = state["accumulate"].inner_state["guard"]
  left_out = int(state["accumulate"].num_left_out) + int(guard.num_skipped)
  assert left_out == 1
  assert np.isfinite(params + updates).all()


@pytest.mark.parametrize("warmup", [None, 0, 3])
@pytest.mark.parametrize("every", [1, 4])
def test_the_average_warms_up(every, warmup):
  """After 100 steps it follows the parameters, which a plain one of .99 does not."""
  given = {} if warmup is None else {"ema_warmup": warmup}
  tx = ranger.ranger(
    0.1, ema_decay=0.99, momentum=0.0, acceleration=1.0, hyper_rate=0.0,
    every=every, **given,
  )  # fmt: skip
  params = jnp.ones([3])
  state, ema = tx.init(params), np.ones(3)

  @jax.jit
  def flow(params, state):
    """Gradient flow to zero."""
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

  for n in range(100):
    for _ in range(every):
      params, state = flow(params, state)
    w = 10 if warmup is None else warmup
    beta = min(0.99, (1 + n) / (w + n)) if w + n else 0.99
    ema = beta * ema + (1 - beta) * np.asarray(params)
  np.testing.assert_allclose(ranger.eval_params(state, params), ema, rtol=1e-5)
  assert (ema[0] > 0.3) == (warmup == 0)


def test_smooth_by_ema_alone_is_plain():
  step, params = ranger.smooth_by_ema(0.99), jnp.ones([2])
  _, state = step.update(params, step.init(params), params)
  np.testing.assert_allclose(ranger.eval_params(state, 0 * params), 0.99, rtol=1e-6)


@pytest.mark.slow
def test_main_job_in_small(tmp_path):
  """The demo's whole path, on few epochs; `make demo` shows the figures."""
  script = pathlib.Path(__file__).parents[2] / "examples" / "noisy_labels.py"
  arguments = ["--noise", "0.4", "--seeds", "1", "--epochs", "40"]
  done = subprocess.run(
    [sys.executable, script, *arguments, "--out", tmp_path],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / "noisy_labels.json").read_text())["results"]
  assert results["Ranger"][0] > 0.93
  assert results["Ranger"][0] > results["AdamW"][0]
  assert (tmp_path / "noisy_labels.png").read_bytes().startswith(b"\x89PNG")
  assert "Ranger" in done.stdout


@pytest.mark.guarantees(
  "ranger", "While learning_rate falls, the learned factor does not change"
)
def test_the_learned_factor_does_not_make_up_for_a_falling_rate():
  rate = optax.linear_schedule(0.1, 0.0, 60, 60)
  tx, params = ranger.ranger(rate, every=2), jnp.ones([3])
  state, update, factors = tx.init(params), jax.jit(tx.update), []
  for step in range(120):
    # Turning around now and then, so that the start ends.
    gradient = -params if step % 4 == 0 else params
    for _ in range(2):
      updates, state = update(gradient, state, params)
    factors.append(float(optax.tree.get(state, "acceleration")))
  assert len(set(factors[:60])) == 60
  assert len(set(factors[60:])) == 1
  assert abs(updates).max() < abs(0.1 / 60 * factors[-1] * 20)

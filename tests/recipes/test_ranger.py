"""The recipes, and the main job in small."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_ranger as ranger
from tests.laws import registry


def run(tx, calls=12):
  params = registry.params()
  state = tx.init(params)
  update = jax.jit(tx.update)
  for call in range(calls):
    case = next(case for case in registry.CASES if case.factory == "ranger")
    updates, state = update(registry.gradients(case, call, params), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def test_plain_ranger_is_nesterov_sgd():
  params, _ = run(ranger.ranger(0.01, acceleration=1.0, hyper_rate=0.0))
  expected, _ = run(optax.sgd(0.01, momentum=0.9, nesterov=True))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
    params,
    expected,
  )


def test_ranger_reads_as_its_steps_in_order():
  tx = ranger.ranger(0.1, ema_decay=0.9, num_examples=3, num_classes=2)
  state = tx.init(registry.params())
  assert list(state) == ["predictions", "accumulate"]
  inner = state["accumulate"].inner_state
  assert list(inner) == ["ngs", "weight_decay", "learning_rate", "ema"]


def test_what_is_off_holds_no_memory():
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  params = registry.params()
  off = size(ranger.ranger(0.1).init(params))
  on = size(ranger.ranger(0.1, ema_decay=0.9).init(params))
  assert on == off + size(params) + 3  # And three scalars.


def test_schedule_counts_optimizer_steps():
  rates = []
  schedule = lambda count: rates.append(1) or jnp.float32(0.1) / (1 + count.astype(
    jnp.float32
  ))  # fmt: skip
  tx = ranger.ranger(schedule, momentum=0.0, acceleration=1.0, hyper_rate=0.0, every=2)
  params = jnp.zeros([1])
  state, moves = tx.init(params), []
  for _ in range(4):
    updates, state = tx.update(jnp.ones([1]), state, params)
    moves.append(float(updates[0]))
  np.testing.assert_allclose(moves, [0, -0.1, 0, -0.05], rtol=1e-6)


def test_weight_decay_is_decoupled():
  tx = ranger.ranger(0.1, weight_decay=0.5, momentum=0.0)
  params = jnp.full([2], 4.0)
  updates, _ = tx.update(jnp.zeros([2]), tx.init(params), params)
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


def test_main_job_in_small(tmp_path):
  """The demo's whole path, on few epochs; `make demo` shows the figures."""
  script = pathlib.Path(__file__).parents[2] / "examples" / "noisy_labels.py"
  table, picture = tmp_path / "table.json", tmp_path / "picture.png"
  arguments = ["--noise", "0.4", "--seeds", "1", "--epochs", "40"]
  done = subprocess.run(
    [sys.executable, script, *arguments, "--out", picture, "--json", table],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  results = json.loads(table.read_text())
  keys = {"last_mean", "last_std", "best_mean", "seconds_per_step", "curves"}
  for method in ("plain", "ranger"):
    assert set(results[method]) == keys
  assert results["ranger"]["last_mean"] > 0.93
  assert results["ranger"]["last_mean"] > results["plain"]["last_mean"]
  assert picture.read_bytes().startswith(b"\x89PNG")
  assert "Ranger" in done.stdout

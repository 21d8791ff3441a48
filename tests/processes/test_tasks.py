"""Tasks over two processes, and data of which one has less."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import close
from tests.helpers import close_to_largest
from tests.helpers import run_processes
from tests.processes import tasks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes of tasks")]


@pytest.fixture(scope="module")
def two_processes():
  first, second = run_processes("tests.processes.tasks", [2, 2], timeout=200)
  assert first == second
  return first


def test_two_processes_equal_one(two_processes):
  """Also with the optimizer's state in parts; each process gives its own rows."""
  expected = np.array(tasks.train(shard_state=False))
  for shard_state in ("False", "True"):
    close(np.array(two_processes[shard_state]), expected, rtol=1e-4, atol=1e-5)
  assert "batch['border'] has 3 rows" in two_processes["refused"]


def on_whole_windows():
  """A plain loop, whose batches are the examples of all processes in a window."""
  parts = [*zip(*tasks.uneven_calls(), strict=True)]
  params = {"w": jnp.linspace(-1.0, 1.0, 20).reshape(5, 4)}
  inner = optax.sgd(0.3, momentum=0.9)
  state = inner.init(params)
  for window in (parts[:3], parts[3:]):
    calls = [one for both in window for one in both]
    x, weights = map(np.concatenate, zip(*calls, strict=True))
    loss = lambda params, x=x, weights=weights: (
      (weights * tasks.lengths(params, x)).sum() / weights.sum()
    )
    updates, state = inner.update(jax.grad(loss)(params), state, params)
    params = optax.apply_updates(params, updates)
  return params["w"]


def test_the_data_of_one_process_end_first(two_processes):
  """It goes on with no rows, or with weights of zero; the end closes a window."""
  expected = on_whole_windows()
  close_to_largest(
    np.array(tasks.train_to_uneven_ends("every_call", "")), expected, 1e-6
  )
  for way, found in zip(tasks.WAYS, two_processes["uneven"], strict=True):
    print(way)
    close_to_largest(np.array(found), expected, 1e-6)

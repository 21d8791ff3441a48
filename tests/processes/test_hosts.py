"""Real processes: the same numbers on any, and what happens when one dies."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import multi_host
import optax_ranger as ranger
from tests.helpers import close_to_largest
from tests.helpers import free_port
from tests.processes import hosts

pytestmark = pytest.mark.xdist_group("hosts")
ROOT = pathlib.Path(__file__).parents[2]
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def start(folder, *arguments, devices=(4, 4), extra=((), ()), patience=300):
  """Starts one process for each entry of `devices`."""
  port = free_port()
  common = [*hosts.ARGUMENTS, "--port", port, "--processes", str(len(devices))]
  common += ["--patience", str(patience), "--save-every", str(hosts.SAVED_AT)]
  processes = []
  for i, count in enumerate(devices):
    own = ["--process", str(i), "--devices", str(count), *extra[i]]
    results = folder / f"{i}.npz"
    with (folder / f"{i}.out").open("w") as out, (folder / f"{i}.err").open("w") as err:
      program = [sys.executable, "-m", "tests.processes.hosts", "--results", results]
      processes.append(
        subprocess.Popen(
          [*program, *common, *own, *arguments],
          cwd=ROOT,
          env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST},
          stdout=out,
          stderr=err,
        )
      )
  return processes


def finish(folder, processes):
  """Waits for all, and returns the arrays and the collectives of each."""
  try:
    for i, process in enumerate(processes):
      code = process.wait(timeout=300)
      assert code == 0, (folder / f"{i}.err").read_text()[-3000:]
  finally:
    end(processes)
  arrays, kinds = [], []
  for i in range(len(processes)):
    with np.load(folder / f"{i}.npz") as saved:
      arrays.append([saved[name] for name in saved.files])
    kinds.append(json.loads((folder / f"{i}.json").read_text()))
  return arrays, kinds


def end(processes):
  for process in processes:
    process.kill()
    process.wait()


def bit_for_bit(leaves, others):
  for leaf, other in zip(leaves, others, strict=True):
    np.testing.assert_array_equal(leaf, other)


def mesh_of(num_devices):
  devices = jax.devices()[:num_devices]
  return jax.make_mesh((num_devices,), ("data",), devices=devices)


def train(num_devices, *arguments):
  """One process, this one; its parameters."""
  options = multi_host.parse([*hosts.ARGUMENTS, *arguments])
  params, _, _ = multi_host.train(options, mesh_of(num_devices))
  return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
  """The parameters of eight devices, and the run's checkpoints."""
  folder = tmp_path_factory.mktemp("one_process")
  save = ["--save-every", str(hosts.SAVED_AT), "--checkpoints", str(folder)]
  params = train(8, *save)
  assert (folder / str(hosts.SAVED_AT)).exists()
  return params, folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
  folder = tmp_path_factory.mktemp("two_processes")
  return finish(folder, start(folder))


@pytest.mark.slow
@pytest.mark.guarantees(
  "train_step", "Several processes have the same parameters, bit for bit"
)
def test_two_processes_equal_one(one_process, two_processes):
  """Accumulation, smoothing, predictions, and one process without rows at the end."""
  (first, second), kinds = two_processes
  bit_for_bit(first, second)
  params, _ = one_process
  close_to_largest(first[: len(params)], params, rtol=5e-7)
  assert np.abs(params[0]).max() > 0.01  # a bias, zero at the start
  assert kinds == [["all-gather", "all-reduce"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_resumes_on_fewer_devices(num_devices, one_process):
  params, folder = one_process
  close_to_largest(
    train(num_devices, "--checkpoints", str(folder), "--resume"), params, rtol=5e-7
  )


def window_of_three(mesh, reduce):
  tx = ranger.accumulate(optax.sgd(0.1, momentum=0.9), 3)
  losses = lambda params, batch: (
    (jnp.tanh(batch["x"] @ params["w"]).sum(axis=1) - batch["y"]) ** 2
  )
  return ranger.train_step(losses, tx, mesh=mesh, reduce=reduce)


def calls(update, params, state, first, last):
  """Calls on batches of eight, and what a checkpoint would hold after them."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal([8, 8, 5]).astype(np.float32)
  for i in range(first, last):
    batch = {"x": x[i], "y": x[i, :, 0]}
    params, state, _ = jax.block_until_ready(update(params, state, batch))
  return jax.tree.map(np.asarray, (params, state))


@pytest.mark.guarantees(
  "train_step", "A run can continue on another number of devices, also in"
)
def test_open_windows_move_to_other_devices():
  """From the parts of eight devices to those of others, and to one sum, and back."""
  ways = [
    (mesh_of(8), "on_emission"),
    (mesh_of(4), "on_emission"),
    (mesh_of(2), "every_call"),
    (None, "every_call"),
    (mesh_of(4), "on_emission"),
  ]
  single = window_of_three(None, "every_call")
  expected = {"w": np.random.default_rng(1).standard_normal([5, 4]).astype("float32")}
  params, expected_state = expected, single.init(expected)
  state = window_of_three(*ways[0]).init(params)
  for call, way in enumerate(ways):
    update = window_of_three(*way)
    params, state = calls(update, params, state, call, call + 1)
    expected, expected_state = calls(single, expected, expected_state, call, call + 1)
    close_to_largest([params["w"]], [expected["w"]], rtol=5e-7)
    assert int(state.optimizer.mini_step) == (call + 1) % 3
    total, apart = state.optimizer.accumulated["w"], way[1] == "on_emission"
    assert total.shape == ((way[0].size, 5, 4) if apart else (5, 4))
    total = total.sum(axis=0) if apart else total
    np.testing.assert_allclose(
      total, expected_state.optimizer.accumulated["w"], rtol=1e-5, atol=1e-6
    )
  wrong = state.optimizer._replace(accumulated={"w": np.zeros([4, 4, 5], "float32")})
  with pytest.raises(ValueError, match=r"accumulated\['w'\] must have .* \[5, 4\]"):
    calls(update, params, state._replace(optimizer=wrong), 5, 6)
  none = state.optimizer._replace(accumulated=())
  with pytest.raises(ValueError, match="must have 1 leaves in its open windows"):
    calls(update, params, state._replace(optimizer=none), 5, 6)


def survivor(folder, processes, victim):
  """How the other process ended, after how many seconds, and what it said."""
  try:
    os.waitid(os.P_PID, processes[victim].pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    died = time.monotonic()
    code = processes[1 - victim].wait(timeout=60)
    seconds = time.monotonic() - died
  finally:
    end(processes)
  print(f"process {victim} is gone: the other ended with {code}, {seconds:.2f} s later")
  return code, seconds, (folder / f"{1 - victim}.err").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("victim", "saved", "reduce"),
  [(0, False, "every_call"), (1, True, "every_call"), (1, True, "on_emission")],
  ids=["0-while-saving", "1-saved", "1-saved-in-parts"],
)
def test_a_process_that_is_killed(
  victim, saved, reduce, one_process, two_processes, tmp_path, monkeypatch
):
  """In mid-epoch and mid-window; the other ends, and both start again.

  So does one process, with fewer devices.
  """
  checkpoints = tmp_path / "checkpoints"
  save = ["--checkpoints", str(checkpoints), "--reduce", reduce]
  extra = [[], []]
  extra[victim] = ["--die-at", str(hosts.SAVED_AT + saved)]
  if saved:
    extra[victim] += ["--once-there", str(checkpoints / str(hosts.SAVED_AT))]
  processes = start(tmp_path, *save, extra=extra)
  code, seconds, errors = survivor(tmp_path, processes, victim)
  # Who polls the first process may hear of it from JAX, which ends the program.
  assert code == 1 or (victim == 0 and code == -signal.SIGABRT), errors[-3000:]
  assert "another one is gone" in errors or "another task died" in errors
  assert seconds < 10

  expected, _ = one_process
  if saved:
    copy = shutil.copytree(checkpoints, tmp_path / "copy")
    fewer = ["--checkpoints", str(copy), "--reduce", reduce, "--resume"]
    begun, batch_ids = [], multi_host.batch_ids
    record = lambda *args: (begun.append(args[0]), batch_ids(*args))[1]
    monkeypatch.setattr(multi_host, "batch_ids", record)
    close_to_largest(train(4, *fewer), expected, rtol=5e-7)
    assert begun[0] == hosts.SAVED_AT

  began = time.monotonic()
  arrays, _ = finish(tmp_path, start(tmp_path, *save, "--resume"))
  print(f"started again and finished after {time.monotonic() - began:.2f} s")
  from_the_start = " 0/5 [" in (tmp_path / "0.err").read_text()
  assert not (saved and from_the_start)  # as the progress bar says
  for leaves, undisturbed in zip(arrays, two_processes[0], strict=True):
    if reduce == "every_call":
      bit_for_bit(leaves, undisturbed)
    close_to_largest(leaves[: len(expected)], expected, rtol=5e-7)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_silent(victim, tmp_path):
  """Its connections stay open: JAX misses its heartbeat and ends the other."""
  patience = 20
  extra = [[], []]
  extra[victim] = ["--die-at", "1", "--signal", "SIGSTOP"]
  processes = start(tmp_path, extra=extra, patience=patience)
  code, seconds, errors = survivor(tmp_path, processes, victim)
  assert code == -signal.SIGABRT, errors[-3000:]
  assert "JAX distributed service detected fatal errors" in errors
  assert seconds < patience + 5


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["every_call", "on_emission"])
def test_resumes_on_two_processes(reduce, one_process, tmp_path):
  """From eight devices of one process, in mid-window, to three of each of two."""
  params, _ = one_process
  save = ["--checkpoints", str(tmp_path / "checkpoints"), "--reduce", reduce]
  train(8, *save, "--save-every", str(hosts.SAVED_AT))
  processes = start(tmp_path, *save, "--resume", devices=(3, 3))
  (first, second), _ = finish(tmp_path, processes)
  bit_for_bit(first, second)
  close_to_largest(first[: len(params)], params, rtol=5e-7)


@pytest.mark.slow
def test_processes_may_share_rows(one_process, tmp_path):
  """Where another axis of the mesh lies across them, both give the same rows."""
  (first, second), _ = finish(tmp_path, start(tmp_path, "--share-rows"))
  bit_for_bit(first, second)
  params, _ = one_process
  close_to_largest(first[: len(params)], params, rtol=5e-7)

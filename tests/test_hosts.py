"""Real processes: the same numbers on any, and what happens when one dies."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from examples import multi_host
from tests import hosts

pytestmark = pytest.mark.xdist_group("hosts")
ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 10  # seconds until a process that is silent counts as dead
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def start(folder, *arguments, devices=(4, 4), extra=((), ())):
  """Starts one process for each entry of `devices`."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  common = [*hosts.ARGUMENTS, "--port", port, "--processes", str(len(devices))]
  common += ["--patience", str(PATIENCE), "--save-every", str(hosts.SAVED_AT)]
  processes = []
  for i, count in enumerate(devices):
    own = ["--process", str(i), "--devices", str(count), *extra[i]]
    results = folder / f"{i}.npz"
    with (folder / f"{i}.out").open("w") as out, (folder / f"{i}.err").open("w") as err:
      program = [sys.executable, "-m", "tests.hosts", "--results", results]
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
    for process in processes:
      process.kill()
  arrays, kinds = [], []
  for i in range(len(processes)):
    with np.load(folder / f"{i}.npz") as saved:
      arrays.append([saved[name] for name in saved.files])
    kinds.append(json.loads((folder / f"{i}.json").read_text()))
  return arrays, kinds


def bit_for_bit(leaves, others):
  for leaf, other in zip(leaves, others, strict=True):
    np.testing.assert_array_equal(leaf, other)


def close(leaves, others, rtol=1e-6):
  """Relative to the largest entry."""
  for leaf, other in zip(leaves, others, strict=True):
    np.testing.assert_allclose(leaf, other, rtol=0, atol=rtol * np.abs(other).max())


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


def test_two_processes_equal_one(one_process, two_processes):
  """Accumulation, smoothing, predictions, and rows that are not shared evenly."""
  (first, second), kinds = two_processes
  bit_for_bit(first, second)
  params, _ = one_process
  close(first[: len(params)], params)
  assert np.abs(params[0]).max() > 0.01  # a bias, zero at the start
  assert kinds == [["all-gather", "all-reduce"]] * 2


@pytest.mark.parametrize("num_devices", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_resumes_on_fewer_devices(num_devices, one_process):
  params, folder = one_process
  close(train(num_devices, "--checkpoints", str(folder), "--resume"), params)

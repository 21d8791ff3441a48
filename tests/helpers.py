"""What tests of several folders share."""

from collections.abc import Sequence
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import chex
import jax
import numpy as np
import optax

ROOT = pathlib.Path(__file__).parents[1]


def close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
  """Trees agree in structure and in values; an error names the leaf."""
  actual, expected = jax.device_get((actual, expected))
  chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def close_to_largest(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
  """Each leaf agrees relative to its largest entry."""
  actual, expected = jax.device_get((actual, expected))
  chex.assert_trees_all_equal_structs(actual, expected)
  for leaf, other in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    largest = np.abs(other).max(initial=0)
    np.testing.assert_allclose(leaf, other, rtol=rtol, atol=rtol * largest)


def same(actual: Any, expected: Any) -> None:
  """Trees are equal, bit for bit; NaN equals NaN."""
  actual, expected = jax.device_get((actual, expected))
  chex.assert_trees_all_equal(actual, expected)


def temporaries(step: Any, params: Any) -> int:
  """Bytes that a step and its update need beside parameters, state and gradients."""

  def advance(params, state, gradients):
    updates, state = step.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  state = step.init(params)
  compiled = (
    jax.jit(advance, donate_argnums=(0, 1)).lower(params, state, params).compile()
  )
  return compiled.memory_analysis().temp_size_in_bytes


def free_port() -> str:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return str(free.getsockname()[1])


def run_processes(module: str, devices: Sequence[int], timeout: float) -> list[Any]:
  """Runs `python -m module PORT I DEVICES...` in one process for each of `devices`.

  Returns:
    The last line that each has printed, read as JSON.
  """
  port = free_port()
  processes = [
    subprocess.Popen(
      [sys.executable, "-m", module, port, str(i), *map(str, devices)],
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(len(devices))
  ]
  try:
    outputs = [process.communicate(timeout=timeout) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, errors) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, errors[-3000:]
  return [json.loads(out.splitlines()[-1]) for out, _ in outputs]

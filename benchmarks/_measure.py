"""The harness: rivals take turns, so that a busy machine slows all of them alike."""

from collections.abc import Callable
from collections.abc import Sequence
import os
import pathlib
import platform
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

_COLUMNS = (
  "what",
  "rival",
  "ratio (quartiles)",
  "should reach",
  "ms, rival's ms",
  "temporaries, rival's",
)


class Contender(NamedTuple):
  """One of those that take turns.

  Attributes:
    turn: makes one call and returns what it computed.
    temporaries: bytes that the compiled call needs beside inputs and outputs.
  """

  turn: Callable[[], Any]
  temporaries: int


class Row(NamedTuple):
  """A line of the table; `seconds` and `rival_seconds` are samples, [rounds]."""

  what: str
  rival: str
  seconds: np.ndarray
  rival_seconds: np.ndarray
  reach: str = "-"
  temporaries: int | None = None
  rival_temporaries: int | None = None


def stateless(function: Callable[..., Any], *args: Any) -> Contender:
  """A function that is called with the same arguments every time."""
  compiled = jax.jit(function).lower(*args).compile()
  return Contender(lambda: compiled(*args), _temporaries(compiled))


def training(tx: Any, params: Any, gradients: Any, **extra_args: Any) -> Contender:
  """An optimizer's training loop, with its parameters and state donated."""

  def step(params, state, gradients, extra_args):
    updates, state = tx.update(gradients, state, params, **extra_args)
    return optax.apply_updates(params, updates), state

  return looping(step, params, tx.init(params), gradients, extra_args)


def looping(
  step: Callable[..., Any], params: Any, state: Any, *inputs: Any
) -> Contender:
  """A step from params and state to params and state, both of them donated."""
  # Donated buffers are gone after the call, so every loop gets its own.
  kept = jax.tree.map(jnp.copy, (params, state))
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*kept, *inputs).compile()

  def turn():
    nonlocal kept
    kept = compiled(*kept, *inputs)
    return kept

  return Contender(turn, _temporaries(compiled))


def measure(
  what: str, contenders: Sequence[Contender], rounds: int, calls: int = 1
) -> list[np.ndarray]:
  """Times every contender `calls` times a round, in turn, after one more round.

  Returns:
    Seconds of each contender's calls, arrays of [rounds, calls].
  """
  seconds = np.zeros([len(contenders), rounds + 1, calls])
  for round_ in tqdm.trange(rounds + 1, desc=what, leave=False):
    for i, contender in enumerate(contenders):
      for call in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(contender.turn())
        seconds[i, round_, call] = time.perf_counter() - start
  return list(seconds[:, 1:])


def copying(size: int) -> Contender:
  """A copy of `size` float32 numbers between buffers at hand."""
  source, target = jnp.ones([size]), jnp.zeros([size])
  # Into a donated buffer: fresh memory would be measured with its page faults.
  scale = jax.jit(lambda source, target: source * 2, donate_argnums=1, keep_unused=True)

  def turn():
    nonlocal target
    target = scale(source, target)
    return target

  return Contender(turn, 0)


def copy_rate(size: int = 32 * 2**20) -> float:
  """Bytes a second that a copy of float32 reads and writes together."""
  (seconds,) = measure("copy", [copying(size)], rounds=15)
  return 2 * 4 * size / float(np.median(seconds))


def machine() -> str:
  """What was measured on, and with which versions."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
  name = names[0] if names else platform.processor() or platform.machine()
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
  return (
    f"{name}, {cores or os.cpu_count()} cores; {jax.default_backend()}; Python"
    f" {platform.python_version()}, jax {jax.__version__}, optax {optax.__version__}"
  )


def table(rows: Sequence[Row]) -> str:
  """The rows as a Markdown table; ratios are of one round, then the median."""
  lines: list[str] = [" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS)]
  for row in rows:
    ratios = row.seconds / row.rival_seconds
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    ours, theirs = np.median(row.seconds), np.median(row.rival_seconds)
    cells = (
      row.what,
      row.rival,
      f"{middle:.3g} ({low:.3g} to {high:.3g})",
      row.reach,
      f"{1e3 * ours:.3g}, {1e3 * theirs:.3g}",
      f"{_megabytes(row.temporaries)}, {_megabytes(row.rival_temporaries)}",
    )
    lines.append(" | ".join(cells))
  return "\n".join(f"| {line} |" for line in lines)


def _megabytes(count: int | None) -> str:
  return "-" if count is None else f"{count / 1e6:.3g} MB"


def _temporaries(compiled: Any) -> int:
  return compiled.memory_analysis().temp_size_in_bytes

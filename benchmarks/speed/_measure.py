"""The harness: rivals take turns, so that a busy machine slows all of them alike."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
from importlib import metadata
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

from benchmarks import _table

# Whose versions are told, where they are installed.
_PACKAGES = ("jax", "optax", "flax", "faiss-cpu", "torch", "pytorch_optimizer")


class Contender(NamedTuple):
  """One of those that take turns.

  Attributes:
    turn: makes one call and returns what it computed.
    temporaries: bytes that the compiled call needs beside inputs and outputs.
  """

  turn: Callable[[], Any]
  temporaries: int


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    what: is measured.
    rival: what it is measured against.
    samples: seconds of every round, [rounds], or counts; empty if not measured.
    rival_samples: the rival's.
    reach: the ratio that is aimed at.
    temporaries: bytes beside inputs and outputs.
    rival_temporaries: the rival's.
    timed: samples are seconds.
  """

  what: str
  rival: str
  samples: np.ndarray
  rival_samples: np.ndarray
  reach: str = "-"
  temporaries: int | None = None
  rival_temporaries: int | None = None
  timed: bool = True


def normal(seed: int, leaves: int = 8, width: int = 2048) -> list[jax.Array]:
  """Square arrays of normal numbers, 32 M of them if nothing else is said."""
  keys = jax.random.split(jax.random.key(seed), leaves)
  return [jax.random.normal(key, [width, width]) for key in keys]


def millions(params: Any) -> str:
  """How many parameters there are, in words."""
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  return f"{count / 2**20:.3g} M parameters"


def stateless(function: Callable[..., Any], *args: Any) -> Contender:
  """A function that is called with the same arguments every time."""
  compiled = jax.jit(function).lower(*args).compile()
  return Contender(lambda: compiled(*args), temporaries(compiled))


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

  return Contender(turn, temporaries(compiled))


def measure(
  what: str,
  contenders: Sequence[Contender],
  rounds: int,
  calls: int = 1,
  *,
  apart: bool = False,
) -> list[np.ndarray]:
  """Times every contender `calls` times a round, in turn, after one more round.

  An accelerator gets ten times as many calls, and waits for the last one only: the
  time to start a call from Python would hide what it takes.

  Returns:
    Seconds of a call of each contender, arrays of [rounds]; with `apart`, of every
    call in turn, each waited for, arrays of [rounds, calls].
  """
  if not apart and jax.default_backend() != "cpu":
    calls *= 10
  seconds = np.zeros([len(contenders), rounds + 1, calls])
  for round_ in tqdm.trange(rounds + 1, desc=what, leave=False):
    for i, contender in enumerate(contenders):
      start = time.perf_counter()
      for call in range(calls):
        result = contender.turn()
        if apart or call == calls - 1:
          jax.block_until_ready(result)
          now = time.perf_counter()
          seconds[i, round_, call] = now - start
          start = now
        del result
  return [own if apart else own.sum(axis=1) / calls for own in seconds[:, 1:]]


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


def status(name: str) -> int:
  """Bytes that the system says this process has."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  (line,) = (line for line in lines if line.startswith(f"{name}:"))
  return int(line.split()[1]) * 1024


def cores() -> int:
  """How many cores this process may use."""
  allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
  return allowed or os.cpu_count() or 1


def machine() -> str:
  """What was measured on, and with which versions."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
  name = names[0] if names else platform.processor() or platform.machine()
  device = jax.devices()[0]
  if device.platform != "cpu":
    name = f"{device.device_kind} beside {name}"
  return (
    f"{name}, {cores()} cores; {jax.default_backend()}; Python"
    f" {platform.python_version()}, {', '.join(_versions())}"
  )


def _versions() -> Iterator[str]:
  for package in _PACKAGES:
    with contextlib.suppress(metadata.PackageNotFoundError):
      yield f"{package} {metadata.version(package)}"


def record(row: Row) -> dict[str, str]:
  """A row as it is written; the ratio is of one round, then the median."""
  words = (row.what, row.rival)
  sizes = ("" if size is None else f"{size:.0f}" for size in row[5:7])
  if not len(row.samples):
    ratio, times = [""] * 3, [""] * 2
  else:
    ratios = row.samples / row.rival_samples
    ratio = [f"{value:.4g}" for value in np.quantile(ratios, [0.5, 0.25, 0.75])]
    medians = np.median(row.samples), np.median(row.rival_samples)
    times = [f"{1e3 * value:.4g}" if row.timed else "" for value in medians]
  cells = (*words, *ratio, row.reach, *times, *sizes, machine())
  return dict(zip(_table.COLUMNS, cells, strict=True))


def table(rows: Sequence[Row]) -> str:
  """The rows as a Markdown table."""
  return _table.table([record(row) for row in rows])


def temporaries(compiled: Any) -> int:
  """Bytes that a compiled call needs beside its inputs and outputs."""
  return compiled.memory_analysis().temp_size_in_bytes

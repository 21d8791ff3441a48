"""Figures that need an accelerator: `benchmarks/gpu.sh`, or `--quick` on a CPU."""

import collections
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any
import xml.etree.ElementTree as ElementTree

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.speed import _measure
from benchmarks.speed import acceleration
from benchmarks.speed import accumulation
import optax_ranger as ranger

_ROOT = pathlib.Path(__file__).parents[2]
# Words of the laws that need one device only.
_LAWS = (
  "pure",
  "eager",
  "types",
  "agrees",
  "scan",
  "None",
  "masked",
  "size",
  "donation",
  "recovers",
  "test_nothing_poisons",
)


def law_rows(steps: str = "") -> list[_measure.Row]:
  """How many laws hold on this device, of those tried, in float32 and bfloat16."""
  what = f"laws on the device, {steps or 'all steps'}: held"
  if importlib.util.find_spec("pytest") is None:
    return [_measure.Row(what, "tried", np.zeros(0), np.zeros(0), "1")]
  platform = jax.default_backend()
  chosen = f"({' or '.join(_LAWS)}) and not float16 and not float64 and not complex64"
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
  # It warns where several workers run, and warnings are errors.
  command += ["-p", "no:benchmark"]
  if importlib.util.find_spec("xdist"):
    workers = min(_measure.cores(), 8)
    command += ["-n", str(workers), "--dist", "loadgroup"]
  command += ["-m", "not slow", "-k", f"{chosen} and ({steps})" if steps else chosen]
  environment = {
    **os.environ,
    "JAX_PLATFORMS": {"gpu": "cuda,cpu"}.get(platform, platform),
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  with tempfile.TemporaryDirectory() as folder:
    report = pathlib.Path(folder) / "laws.xml"
    command += [f"--junitxml={report}", "tests/laws/test_laws.py"]
    done = subprocess.run(command, cwd=_ROOT, env=environment, check=False)
    if not report.exists():
      raise RuntimeError(f"pytest ended with {done.returncode}, before any test.")
    suites = ElementTree.parse(report).getroot()
  counts: collections.Counter[str] = collections.Counter()
  for suite in suites:
    counts.update({name: int(suite.get(name, 0)) for name in _COUNTS})
  tried = counts["tests"] - counts["skipped"]
  held = tried - counts["failures"] - counts["errors"]
  if done.returncode not in (0, 1) or not tried:
    raise RuntimeError(f"pytest ended with {done.returncode}, and {tried} tests.")
  one = lambda count: np.asarray([float(count)])
  return [
    _measure.Row(
      f"{what} {held}", f"tried {tried}", one(held), one(tried), "1", timed=False
    )
  ]


_COUNTS = ("tests", "skipped", "failures", "errors")


def large_rows(width: int = 11_585, rounds: int = 8) -> list[_measure.Row]:
  """Steps 2 and 3 with a thousand million parameters, where memory allows."""
  limit = _memory_limit()
  # Parameters, two moments, the sum and Optax's temporaries, of both, and gradients.
  needed = 14 * 8 * width**2 * 4
  if limit is not None and needed > limit:
    name = f"accumulate(adamw), {8 * width**2 / 2**20:.3g} M parameters"
    return [_measure.Row(name, "optax.MultiSteps", np.zeros(0), np.zeros(0))]
  names = ("optax.MultiSteps",)
  return [
    *accumulation.micro_step_rows(rounds, width, names),
    *acceleration.one_step_rows(rounds, width),
  ]


def _memory_limit() -> int | None:
  stats = jax.local_devices()[0].memory_stats()
  return stats.get("bytes_limit") if stats else None


class _Block(nnx.Module):
  """Two convolutions with batch normalization, and a shortcut."""

  def __init__(self, inside: int, outside: int, stride: int, rngs: nnx.Rngs):
    conv = lambda i, size, stride: nnx.Conv(
      i, outside, (size, size), stride, use_bias=False, dtype=jnp.bfloat16, rngs=rngs
    )
    norm = lambda: nnx.BatchNorm(outside, dtype=jnp.bfloat16, rngs=rngs)
    self.first, self.second = conv(inside, 3, stride), conv(outside, 3, 1)
    self.first_norm, self.second_norm = norm(), norm()
    same = inside == outside and stride == 1
    self.shortcut = None if same else conv(inside, 1, stride)

  def __call__(self, x: jax.Array) -> jax.Array:
    inner = jax.nn.relu(self.first_norm(self.first(x)))
    inner = self.second_norm(self.second(inner))
    return jax.nn.relu(inner + (x if self.shortcut is None else self.shortcut(x)))


class _ResNet(nnx.Module):
  """ResNet-18 for images of 32 x 32; `width` is 64 in the paper."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.stem = nnx.Conv(
      3, width, (3, 3), use_bias=False, dtype=jnp.bfloat16, rngs=rngs
    )
    widths = [
      width,
      width,
      2 * width,
      2 * width,
      4 * width,
      4 * width,
      8 * width,
      8 * width,
    ]
    blocks, inside = [], width
    for i, outside in enumerate(widths):
      blocks.append(_Block(inside, outside, 2 if i in (2, 4, 6) else 1, rngs))
      inside = outside
    self.blocks = nnx.List(blocks)
    self.head = nnx.Linear(inside, 10, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.stem(x)
    for block in self.blocks:
      x = block(x)
    return self.head(x.mean(axis=(1, 2)).astype(jnp.float32))


def resnet_rows(
  width: int = 64, batch: int = 512, rounds: int = 10, calls: int = 4
) -> list[_measure.Row]:
  """A training step of ResNet-18 on made-up images, in four ways."""
  graph, start, rest = nnx.split(_ResNet(width, nnx.Rngs(0)), nnx.Param, ...)
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.standard_normal([batch, 32, 32, 3]), jnp.float32)
  labels = jnp.asarray(rng.integers(0, 10, batch), jnp.int32)

  def losses(params: Any, data: Any) -> jax.Array:
    logits = nnx.merge(graph, params, rest, copy=True)(data[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, data[1])

  adamw = optax.adamw(1e-3)

  def by_hand(tx: Any) -> _measure.Contender:
    mean = lambda params, data: losses(params, data).mean()

    def step(params, state, data):
      updates, state = tx.update(jax.grad(mean)(params, data), state, params)
      return optax.apply_updates(params, updates), state

    return _measure.looping(step, start, tx.init(start), (images, labels))

  plain = by_hand(adamw)
  contenders = {
    "accumulate(adamw), every 4": by_hand(ranger.accumulate(adamw, 4)),
    "accelerate(adamw)": by_hand(ranger.accelerate(adamw)),
    "train_step(adamw)": _train_step(losses, adamw, start, (images, labels)),
  }
  theirs, *ours = _measure.measure(
    "ResNet-18", [plain, *contenders.values()], rounds, calls=calls
  )
  return [
    _measure.Row(
      f"ResNet-18 of width {width}, batch {batch}, a step: {name}",
      "adamw by hand",
      seconds,
      theirs,
      temporaries=contender.temporaries,
      rival_temporaries=plain.temporaries,
    )
    for (name, contender), seconds in zip(contenders.items(), ours, strict=True)
  ]


def _train_step(losses: Any, tx: Any, start: Any, data: Any) -> _measure.Contender:
  update = ranger.train_step(losses, tx)
  params = jax.tree.map(jnp.copy, start)
  kept = (params, update.init(params))
  temporaries = _measure.temporaries(update.lower(*kept, data).compile())

  def turn():
    nonlocal kept
    params, state, _ = update(*kept, data)
    kept = (params, state)
    return kept

  return _measure.Contender(turn, temporaries)


def graph_rows(n: int = 1_000_000, d: int = 64, k: int = 10) -> list[_measure.Row]:
  """An exact graph of random numbers, and the time of its products alone."""
  rows = np.random.default_rng(0).standard_normal([n, d], np.float32)
  block = jnp.asarray(rows[:4096])
  product = jax.jit(lambda a, b: (a @ b.T).max())
  product(block, block).block_until_ready()
  start = time.perf_counter()
  for _ in range(16):
    found = product(block, block)
  found.block_until_ready()
  products = (time.perf_counter() - start) / 16 * (n / len(block)) ** 2
  start = time.perf_counter()
  graph = ranger.graph.build(rows, k, backend="jax", progress=False)
  seconds = time.perf_counter() - start
  recall = ranger.graph.measure_recall(graph, rows, sample=200)
  one = lambda value: np.asarray([value])
  return [
    _measure.Row(
      f"exact graph, {n} x {d}, k = {k}, recall {recall:.4f}",
      "its products in tiles of 4096, alone",
      one(seconds),
      one(products),
    )
  ]

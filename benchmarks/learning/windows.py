"""How many micro-batches: windows of fixed sizes, and those that the noise asks for.

AdamW at 1e-3 for one micro-batch, a sixteenth of the problem's own batch; larger
windows get the square root of their size times that. The best fixed size is chosen
with hindsight, by the last training loss. The rule has its defaults, and is run a fifth
longer, to see when it gets there. By layer, each group of leaves has a rule of its own.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.learning import _report
from benchmarks.learning import _runner
from benchmarks.learning.problems import tasks
import optax_ranger as ranger

RATE = 1e-3
# A sixteenth of the batch that each problem has elsewhere.
MICRO = {"digits": 4, "CNN": 8, "characters": 1, "Fashion-MNIST": 8}
FIXED = (1, 2, 4, 8, 16, 32)
_RULE, _LAYERS = "noise scale", "noise scale by layer"
METHODS = (*map(str, FIXED), _RULE, _LAYERS)
# Looks at the loss in the course of a training, further ones, and how many of them
# make a mean: the loss goes up and down at a constant rate.
_LOOKS, _MORE, _MEAN = 60, 12, 6
_COLUMNS = ("problem", "method", "seed", "last_loss", "window", "losses", "steps")


def optimizer(method: str, params: Any) -> optax.GradientTransformationExtraArgs:
  """AdamW that accumulates."""
  inner = optax.chain(optax.adamw(RATE), ranger.scale_by_window())
  if method == _RULE:
    return ranger.accumulate(inner, ranger.by_noise_scale(max(FIXED)))
  if method != _LAYERS:
    return ranger.accumulate(inner, int(method))
  labels = _layers(params)
  rule = ranger.by_noise_scale(max(FIXED))
  groups = {
    name: ranger.accumulate(inner, rule) for name in set(jax.tree.leaves(labels))
  }
  return optax.with_extra_args_support(optax.partition(groups, labels))


def _layers(params: Any) -> Any:
  """The group of each leaf: its layer."""
  # A list of layers, or a dictionary with one in it.
  depth = 1 if isinstance(params, list) else 2
  return jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path[:depth]), params
  )


def train(task: tasks.Task, method: str, seed: int, micro: int) -> tuple[Any, Any]:
  """Training losses and optimizer steps, by the look."""
  params, inputs = task.setup(seed)
  further = task.setup(seed + 1000)[1]
  flat, rest = inputs.reshape(-1, micro), further.reshape(-1, micro)
  calls = len(flat) // _LOOKS
  flat = jnp.concatenate([flat[: calls * _LOOKS], rest[: calls * _MORE]])
  inputs = flat.reshape(_LOOKS + _MORE, calls, micro)
  tx = optimizer(method, params)

  def step(carry, inputs):
    params, state = carry
    gradient = jax.grad(task.loss)(params, inputs)
    updates, state = tx.update(gradient, state, params, weight=micro)
    return (optax.apply_updates(params, updates), state), None

  def look(carry, inputs):
    carry, _ = jax.lax.scan(step, carry, inputs)
    params, state = carry
    is_window = lambda node: isinstance(node, ranger.steps.AccumulateState)
    windows = [x for x in jax.tree.leaves(state, is_leaf=is_window) if is_window(x)]
    sizes = [sum(x.size for x in jax.tree.leaves(w.inner_state)) for w in windows]
    # Of several groups, the mean over the parameters.
    shares = [size / sum(sizes) for size in sizes]
    steps = sum(w.gradient_step * s for w, s in zip(windows, shares, strict=True))
    return carry, (task.train_loss(params), steps)

  run = jax.jit(lambda params: jax.lax.scan(look, (params, tx.init(params)), inputs)[1])
  losses, steps = map(np.asarray, run(params))
  return losses, steps


def pieces(args: argparse.Namespace) -> list[_runner.Piece]:
  # On others, the rule's defaults were chosen.
  seeds = range(3, 4 if args.quick else 6)
  return [
    {"problem": problem, "method": method, "seed": str(seed)}
    for problem in MICRO
    for seed in seeds
    for method in METHODS
  ]


def run(piece: _runner.Piece, options: _runner.Options) -> dict[str, list[Any]]:
  """One row, with the losses and steps of all looks."""
  name, micro = piece["problem"], MICRO[piece["problem"]]
  task = tasks.TASKS[name].build(options.quick, options.folders.get(name))
  losses, steps = train(task, piece["method"], int(piece["seed"]), micro)
  inputs = task.setup(0)[1]
  calls = inputs.size // micro // _LOOKS * _LOOKS
  words = lambda values: " ".join(f"{value:.4g}" for value in values)
  row = {
    "last_loss": f"{smooth(losses)[_LOOKS - _MEAN]:.4g}",
    "window": f"{calls / steps[_LOOKS - 1]:.3g}",
    "losses": words(losses),
    "steps": words(steps),
  }
  return {"": [piece | row]}


def smooth(losses: np.ndarray) -> np.ndarray:
  """Means of some looks after each other."""
  return np.convolve(losses, np.ones(_MEAN) / _MEAN, "valid")


class Found:
  """What the rows of one problem say."""

  def __init__(self, rows: list[_runner.Row], problem: str):
    own = [row for row in rows if row["problem"] == problem]
    self.seeds = sorted({row["seed"] for row in own})
    self._rows = {(row["method"], row["seed"]): row for row in own}
    last = {str(every): self.last(str(every)) for every in FIXED}
    self.best = min(last, key=lambda every: last[every])

  def _curves(self, method: str, seeds: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds of smoothed losses, and that of steps, at the same looks."""
    rows = [self._rows[method, seed] for seed in seeds]
    losses = [smooth(_numbers(row["losses"])) for row in rows]
    steps = [_numbers(row["steps"])[_MEAN - 1 :] for row in rows]
    return np.mean(losses, axis=0), np.mean(steps, axis=0)

  def last(self, method: str) -> float:
    """The loss where training ends."""
    return self._curves(method, self.seeds)[0][_LOOKS - _MEAN]

  def window(self, method: str) -> float:
    """Micro-batches in a window, in the mean."""
    return float(np.mean([float(self._rows[method, s]["window"]) for s in self.seeds]))

  def shares(self, method: str, *seeds: str) -> tuple[float, float]:
    """Examples and steps to the last loss of the best fixed size, over its own.

    Of the mean curve over some seeds, or all; infinite if it does not get there.
    """
    chosen = list(seeds) or self.seeds
    losses, steps = self._curves(method, chosen)
    others, other_steps = self._curves(self.best, chosen)
    end = _LOOKS - _MEAN
    reached = np.flatnonzero(losses <= others[end])
    if not len(reached):
      return np.inf, np.inf
    look = reached[0]
    if look:
      before, after = losses[look - 1 : look + 1]
      look -= (others[end] - after) / (before - after)
    there = np.interp(look, np.arange(len(steps)), steps)
    return (look + _MEAN) / _LOOKS, there / other_steps[end]


def _numbers(words: str) -> np.ndarray:
  return np.array([float(word) for word in words.split()])


def report(tables: dict[str, list[_runner.Row]]) -> str:
  """Markdown: the losses of all windows, and the shares of examples and steps."""
  rows = tables[""]
  problems = list(dict.fromkeys(row["problem"] for row in rows))
  found = {problem: Found(rows, problem) for problem in problems}
  losses = [
    [method, *(f"{f.last(method):.3g}" for f in found.values())] for method in METHODS
  ]
  texts = [_report.markdown(["window", *problems], losses)]
  heads = ["problem", "best fixed", "windows", "examples", "each seed", "steps"]
  for method in (_RULE, _LAYERS):
    lines = []
    for problem, f in found.items():
      examples, steps = f.shares(method)
      each = (f.shares(method, seed)[0] for seed in f.seeds)
      listed = ", ".join("never" if np.isinf(x) else f"{x:.2f}" for x in each)
      numbers = f"{f.window(method):.3g}", f"{examples:.2f}", listed, f"{steps:.2f}"
      lines.append([problem, f.best, *numbers])
    texts.append(f"{method}:\n\n{_report.markdown(heads, lines)}")
  return "\n\n".join(texts)


STUDY = _runner.Study(
  columns={"": _COLUMNS},
  key=("problem", "method", "seed"),
  pieces=pieces,
  run=run,
  report=report,
)

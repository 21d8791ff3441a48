"""Steps to AdamW's last loss with lookahead, with and without outer momentum.

AdamW has a constant rate, the best of six decades, and so has the AdamW in the others.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.learning import _report
from benchmarks.learning import _runner
from benchmarks.learning.problems import tasks
import optax_ranger as ranger

RATE = 1e-2
# Losses over the whole training data in the course of a training.
_LOOKS = 40
_ADAMW = "adamw"
_COLUMNS = ("problem", "optimizer", "seed", "last_loss", "steps", "share")

SMOOTHING: dict[str, Callable[[], Any]] = {
  _ADAMW: optax.identity,
  "lookahead": ranger.smooth_by_lookahead,
  "lookahead with momentum": lambda: ranger.smooth_by_lookahead(
    every=28, step_size=0.68, momentum=0.37
  ),
  "lookahead with momentum, short windows": lambda: ranger.smooth_by_lookahead(
    every=6, step_size=0.7, momentum=0.5
  ),
}


def losses(task: tasks.Task, seed: int) -> tuple[int, dict[str, np.ndarray]]:
  """The number of steps, and the training losses [looks] of each optimizer."""
  params, inputs = task.setup(seed)
  looks = min(_LOOKS, len(inputs))
  steps = len(inputs) // looks * looks
  inputs = inputs[:steps].reshape(looks, -1, *inputs.shape[1:])

  def train(tx, params):
    def step(carry, inputs):
      params, state = carry
      gradient = jax.grad(task.loss)(params, inputs)
      updates, state = tx.update(gradient, state, params)
      return (optax.apply_updates(params, updates), state), None

    def look(carry, inputs):
      carry, _ = jax.lax.scan(step, carry, inputs)
      params, state = carry
      # Of AdamW alone these are the parameters themselves.
      smooth = ranger.eval_params(state, params)
      return carry, task.train_loss(smooth)

    return jax.lax.scan(look, (params, tx.init(params)), inputs)[1]

  found = {}
  for name, smoothing in SMOOTHING.items():
    tx = optax.chain(optax.adamw(RATE), smoothing())
    found[name] = np.asarray(jax.jit(lambda p, tx=tx: train(tx, p))(params))
  return steps, found


def steps_to(goal: float, values: np.ndarray, steps: int) -> float:
  """The steps until losses [looks], seen at equal distances, are first at the goal."""
  reached = np.flatnonzero(values <= goal)
  return (reached[0] + 1) * steps // len(values) if len(reached) else np.inf


def pieces(args: argparse.Namespace) -> list[_runner.Piece]:
  seeds = 1 if args.quick else 3
  return [
    {"problem": problem, "seed": str(seed)}
    for problem in ("characters", "CNN")
    for seed in range(seeds)
  ]


def run(piece: _runner.Piece, options: _runner.Options) -> dict[str, list[Any]]:
  """A row for each optimizer."""
  name = piece["problem"]
  task = tasks.TASKS[name].build(options.quick, options.folders.get(name))
  steps, found = losses(task, int(piece["seed"]))
  goal, rows = found[_ADAMW][-1], []
  for optimizer, values in found.items():
    needed = steps_to(goal, values, steps)
    row = {"optimizer": optimizer, "last_loss": f"{values[-1]:.4g}"}
    row |= {"steps": f"{needed:g}", "share": f"{needed / steps:.3g}"}
    rows.append(piece | row)
  return {"": rows}


def report(tables: dict[str, list[_runner.Row]]) -> str:
  """A Markdown table: the share of AdamW's steps, and the last loss."""
  rows = tables[""]
  problems = list(dict.fromkeys(row["problem"] for row in rows))
  heads, lines = ["optimizer"], []
  for problem in problems:
    heads += [f"{problem}: share of the steps", "last loss"]
  for name in SMOOTHING:
    cells = [name]
    for problem in problems:
      own = [r for r in rows if (r["problem"], r["optimizer"]) == (problem, name)]
      cells.append(
        ", ".join("never" if r["share"] == "inf" else r["share"] for r in own)
      )
      last = np.array([float(row["last_loss"]) for row in own])
      cells.append(f"{last.mean():.3f} ± {last.std():.3f}")
    lines.append(cells)
  return _report.markdown(heads, lines)


STUDY = _runner.Study(
  columns={"": _COLUMNS},
  key=("problem", "seed"),
  pieces=pieces,
  run=run,
  report=report,
)

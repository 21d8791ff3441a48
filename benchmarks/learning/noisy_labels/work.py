"""The pieces of the table, and the workers that train them."""

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
from typing import Any

from benchmarks.learning.noisy_labels import data
from benchmarks.learning.noisy_labels import methods
from benchmarks.learning.noisy_labels import models
from benchmarks.learning.noisy_labels import recipe
from benchmarks.learning.noisy_labels import training

Key = tuple[Any, ...]  # Model, method, noise, rate, seed.
# Two workers of one thread each take less time than one of two.
_FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
METHODS = {**methods.RIVALS, "ranger": recipe.RANGER}
EVERYTHING = {**METHODS, **recipe.ABLATIONS}
BEST = ("averaged", "sce", "deep_knn", "ranger")  # Of the MLP, mean of columns.
DEVELOPMENT_SEEDS = (100, 101)


def pieces(args: argparse.Namespace) -> list[Key]:
  """What is to be trained: model, method, noise, rate and seed."""
  if args.quick:
    names, noises = (
      ("averaged", "sce", "elr", "ranger"),
      (data.NOISES[1], data.NOISES[3]),
    )
    return [("mlp", name, *noise, 0) for noise in noises for name in names]
  keys = [
    ("mlp", name, *noise, seed)
    for seed in range(args.seeds)
    for noise in data.NOISES
    for name in METHODS
  ]
  keys += [
    ("mlp", name, *noise, seed)
    for seed in range(min(args.seeds, 3))
    for noise in data.NOISES[:4]
    for name in recipe.ABLATIONS
  ]
  keys += [
    ("cnn", name, *noise, seed)
    for seed in range(min(args.seeds, 3))
    for noise in data.NOISES
    for name in BEST
  ]
  return keys


def train(
  key: Key, dataset: str, folder: pathlib.Path, epochs: int, settings: Any = None
) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
  """Trains a piece; returns its row, its curves, and its confusion matrix."""
  model, name, noise, rate, seed = key
  method = EVERYTHING[name]
  problem = data.problem(dataset, noise, rate, seed, folder)
  pull = seed == 0 and model == "mlp"
  chosen = {**method.settings, **(settings or {})}
  # Compilation is not a method's doing: it is done before the clock starts.
  warm_up(name, model, dataset, folder)
  history = training.train(
    method, models.MODELS[model], problem, chosen, seed, epochs, pull
  )
  row = {
    "data": dataset,
    "model": model,
    "method": name,
    "noise": noise,
    "rate": rate,
    "seed": seed,
    "last": f"{history.last:.4f}",
    "selected": f"{history.selected:.4f}",
    "selected_epoch": history.epoch,
    "tuning_last": f"{history.tuning_last:.4f}",
    "tuning_selected": f"{history.tuning_selected:.4f}",
    "seconds": f"{history.seconds:.2f}",
  }
  curves = []
  if pull:
    curves = [
      {
        "method": name,
        "noise": noise,
        "rate": rate,
        "epoch": epoch + 1,
        "validation": f"{history.validation[epoch]:.4f}",
        "test": f"{history.test[epoch]:.4f}",
        "wrong_share": f"{history.wrong_share[epoch]:.4f}",
      }
      for epoch in range(epochs)
    ]
  return row, curves, history.confusion


@functools.cache
def warm_up(name: str, model: str, dataset: str, folder: pathlib.Path) -> None:
  method = EVERYTHING[name]
  problem = data.problem(dataset, *data.NOISES[0], 0, folder)
  settings = {**method.settings, "warm_up": 1} if "warm_up" in method.settings else {}
  training.train(
    method, models.MODELS[model], problem, {**method.settings, **settings}, 0, 2, True
  )


def _pin(cores: Any) -> None:
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {cores.get()})


def pool() -> concurrent.futures.ProcessPoolExecutor:
  """A process of one thread on each core."""
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
  context = multiprocessing.get_context("spawn")
  count = os.cpu_count() or 1
  cores = context.Queue()
  allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  for core in allowed or range(count):
    cores.put(core)
  return concurrent.futures.ProcessPoolExecutor(
    len(allowed) or count, context, _pin, (cores,)
  )

"""Speech: a GRU on windows of time against the same GRU on the whole sequence.

The data is synthetic: noisy spectra of 128 to 512 frames; formants glide from one vowel
to another. One task is to name the speaker, one of ten; the other is to name the word:
five pairs of vowels in both orders. `RegionalAggregator` runs windows side by side and
combines them by a mean, weighted by frames, or by a maximum. A step takes 0.6 to 0.7 of
the time and the same memory. With the mean, there is no difference for speakers. The
order of vowels is lost: words fall from 0.99 to 0.71 (64 frames). It takes minutes.
"""

import argparse
import json
import pathlib
import time

from flax import nnx
import jax
import jax.numpy as jnp
from matplotlib import pyplot as plt
import numpy as np
import optax
import tqdm

from optax_ranger import layers

FRAMES, BANDS, WIDTH, CLASSES, BATCH_SIZE = 512, 20, 32, 10, 8
# Formants in heed, who'd, head, hawed, father, in Hz (Peterson and Barney, 1952).
VOWELS = ((270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410),
          (730, 1090, 2440))  # fmt: skip
# The length of a window, and how windows are combined; 512 is the whole sequence.
METHODS = {
  f"{n} frames, {by}": (n, by) for n in (512, 64, 16) for by in ("mean", "max")
}


def make_utterances(n: int, seed: int):
  """Returns spectra and, as the last band, which frames are there; labels."""
  voices = np.random.default_rng(0).normal(0, 0.08, [CLASSES, 1, 3])
  rng = np.random.default_rng(seed)
  speakers, words = rng.integers(CLASSES, size=[2, n])
  vowels = np.stack([words // 2, (words // 2 + 1) % 5])
  first, second = np.log(VOWELS)[np.where(words % 2, vowels[::-1], vowels)][:, :, None]
  frames, length = np.arange(FRAMES), rng.integers(FRAMES // 4, FRAMES + 1, [n, 1])
  glide = (frames - length * rng.uniform(0.3, 0.7, [n, 1])) / rng.uniform(3, 9, [n, 1])
  share = (1 + np.tanh(glide / 2))[:, :, None] / 2
  formants = first * (1 - share) + second * share
  formants = formants + voices[speakers] + rng.normal(0, 0.02, [n, 1, 3])
  bands = np.linspace(np.log(200), np.log(4000), BANDS)[:, None]
  peaks = np.exp(-(((bands - formants[:, :, None]) / 0.15) ** 2))
  spectra = peaks.sum(axis=3) + rng.normal(0, 0.5, [n, FRAMES, BANDS])
  there = (frames < length)[:, :, None]
  inputs = np.concatenate([spectra * there, there], axis=2).astype(np.float32)
  return inputs, {"speakers": speakers, "words": words}


class Window(nnx.Module):
  """A GRU over the frames of one window, and the mean or maximum of its states."""

  def __init__(self, combine: str, *, rngs: nnx.Rngs):
    self.gru = nnx.RNN(nnx.GRUCell(BANDS, WIDTH, rngs=rngs), rngs=rngs)
    self.combine = combine

  def __call__(self, inputs: jax.Array) -> jax.Array:
    states, there = self.gru(inputs[:, :, :-1]), inputs[:, :, -1:]
    if self.combine == "max":
      # States lie in [-1, 1]: empty windows do not change the maximum.
      return jnp.where(there > 0, states, -1).max(axis=1)
    return (states * there).sum(axis=1) / jnp.maximum(there.sum(axis=1), 1)


class Classifier(nnx.Module):
  """Windows, combined, and a linear layer."""

  def __init__(self, length: int, combine: str, *, rngs: nnx.Rngs):
    partition, local = layers.TimeWindows(FRAMES // length), Window(combine, rngs=rngs)
    self.windows = layers.RegionalAggregator(partition, local, combine)
    self.out = nnx.Linear(WIDTH, CLASSES, rngs=rngs)
    self.length, self.combine = length, combine

  def __call__(self, inputs):
    there = inputs[:, :, -1].reshape(len(inputs), -1, self.length)
    weights = there.sum(axis=2) if self.combine == "mean" else None
    return self.out(self.windows(inputs, weights))


@nnx.jit
def train_step(model, optimizer, inputs, labels):
  """An ordinary step."""

  def mean_loss(model):
    logits = model(inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  optimizer.update(model, nnx.grad(mean_loss)(model))


def train(method, tx, inputs, labels, seed: int, epochs: int):
  """Returns the trained model and the milliseconds of its fastest step."""
  model = Classifier(*method, rngs=nnx.Rngs(seed))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  seconds, rng = [], np.random.default_rng(seed)
  for _ in range(epochs):
    for ids in rng.permutation(len(inputs)).reshape(-1, BATCH_SIZE):
      start = time.perf_counter()
      train_step(model, optimizer, inputs[ids], labels[ids])
      jax.block_until_ready(nnx.state(model))
      seconds.append(time.perf_counter() - start)
  return model, 1e3 * min(seconds)


def main() -> None:
  """Trains every method on both tasks; prints, writes and draws accuracies."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quick", action="store_true")
  parser.add_argument("--out", type=pathlib.Path, default="out")
  args = parser.parse_args()
  n, epochs, seeds = (16, 1, 2) if args.quick else (400, 8, 5)
  tx = optax.adamw(optax.cosine_decay_schedule(1e-2, epochs * n // BATCH_SIZE))
  tables = {task: {name: [] for name in METHODS} for task in ("speakers", "words")}
  pace = dict.fromkeys(METHODS, float("inf"))
  for seed in tqdm.trange(seeds):
    inputs, labels = make_utterances(n, 2 * seed + 1)
    test, test_labels = make_utterances(n, 2 * seed + 2)
    for task, table in tables.items():
      for name, method in METHODS.items():
        model, step = train(method, tx, inputs, labels[task], seed, epochs)
        hits = model(test).argmax(axis=1) == test_labels[task]
        table[name].append(float(hits.mean()))
        pace[name] = min(pace[name], step)
  report = {"problem": "spectra of ten speakers, synthetic, 128 to 512 frames",
            "measure": "test accuracy, last epoch", "better": "higher",
            "results": tables["speakers"], "words": tables["words"], "step_ms": pace,
            "baseline": "512 frames, mean", "ours": "64 frames, mean"}  # fmt: skip
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "speech.json").write_text(json.dumps(report, indent=2))
  figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
  for i, (task, table) in enumerate(tables.items()):
    runs = np.array(list(table.values()))
    means, errors = runs.mean(axis=1), runs.std(axis=1, ddof=1) / seeds**0.5
    axis.barh(np.arange(6) + 0.4 * i, means, 0.35, xerr=errors, label=task)
    for name, mean, error in zip(METHODS, means, errors, strict=True):
      print(f"{task:9} {name:16} {mean:.3f} ± {error:.3f} {pace[name]:6.1f} ms a step")
  ticks = [f"{name}\n{step:.1f} ms a step" for name, step in pace.items()]
  axis.set(xlabel="test accuracy", yticks=np.arange(6) + 0.2, yticklabels=ticks)
  axis.legend()
  figure.savefig(args.out / "speech.png", dpi=80)


if __name__ == "__main__":
  main()

"""The loops of the README run as they stand."""

import importlib.util
import pathlib
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger

ROOT = pathlib.Path(__file__).parents[2]


def _demo():
  spec = importlib.util.spec_from_file_location(
    "demo", ROOT / "examples" / "noisy_labels.py"
  )
  demo = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(demo)
  return demo


README = (ROOT / "README.md").read_text()


def _programs():
  """The loop before and after the diff, and how many lines it adds."""
  (block,) = re.findall(r"```diff\n(.*?)```", README, re.S)
  lines = block.splitlines()
  before, after = (
    "\n".join(line[1:] for line in lines if line[:1] != left_out) for left_out in "+-"
  )
  added = sum(line.startswith("+") for line in lines)
  return before, after, added


def _accuracy(program, demo, data, weights=None):
  images, labels, _, test_images, test_labels = map(jnp.asarray, data)
  names = {"jnp": jnp, "nnx": nnx, "optax": optax, "Mlp": demo.Mlp}
  names |= {"batches": demo.batches, "images": images, "labels": labels}
  names["WEIGHTS"] = weights
  with jax.numpy_dtype_promotion("standard"):  # As Optax's Adam needs it.
    exec(program, names)
  guess = names["model"](test_images).argmax(axis=-1)
  return float((guess == test_labels).mean()), names


@pytest.mark.slow
def test_eight_lines_make_a_loop_robust():
  demo = _demo()
  before, after, added = _programs()
  assert added <= 8
  data = demo.load_digits(0.4, 0)
  plain, _ = _accuracy(before, demo, data)
  robust, names = _accuracy(after, demo, data)
  assert plain < 0.87
  assert robust > 0.94  # the demo: 0.969
  assert abs(float(names["known"].noise) - 0.4) < 0.08


def _snippets(names):
  """Runs the parts of the second code block, one after the other."""
  (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
  with jax.numpy_dtype_promotion("standard"):  # As Optax's Adam needs it.
    for part in block.split("\n\n"):
      exec(part, names)


def test_every_snippet_runs():
  images, given, clean, *_ = _demo().load_digits(0.4, 0)
  images, labels = jnp.asarray(images), jnp.asarray(given)
  model = nnx.Linear(64, 10, rngs=nnx.Rngs(0))
  graph, params = nnx.split(model)
  ids = jnp.arange(32)
  batch = {"x": images[ids], "y": labels[ids]}
  neighbors = ranger.neighbors.nearest(batch["x"], k=3)

  @jax.jit
  def per_example_losses(params, batch):
    logits = nnx.merge(graph, params)(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

  names = {
    "jnp": jnp, "nnx": nnx, "optax": optax, "ranger": ranger,
    "images": images, "labels": labels, "ids": ids,
    "losses": per_example_losses(params, batch),
    "params": params, "grads": jax.tree.map(jnp.ones_like, params), "num_tokens": 32,
    "num_steps": 1000,
    "model": model, "evaluate": lambda model: model(images).mean(),
    "per_example_losses": per_example_losses, "batch": batch,
    "batch_neighbors": ranger.neighbors.weigh(neighbors, labels=batch["y"]),
  }  # fmt: skip
  names["params"] = jax.tree.map(jnp.copy, params)
  _snippets(names)
  assert float(names["metrics"]["loss"]) > 0
  assert jnp.isfinite(names["loss"])
  assert len(names["suspicious"]) == round(names["found"].num_wrong)
  wrong = given != clean
  assert wrong[np.asarray(names["suspicious"])[:200]].mean() > 0.9


@pytest.mark.slow
def test_neighbor_weights_reach_what_they_claim():
  """0.79 and 0.93: the loop of the diff, plain and with the weights."""
  demo = _demo()
  data = demo.load_digits(0.4, 0)
  before, _, _ = _programs()
  (lines,) = re.findall(r"```python\n# 1: [^\n]*\n(.*?)loss = ", README, re.S)
  names = {"ranger": ranger, "images": data[0], "labels": jnp.asarray(data[1])}
  exec(lines, names)
  weights = names["weights"]
  weighted = (
    before.replace("x, y):", "x, y, w):")
    .replace("losses.mean()", "(w * losses).sum() / w.sum()")
    .replace("labels[ids])", "labels[ids], weights[ids])")
  )
  assert weighted.count("w.sum()") == weighted.count("weights[ids]") == 1
  plain, _ = _accuracy(before, demo, data)
  robust, _ = _accuracy(f"weights = WEIGHTS\n{weighted}", demo, data, weights)
  assert plain < 0.87
  assert robust > 0.9


def test_the_demo_asks_when_the_readme_does():
  (when,) = re.findall(r"^\+ *(if epoch % .*)$", README, re.M)
  assert when in (ROOT / "examples" / "noisy_labels.py").read_text()


def test_it_is_short():
  text = re.sub(r"```.*?```", "", README, flags=re.S)
  assert len(text.split()) <= 500  # Tables included.
  assert len(re.findall(r"^\|-*[:\-| ]+\|$", README, re.M)) <= 4

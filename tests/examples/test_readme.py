"""The loops of the README run as they stand."""

import importlib.util
import pathlib
import re

from flax import nnx
import jax
import jax.numpy as jnp
import optax

ROOT = pathlib.Path(__file__).parents[2]


def _demo():
  spec = importlib.util.spec_from_file_location(
    "demo", ROOT / "examples" / "noisy_labels.py"
  )
  demo = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(demo)
  return demo


def _programs():
  """The loop before and after the diff, and how many lines it adds."""
  (block,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
  lines = block.splitlines()
  before, after = (
    "\n".join(line[1:] for line in lines if line[:1] != left_out) for left_out in "+-"
  )
  added = sum(line.startswith("+") for line in lines)
  return before, after, added


def _accuracy(program, demo, data):
  images, labels, _, test_images, test_labels = map(jnp.asarray, data)
  names = {"jnp": jnp, "nnx": nnx, "optax": optax, "Mlp": demo.Mlp}
  names |= {"batches": demo.batches, "images": images, "labels": labels}
  with jax.numpy_dtype_promotion("standard"):  # As Optax's Adam needs it.
    exec(program, names)
  guess = names["model"](test_images).argmax(axis=-1)
  return float((guess == test_labels).mean()), names


def test_eight_lines_make_a_loop_robust():
  demo = _demo()
  before, after, added = _programs()
  assert added <= 8
  data = demo.load_digits(0.4, 0)
  plain, _ = _accuracy(before, demo, data)
  robust, names = _accuracy(after, demo, data)
  assert plain < 0.87
  assert robust > 0.94  # the demo: 0.959
  assert abs(float(names["known"].noise) - 0.4) < 0.08

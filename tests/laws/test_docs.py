"""The code blocks of the docs run as they stand, page by page."""

import doctest
import os
import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
PAGES = sorted(
  page.name for page in DOCS.glob("*.md") if BLOCK.search(page.read_text())
)

# Readers have data and a model already. Pages not listed here import what they use.
DATA = """
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax_ranger as ranger

n, num_classes = 200, 2
features = np.random.default_rng(0).normal(size=[n, 5]).astype(np.float32)
labels = (features[:, 0] > 0).astype(np.int32)
params = {"kernel": jnp.ones([5, num_classes])}
"""
READERS = {
  "graph.md": """
diagnoses = [["no", "yes"][label] for label in labels]
patients, new_rows = [f"patient {i // 10}" for i in range(n)], features[:5]
images, state, beliefs = features, optax.EmptyState(), jnp.eye(num_classes)[labels]

class model:
  apply = lambda params, batch, method: batch @ params["kernel"]
""",
  "learning_rates.md": "steps = 1000",
  "noisy_labels.md": """
logits, confusion = jnp.zeros([2, 3]), jnp.eye(3)
""",
  "other_noise.md": """
targets = all_targets = jnp.asarray(features[:, 0])
predictions = all_predictions = jnp.zeros_like(targets)
""",
  "smoothing.md": "evaluate = jax.tree.leaves",
}
# Other pages use the same functions.
SLOW = ("moving.md", "ranger21.md", "testing.md")


def test_pages_with_code_are_found():
  assert len(PAGES) > 10
  assert set(READERS) | set(SLOW) < set(PAGES)


@pytest.mark.parametrize(
  "page",
  [
    pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page
    for page in PAGES
  ],
)
def test_code_of_the_page_runs(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # A page may set it.
  names = {"__name__": page}
  if page in READERS:
    exec(DATA + READERS[page], names)
  # Optax's own arithmetic needs it.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    for block in BLOCK.findall((DOCS / page).read_text()):
      if block.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block, names, page, page, 0)
        flags = doctest.NORMALIZE_WHITESPACE
        assert not doctest.DocTestRunner(optionflags=flags).run(test).failed
      else:
        exec(compile(block, page, "exec"), names)

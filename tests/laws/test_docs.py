"""The code blocks of the docs run as they stand, page by page."""

import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = ("your_own_step.md", "testing.md", "ranger21.md", "aggregation.md", "index.md")


@pytest.mark.parametrize("page", PAGES)
def test_code_of_the_page_runs(page):
  blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
  assert blocks
  names = {"__name__": page}
  # Optax's own arithmetic needs it.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    for block in blocks:
      exec(compile(block, page, "exec"), names)

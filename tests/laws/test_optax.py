"""What the laws find in Optax's own transformations is what the page says."""

import functools
import pathlib
import re

import jax
import optax
import pytest

from optax_ranger import testing

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "testing.md"
_RATE = {"learning_rate": 0.1}
STEPS = {
  "sgd(momentum=0.9)": functools.partial(optax.sgd, **_RATE, momentum=0.9),
  "adam": functools.partial(optax.adam, **_RATE),
  "lion": functools.partial(optax.lion, **_RATE),
  "lamb": functools.partial(optax.lamb, **_RATE),
  "adafactor": functools.partial(optax.adafactor, **_RATE),
  "sm3": functools.partial(optax.sm3, **_RATE),
  "rprop": functools.partial(optax.rprop, **_RATE),
  "clip_by_global_norm": functools.partial(optax.clip_by_global_norm, max_norm=1.0),
  "adaptive_grad_clip": functools.partial(optax.adaptive_grad_clip, clipping=0.01),
  "zero_nans": optax.zero_nans(),
  "MultiSteps": optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation(),
  "contrib.schedule_free_adamw": functools.partial(
    optax.contrib.schedule_free_adamw, **_RATE
  ),
  "contrib.prodigy": functools.partial(optax.contrib.prodigy, **_RATE),
  "contrib.muon": functools.partial(optax.contrib.muon, **_RATE),
}


def broken(step) -> str:
  """Names of the laws that a step breaks, as the page has them."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    failed = [one.law for one in testing.check(step, on_fail="report").failed]
  bad = [law for law in failed if law.startswith("recovers")]
  if len(bad) == 3:
    failed = [law for law in failed if law not in bad] + ["recovers"]
  return "; ".join(failed) or "none"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STEPS)
def test_the_page_has_what_the_laws_find(name):
  table = dict(re.findall(r"^\| `(.*?)` \| (.*?) \|$", PAGE.read_text(), re.M))
  assert list(table) == list(STEPS)
  assert broken(STEPS[name]) == table[name]

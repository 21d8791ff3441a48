"""The API pages of the site; `make docs` makes them."""

import importlib
import inspect
import pathlib
import re

import pytest

API = pathlib.Path(__file__).parents[2] / "docs" / "api"
ROOMS = ("steps", "recipes", "training", "labels", "neighbors", "regions", "graph")
ROOMS += ("layers", "testing")


LISTED = r"^   (\w+)$|^\.\. py:data:: (\w+)$"


def public_names(module):
  public = (name for name in vars(module) if not name.startswith("_"))
  return {name for name in public if not inspect.ismodule(getattr(module, name))}


@pytest.mark.parametrize("room", ["", *(f".{room}" for room in ROOMS)])
def test_every_public_name_has_a_page(room):
  pages = "\n".join(page.read_text() for page in API.glob("*.rst"))
  listed = {a or b for a, b in re.findall(LISTED, pages, re.M)}
  names = public_names(importlib.import_module(f"optax_ranger{room}"))
  assert len(names) > 4
  assert names <= listed

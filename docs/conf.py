"""The site: `make docs`."""

import importlib
import inspect
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

import optax_ranger  # noqa: E402

project = "optax_ranger"
author = "the authors of optax_ranger"
project_copyright = author
release = version = optax_ranger.__version__

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "sphinx_copybutton",
  "gallery",
  "mathml",
]
exclude_patterns = ["_*"]
html_theme = "furo"
html_title = "optax_ranger"
html_show_sphinx = False
html_show_sourcelink = html_copy_source = False
templates_path = ["_templates"]
add_module_names = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"

myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autosummary_generate = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88

napoleon_custom_sections = [
  ("Extra args of update", "params_style"),
  ("Shapes", "notes_style"),
  ("Guarantees", "notes_style"),
]
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_numpy_docstring = False


def _public_names():
  """Where the names of the package are, flat ones first."""
  found = {}
  for name in (
    "",
    ".steps",
    ".recipes",
    ".training",
    ".neighbors",
    ".labels",
    ".graph",
  ):
    module = importlib.import_module("optax_ranger" + name)
    for each in vars(module):
      if not each.startswith("_") and not inspect.ismodule(getattr(module, each)):
        found.setdefault(each, f"{module.__name__}.{each}")
  return found


_NAMES = _public_names()


def _for_sphinx(app, what, name, obj, options, lines):
  """Titles that Napoleon knows, and links from names in the text."""

  def linked(match):
    known = _NAMES.get(match[1].removesuffix("()"))
    # A parameter may have the name of a function.
    is_own = known is None or name.startswith(known)
    return match[0] if is_own else f":py:obj:`{match[1]} <{known}>`"

  for i, line in enumerate(lines):
    line = re.sub(r"^Extra args of ``update``:", "Extra args of update:", line)
    if "_" in line and not line.lstrip().startswith((">>>", "...")):
      line = re.sub(r"``([a-z_0-9]+(?:\(\))?)``", linked, line)
    lines[i] = line


def _is_field(app, what, name, obj, skip, options):
  """Fields of a named tuple stand among its attributes already."""
  return True if type(obj).__name__ == "_tuplegetter" else None


def _within_the_site(app, name, source):
  """Links to files that lie elsewhere in the repository."""
  source[0] = source[0].replace("](../benchmarks/README.md", "](speed.md")


def _from_the_folder_of_docs(app, path, parent, source):
  """Links in a file of another folder that a page includes."""
  source[0] = source[0].replace("](gpu.sh", "](../benchmarks/gpu.sh")
  source[0] = source[0].replace("](../docs/", "](")


def setup(app):
  # Before Napoleon.
  app.connect("autodoc-process-docstring", _for_sphinx, priority=400)
  app.connect("autodoc-skip-member", _is_field)
  app.connect("source-read", _within_the_site)
  app.connect("include-read", _from_the_folder_of_docs)

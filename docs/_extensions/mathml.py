"""Mathematics as MathML, which browsers draw without a script from elsewhere."""

import re

from docutils import nodes
from latex2mathml import converter
from sphinx.util import logging

_LOGGER = logging.getLogger(__name__)


def _convert(latex, display, node):
  latex = re.sub(r"\\arg\\(min|max)", r"\\text{arg \1}", latex)
  math = converter.convert(latex, display=display)
  if "\\" in math or "&amp;" in math or "&#x00026;" in math:
    _LOGGER.warning("no MathML for a part of a formula: %s", latex, location=node)
  return math


def _inline(self, node):
  self.body.append(_convert(node.astext(), "inline", node))
  raise nodes.SkipNode


def _block(self, node):
  for latex in filter(None, map(str.strip, node.astext().split("\n\n"))):
    if r"\\" in latex:
      latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    self.body.append(f'<div class="math">{_convert(latex, "block", node)}</div>')
  raise nodes.SkipNode


def setup(app):
  app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
  return {"parallel_read_safe": True, "parallel_write_safe": True}

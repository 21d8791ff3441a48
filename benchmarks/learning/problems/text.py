"""Text: which package of Python's standard library a docstring is from."""

import ast
import pathlib
import sysconfig

import numpy as np
from sklearn import decomposition
from sklearn import preprocessing
from sklearn.feature_extraction import text

from benchmarks.learning.problems._source import Missing
from benchmarks.learning.problems._source import Source

PACKAGES = (
  "tkinter", "idlelib", "asyncio", "email", "importlib", "logging", "xml",
  "multiprocessing", "unittest", "http",
)  # fmt: skip
_WORDS, _WIDTH = 6, 128
_KINDS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


def load(folder: pathlib.Path | None) -> Source:
  """TF-IDF of the docstrings, reduced to 128 numbers of length 1 by LSA.

  Python 3.11 has about 2,900. No label is used to make the features.
  """
  library = folder or pathlib.Path(sysconfig.get_path("stdlib"))
  missing = [name for name in PACKAGES if not (library / name).is_dir()]
  if missing:
    raise Missing(
      f"{library} lacks the sources of {', '.join(missing)}; pass --folder with the"
      " standard library of a complete Python installation."
    )
  texts: dict[str, int] = {}
  for label, package in enumerate(PACKAGES):
    for path in sorted((library / package).rglob("*.py")):
      if not {"test", "tests", "idle_test"} & set(path.parts):
        tree = ast.parse(path.read_text(errors="replace"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, _KINDS)]
        for found in (ast.get_docstring(node) or "" for node in nodes):
          if len(found.split()) >= _WORDS:
            texts.setdefault(found, label)
  vectorizer = text.TfidfVectorizer(sublinear_tf=True, stop_words="english", min_df=2)
  words = vectorizer.fit_transform(list(texts))
  reduced = decomposition.TruncatedSVD(_WIDTH, random_state=0).fit_transform(words)
  x = preprocessing.normalize(reduced).astype(np.float32)
  return Source(x, np.array(list(texts.values())), len(PACKAGES))

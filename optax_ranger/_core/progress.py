"""Bars for what takes more than two seconds."""

from collections.abc import Iterable
from typing import Any


def bar(items: Iterable[Any], what: str, progress: bool, total: int | None = None):
  """The items, behind a bar that shows itself after two seconds.

  Without tqdm, which the extra `graph` installs, there is no bar.
  """
  if not progress:
    return items
  try:
    import tqdm
  except ImportError:
    return items
  return tqdm.tqdm(items, desc=what, total=total, delay=2, leave=False)

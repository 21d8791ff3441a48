"""Progress bars: only where asked for, and none without tqdm."""

import sys
import types

from optax_ranger._core import progress


def test_bars(monkeypatch):
  asked = []

  def tqdm(items, **options):
    asked.append(options)
    return ["a bar", *items]

  monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=tqdm))
  assert list(progress.bar([1, 2], "asking", progress=False)) == [1, 2]
  assert not asked
  assert list(progress.bar([1, 2], "asking", progress=True, total=2)) == ["a bar", 1, 2]
  assert asked == [{"desc": "asking", "total": 2, "delay": 2, "leave": False}]

  monkeypatch.setitem(sys.modules, "tqdm", None)
  assert list(progress.bar([1, 2], "asking", progress=True)) == [1, 2]

"""`check` and `parametrize_with_laws`."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import Any
from typing import Literal
from typing import NamedTuple

import optax

from optax_ranger._core import validate
from optax_ranger._core.types import PyTree
from optax_ranger.testing import _subject
from optax_ranger.testing._laws import LAWS


class Result(NamedTuple):
  """What one law found.

  Attributes:
    law: its name.
    status: "passed", "failed" or "skipped".
    message: what differed and where, or why it was skipped; "" where it passed.
  """

  law: str
  status: Literal["passed", "failed", "skipped"]
  message: str = ""


class Report(NamedTuple):
  """What all laws found; printed, a line for each."""

  results: tuple[Result, ...]

  def __str__(self) -> str:
    width = max(len(result.law) for result in self.results)
    return "\n".join(
      f"{result.status:7}  {result.law:{width}}  {_first_line(result.message)}".rstrip()
      for result in self.results
    )

  @property
  def failed(self) -> tuple[Result, ...]:
    """The results of the laws that the step breaks."""
    return tuple(one for one in self.results if one.status == "failed")


def _first_line(message: str) -> str:
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  return " ".join(lines[:2])[:200]


def check(
  step: Any,
  *,
  params: PyTree = None,
  extra: Mapping[str, Any] | Callable[[int], dict[str, Any]] | None = None,
  gradients: Callable[[int, PyTree], PyTree] | None = None,
  static_args: tuple[str, ...] = (),
  skip: Mapping[str, str] | None = None,
  on_fail: Literal["raise", "report"] = "raise",
) -> Report:
  """Checks a gradient transformation by all laws of `LAWS`.

  The laws ask that the step follows Optax's protocol and is pure; that it gives the
  same under ``jax.jit``, ``jax.lax.scan``, ``jax.vmap`` and ``jax.pmap``, and compiles
  once; that data types, weak types and shardings of the state stay what they were; that
  None, masked and empty leaves change nothing; that its state can be made abstractly,
  donated and saved by Orbax; that one NaN or infinity does not stay in the state; and
  that its numbers may be data.

  Args:
    step: an ``optax.GradientTransformation``, or a
      ``functools.partial(factory, name=value, ...)`` that makes one.
      ``optax.inject_hyperparams`` is tried on the second form only.
    params: a pytree of float32 arrays; a small one by default. The law on explicit
      meshes splits first axes of even length over two devices.
    extra: the extra args of ``update``: a dict, or a function of the call's number.
    gradients: ``(call, params) -> updates``; normal numbers by default. Updates may
      have a leading axis, of examples, that params lack.
    static_args: names of arguments of the factory that are no numbers.
    skip: laws that are not run, and why.
    on_fail: "raise" or "report".

  Returns:
    A ``Report``, whose ``results`` have a law, a status and a message each.

  Raises:
    AssertionError: for laws that the step breaks, with the whole report.
    ValueError: for names in `skip` that are no laws.

  Examples:
    Plain SGD breaks no law.

    >>> import functools, optax, optax_ranger.testing
    >>> step = functools.partial(optax.sgd, learning_rate=0.1)
    >>> report = optax_ranger.testing.check(step)
    >>> print(report.failed)
    ()
  """
  validate.choice("on_fail", on_fail, ("raise", "report"))
  options = {"params": params, "extra": extra, "gradients": gradients}
  subject = _as_subject(step, **options, static_args=static_args)
  skip = _checked(skip)
  report = Report(tuple(_judge(name, subject, skip) for name in LAWS))
  if report.failed and on_fail == "raise":
    details = "\n\n".join(f"{one.law}:\n{one.message}" for one in report.failed)
    raise AssertionError(f"{len(report.failed)} laws failed\n{report}\n\n{details}")
  return report


def parametrize_with_laws(
  step: Any, *, skip: Mapping[str, str] | None = None, **options: Any
) -> Any:
  """A pytest decorator: one test for each law.

  Args:
    step: see `check`.
    skip: see `check`.
    **options: ``params``, ``extra``, ``gradients`` and ``static_args`` of `check`.

  Returns:
    A mark for a test function that calls its only parameter, ``law()``.

  Examples:
    >>> import optax, optax_ranger.testing
    >>> @optax_ranger.testing.parametrize_with_laws(optax.sgd(0.1))
    ... def test_my_step(law):
    ...   law()
  """
  import pytest

  subject, skip = _as_subject(step, **options), _checked(skip)

  def run(name: str) -> None:
    result = _judge(name, subject, skip)
    if result.status == "skipped":
      pytest.skip(result.message)
    assert result.status == "passed", f"{name}: {result.message}"

  laws = [pytest.param(functools.partial(run, name), id=name) for name in LAWS]
  return pytest.mark.parametrize("law", laws)


def _checked(skip: Mapping[str, str] | None) -> Mapping[str, str]:
  for name in skip or {}:
    validate.choice("a law in skip", name, tuple(LAWS))
  return skip or {}


def _judge(name: str, subject: _subject.Subject, skip: Mapping[str, str]) -> Result:
  if name in skip:
    return Result(name, "skipped", skip[name])
  try:
    LAWS[name](subject)
  except _subject.SkippedError as error:
    return Result(name, "skipped", str(error))
  except Exception as error:  # Whatever a step raises is a finding.
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return Result(name, "failed", f"{kind}{error}".strip())
  return Result(name, "passed")


def _as_subject(
  step: Any,
  *,
  params: PyTree = None,
  extra: Any = None,
  gradients: Any = None,
  static_args: tuple[str, ...] = (),
) -> _subject.Subject:
  given: dict[str, Any] = {"static_args": static_args}
  if params is not None:
    given["params"] = params
  if gradients is not None:
    given["gradients"] = gradients
  if extra is not None:
    given["extra"] = extra if callable(extra) else lambda call: dict(extra)
  if isinstance(step, optax.GradientTransformation):
    return _subject.Subject(lambda: step, **given)
  if isinstance(step, functools.partial) and not step.args:
    given.update(factory=step.func, arguments=step.keywords)
    return _subject.Subject(step, **given)
  raise TypeError(
    "step must be an optax.GradientTransformation, or functools.partial(factory,"
    f" name=value, ...) with names for all arguments, got {step!r}."
  )

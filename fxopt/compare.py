"""Compares what two callables give on the same inputs: errors per output, a float64 reference where needed, a verdict.

The error of an output is max|difference| / max|expected| over the places where what was expected is finite. It is
settled by the model in float64: the result may miss it by twice what the original misses it by, and 24 units of
rounding. Anything else is a wrong answer. Where the result is within 24 units of the original's, it is within them of
what the original misses by (the triangle inequality), and float64 is not asked.

24 units, because kernels sum in other orders: with AVX-512, oneDNN's convolution of 512 channels by 3x3 taps misses
float64 by 23 units (2.7e-6) on channels-last images and by 3 on others, in PyTorch as here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

REFERENCE_FACTOR = 2
ROUNDING_UNITS = 24


@dataclass(frozen=True)
class OutputError:
    """How far one output is from what was expected; `reason` says why it is wrong, if it is."""

    index: int
    relative: float
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether two results agree, the largest relative error, and each output's.

    `original_error` and `compiled_error` are distances from the float64 reference, where it was asked.
    """

    ok: bool
    error: float
    outputs: tuple[OutputError, ...]
    reason: str = ""
    original_error: float | None = None
    compiled_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The verdict for programs."""
        return {
            "ok": self.ok,
            "error": _json(self.error),
            "reason": self.reason,
            "original_error": _json(self.original_error),
            "compiled_error": _json(self.compiled_error),
        }

    def __str__(self) -> str:
        if not self.ok:
            return f"WRONG: {self.reason}"
        text = "the same bits" if self.error == 0 else f"max|difference| / max|expected| = {self.error:.1e}"
        if self.compiled_error is not None:
            text += f" (from float64: original {self.original_error:.1e}, compiled {self.compiled_error:.1e})"
        return text


def _json(number: float | None) -> float | str | None:
    return number if number is None or math.isfinite(number) else str(number)


def unit(dtype: torch.dtype) -> float:
    """One unit of rounding of a dtype."""
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """max|actual - expected| / max|expected| where `expected` is finite; infinity where `actual` is not finite there,
    or where it is not the same non-finite value elsewhere."""
    if expected.numel() == 0:
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    expected, actual = expected.detach().to(wide), actual.detach().to(wide)
    finite = torch.isfinite(expected)
    if not bool(finite.all()):
        same = (expected == actual) | (torch.isnan(expected) & torch.isnan(actual))
        if not bool((same | finite).all()):
            return math.inf
        expected, actual = expected[finite], actual[finite]
        if expected.numel() == 0:
            return 0.0
    distance = float((actual - expected).abs().max())
    if math.isnan(distance):
        return math.inf
    scale = float(expected.abs().max())
    if distance == 0:
        return 0.0
    return distance / scale if scale > 0 else math.inf


def _compare_leaf(index: int, expected: Any, actual: Any) -> OutputError:
    if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
        same = type(expected) is type(actual) and (expected is actual or expected == actual)
        return OutputError(index, 0.0 if same else math.inf, "" if same else f"{actual!r} instead of {expected!r}")
    for what in ("shape", "dtype", "device", "layout"):
        left, right = getattr(expected, what), getattr(actual, what)
        if left != right:
            return OutputError(index, math.inf, f"{what} {_plain(right)} instead of {_plain(left)}")
    if expected.layout is torch.strided and _strides(expected) != _strides(actual):
        return OutputError(index, math.inf, f"strides {actual.stride()} instead of {expected.stride()}")
    if not expected.dtype.is_floating_point and not expected.dtype.is_complex:
        same = torch.equal(expected, actual)
        return OutputError(index, 0.0 if same else math.inf, "" if same else "other integers or truth values")
    return OutputError(index, relative_error(expected, actual))


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def _strides(value: torch.Tensor) -> list[int]:
    if value.numel() == 0:
        return []
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1]


def compare(
    expected: Sequence[Any],
    actual: Sequence[Any],
    *,
    inputs: Sequence[str] = (),
    reference: Callable[[], Sequence[Any]] | None = None,
    bitwise: bool = False,
) -> Verdict:
    """Whether the flat results `actual` are those `expected`. The last of them may be inputs as a call left them, which
    `inputs` names.

    `reference` computes the same results in float64, and is asked only where the difference is not obviously rounding.
    With `bitwise` any difference is wrong.
    """
    if len(expected) != len(actual):
        reason = f"{len(actual) - len(inputs)} results instead of {len(expected) - len(inputs)}"
        return Verdict(False, math.inf, (), reason)
    names = [f"output {index}" for index in range(len(expected) - len(inputs))]
    names += [f"input {name}, after the call," for name in inputs]
    errors = tuple(_compare_leaf(i, e, a) for i, (e, a) in enumerate(zip(expected, actual, strict=True)))
    worst = max((error.relative for error in errors), default=0.0)
    broken = next((error for error in errors if error.reason), None)
    if broken is not None:
        return Verdict(False, worst, errors, f"{names[broken.index]} has {broken.reason}")
    suspects = [
        error.index for error in errors if error.relative > (0.0 if bitwise else _rounding(expected[error.index]))
    ]
    if not suspects:
        return Verdict(True, worst, errors)
    first = suspects[0]
    said = f"{names[first]} is off by {errors[first].relative:.1e}"
    if bitwise:
        return Verdict(False, worst, errors, said + ", and the same bits were asked for")
    if math.isinf(worst):
        infinite = next(index for index in suspects if math.isinf(errors[index].relative))
        return Verdict(False, worst, errors, f"{names[infinite]} is off where the original is zero or not finite")
    exact = None
    if reference is not None:
        try:
            exact = reference()
        except Exception as error:
            said += f" (and the model does not run in float64: {type(error).__name__}: {str(error).splitlines()[0]})"
    if exact is None or len(exact) != len(expected):
        return Verdict(False, worst, errors, said)
    return _settle(expected, actual, exact, errors, {index: names[index] for index in suspects})


def _rounding(expected: Any) -> float:
    return ROUNDING_UNITS * unit(expected.dtype) if isinstance(expected, torch.Tensor) else 0.0


def _settle(
    expected: Sequence[Any],
    actual: Sequence[Any],
    exact: Sequence[Any],
    errors: tuple[OutputError, ...],
    suspects: dict[int, str],
) -> Verdict:
    worst = max(error.relative for error in errors)
    largest = (0.0, 0.0)
    for index, name in suspects.items():
        original = relative_error(exact[index], expected[index])
        compiled = relative_error(exact[index], actual[index])
        largest = max(largest, (compiled, original))
        if compiled > REFERENCE_FACTOR * original + ROUNDING_UNITS * unit(expected[index].dtype):
            reason = (
                f"{name} misses the float64 reference by {compiled:.1e}, the original by {original:.1e} only"
            )
            return Verdict(False, worst, errors, reason, original, compiled)
    return Verdict(True, worst, errors, "", largest[1], largest[0])

"""What a user may have meant by a number: True is none."""

import math
from numbers import Integral, Real
from typing import Any, TypeGuard


def is_number(value: Any) -> bool:
    """Whether it is a finite real number, that a float can hold."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is an integer, of numpy too."""
    return isinstance(value, Integral) and not isinstance(value, bool)

"""An attribute that is computed when it is first asked for, and takes no lock for it.

``functools.cached_property`` takes one in Python 3.11, and one for all objects of a class: a child that was
forked while another thread held it would wait for it for ever. Here two threads may both compute, and get
equal values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

Value = TypeVar("Value")


class Once(Generic[Value]):
    """Makes a method of one object such an attribute.

    Args:
        compute: the method.
    """

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self.__doc__ = compute.__doc__
        self._compute = compute
        self._name = compute.__name__

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...

    def __get__(self, instance: object | None, owner: type) -> Self | Value:
        if instance is None:
            return self
        value = self._compute(instance)
        # It hides this from the next one who asks.
        instance.__dict__[self._name] = value
        return value

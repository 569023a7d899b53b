"""A state whose tensors are verified when they are first touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar, overload


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """Stands for a tensor until somebody asks for it."""

    label: str


class LazyMapping(Mapping[Any, Any]):
    """A dict of a state that was loaded lazily. Reading a value verifies the tensors in it, once each.

    Args:
        content: keys and values; tensors in it are :class:`Untouched`.
        touch: label -> the verified array.
    """

    def __init__(self, content: Mapping[Any, Any], touch: Callable[[str], Any]) -> None:
        self._content = content
        self._touch = touch

    def __getitem__(self, key: Any) -> Any:
        return self._touched(self._content[key])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self._content)})"

    def copy(self) -> dict[Any, Any]:
        """Plain dicts at every level, for who changes what they copied; it touches everything."""
        return {key: _plain(value) for key, value in self.items()}

    def _touched(self, value: Any) -> Any:
        if isinstance(value, LazyTensor):
            return self._touch(value.label)
        if isinstance(value, dict):
            return LazyMapping(value, self._touch)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._touched, value))
        return value


def _plain(value: Any) -> Any:
    if isinstance(value, LazyMapping):
        return value.copy()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value


Value = TypeVar("Value")


class lockfree_cached_property(Generic[Value]):  # noqa: N801 - it is used as a decorator
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

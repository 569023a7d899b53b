"""Values computed on first access: tensors that are verified when read, and cached properties."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A placeholder for a tensor that is not verified yet."""

    label: str


class LazyMapping(Mapping[Any, Any]):
    """A dict of a lazily loaded state, with :class:`LazyTensor` for tensors. Reading verifies them."""

    def __init__(self, content: Mapping[Any, Any], load_tensor: Callable[[str], Any]) -> None:
        self._content = content
        self._load_tensor = load_tensor  # label -> verified array; caches its results

    def __getitem__(self, key: Any) -> Any:
        return self._resolve(self._content[key])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self._content)})"  # keys only: values would be read from disk

    def copy(self) -> dict[Any, Any]:
        """Return a plain dict, nested ones included; this verifies every tensor."""
        return {key: self._resolve(value, plain=True) for key, value in self._content.items()}

    def _resolve(self, value: Any, *, plain: bool = False) -> Any:
        if isinstance(value, LazyTensor):
            return self._load_tensor(value.label)
        if isinstance(value, dict):
            mapping = LazyMapping(value, self._load_tensor)  # nested dicts stay lazy, unless copied
            return mapping.copy() if plain else mapping
        if isinstance(value, (list, tuple)):
            return type(value)([self._resolve(item, plain=plain) for item in value])
        return value


Value = TypeVar("Value")


class lockfree_cached_property(Generic[Value]):  # noqa: N801 - used as a decorator
    """A cached property without the lock of ``functools.cached_property`` in Python 3.11.

    All instances share that lock: a child forked while another thread held it would wait forever. Here two
    threads may compute a value twice; both results are equal.
    """

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self.__doc__ = compute.__doc__
        self._compute = compute
        self._name = compute.__name__

    def __get__(self, instance: object | None, owner: type) -> Value:
        if instance is None:
            return self  # type: ignore[return-value]  # help() and inspect look it up on the class
        value = self._compute(instance)
        # A non-data descriptor: from now on the instance's own attribute hides it.
        instance.__dict__[self._name] = value
        return value

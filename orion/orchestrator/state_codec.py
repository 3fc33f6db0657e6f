"""The canonical form of a state: what a snapshot holds, and what a state's digest is taken of.

Pure. A codec is compiled once from the type hints of a tree of dataclasses; a hint that has no form is a mistake of
ours and raises TypeError at once, so that no part of a state can be left out unnoticed. Equal states have equal bytes.
Dicts keep the order in which they were filled, because rules walk them in that order: what is decoded behaves as what
was encoded. An object that is reached on two ways (a member by its hotkey and by its stage) is one object afterwards,
too, if its class is named as shared.

The names of all fields go along, so that a later version may add a field that has a default; any other difference is
found before anything is built, and refused.
"""

import json
from array import array
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Generic, NewType, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from orion.common.errors import DataError

State = TypeVar("State")

_Seen = dict[int, int]
"""Shared objects that were met, by identity, and their number in order of appearance."""
_Encode = Callable[[Any, _Seen], Any]


class _Array(Generic[State]):
    """Stands for `array` in type hints, which Python 3.11 cannot subscript."""


class _Reading:
    """One decoding: the fields that the data holds of each class, and the shared objects so far."""

    def __init__(self, names: dict[str, list[str]]) -> None:
        self.names = names
        self.shared: list[object] = []


_Decode = Callable[[Any, _Reading], Any]


@dataclass(frozen=True, slots=True)
class _Form:
    """How values of one type become JSON and come back; None: they are JSON already."""

    encode: _Encode | None
    decode: _Decode | None


_PLAIN = _Form(None, None)


class StateCodec(Generic[State]):
    """Encodes states whose root is one class."""

    def __init__(self, root: type[State], shared: Iterable[type] = ()) -> None:
        """`shared` are the classes whose objects may be reached on several ways. Raises TypeError for a hint that has
        no canonical form."""
        self._shared = frozenset(shared)
        self._forms: dict[Any, _Form] = {}
        self._names: dict[str, list[str]] = {}
        self._root = self._form_of(root)

    def encode(self, state: State) -> bytes:
        """The canonical form."""
        assert self._root.encode is not None
        tree = {"fields": self._names, "state": self._root.encode(state, {})}
        return json.dumps(tree, separators=(",", ":")).encode()

    def decode(self, data: bytes) -> State:
        """The state that `encode` made the data of. Raises DataError for any other data."""
        assert self._root.decode is not None
        try:
            tree = json.loads(data)
            self._check_names(tree["fields"])
            decoded: State = self._root.decode(tree["state"], _Reading(tree["fields"]))
        except (AssertionError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"not a state of this version: {error}") from error
        return decoded

    def _check_names(self, names: dict[str, list[str]]) -> None:
        if names.keys() - self._names.keys():
            raise DataError(f"a state with {sorted(names.keys() - self._names.keys())}, which this version has not")
        for name, held in names.items():
            if unknown := set(held) - set(self._names[name]):
                raise DataError(f"a state whose {name} has {sorted(unknown)}, which this version does not know")

    # --- one form for each kind of type ---

    def _form_of(self, hint: Any) -> _Form:
        while isinstance(hint, NewType):
            hint = hint.__supertype__
        if hint not in self._forms:
            self._forms[hint] = self._make(hint)
        return self._forms[hint]

    def _make(self, hint: Any) -> _Form:
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, UnionType):
            return self._union(arguments)
        if origin is dict:
            return _dict(self._form_of(arguments[0]), self._form_of(arguments[1]))
        if origin is tuple and arguments[-1] is not Ellipsis:
            return _fixed([self._form_of(argument) for argument in arguments])
        if origin in (list, deque, tuple):
            return _sequence(origin, self._form_of(arguments[0]))
        if origin is _Array:
            return _Form(lambda value, _: [value.typecode, b64encode(value.tobytes()).decode()], _array_from)
        if hint in (bool, int, float, str, NoneType):
            return _PLAIN
        if not isinstance(hint, type):
            raise TypeError(f"{hint} has no canonical form")
        return self._make_class(hint)

    def _make_class(self, hint: type) -> _Form:
        if issubclass(hint, Enum):
            return _Form(lambda value, _: value.value, lambda value, _: hint(value))
        if issubclass(hint, BaseModel):
            return _Form(lambda value, _: value.model_dump_json(), lambda value, _: hint.model_validate_json(value))
        if is_dataclass(hint):
            return self._dataclass(hint)
        raise TypeError(f"a {hint.__name__} has no canonical form")

    def _union(self, members: tuple[Any, ...]) -> _Form:
        others = [member for member in members if member is not NoneType]
        forms = [self._form_of(member) for member in others]
        if len(others) == 1:
            form = forms[0]
        elif all(each is _PLAIN for each in forms):
            return _PLAIN
        elif all(is_dataclass(member) for member in others):
            form = _tagged({member.__name__: form for member, form in zip(others, forms, strict=True)})
        else:
            raise TypeError(f"{members} cannot be told apart")
        return form if len(others) == len(members) else _optional(form)

    def _dataclass(self, cls: type[Any]) -> _Form:
        if cls.__name__ in self._names:
            raise TypeError(f"two classes are named {cls.__name__}")
        own = fields(cls)
        self._names[cls.__name__] = [field.name for field in own]
        hints = get_type_hints(cls, localns={"array": _Array})
        forms = {field.name: self._form_of(hints[field.name]) for field in own}
        encode, decode = _row_encoder(forms), _row_decoder(cls, own, forms)
        if cls not in self._shared:
            return _Form(encode, lambda row, reading: decode(object.__new__(cls), row, reading))
        return _Form(_encode_once(encode), _decode_once(cls, decode))


# --- dataclasses: a list of their fields' values ----------------------------------------------------------------------


def _row_encoder(forms: dict[str, _Form]) -> _Encode:
    parts = [(place, form.encode) for place, form in enumerate(forms.values()) if form.encode is not None]
    values_of = attrgetter(*forms) if forms else tuple
    is_single = len(forms) == 1

    def encode(value: Any, seen: _Seen) -> list[Any]:
        if not forms:
            return []
        row = [values_of(value)] if is_single else list(values_of(value))
        for place, encode_part in parts:
            row[place] = encode_part(row[place], seen)
        return row

    return encode


_Fill = Callable[[Any, list[Any], _Reading], Any]


def _row_decoder(cls: type, own: tuple[Field[Any], ...], forms: dict[str, _Form]) -> _Fill:
    name = cls.__name__
    put = object.__setattr__  # frozen ones, too

    def fill(empty: Any, row: list[Any], reading: _Reading) -> Any:
        names = reading.names[name]
        if len(row) != len(names):
            raise ValueError(f"{len(row)} values for a {name}, not {len(names)}")
        for field_name, value in zip(names, row, strict=True):
            decode = forms[field_name].decode
            put(empty, field_name, value if decode is None else decode(value, reading))
        if len(names) < len(own):
            for field in own:
                if field.name not in names:
                    put(empty, field.name, _default(cls, field))
        return empty

    return fill


def _default(cls: type, field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    if field.default_factory is not MISSING:
        return field.default_factory()
    raise ValueError(f"a {cls.__name__} without {field.name}")


def _encode_once(encode: _Encode) -> _Encode:
    """The first time as it is, from then on by its number."""

    def encode_shared(value: Any, seen: _Seen) -> Any:
        number = seen.get(id(value))
        if number is not None:
            return number
        seen[id(value)] = len(seen)
        return encode(value, seen)

    return encode_shared


def _decode_once(cls: type, fill: _Fill) -> _Decode:
    def decode_shared(value: Any, reading: _Reading) -> Any:
        if isinstance(value, int):
            found = reading.shared[value]
            if not isinstance(found, cls):
                raise ValueError(f"number {value} is no {cls.__name__}")
            return found
        empty: Any = object.__new__(cls)
        reading.shared.append(empty)
        return fill(empty, value, reading)

    return decode_shared


def _tagged(forms: dict[str, _Form]) -> _Form:
    def encode(value: Any, seen: _Seen) -> list[Any]:
        name = type(value).__name__
        encode_member = forms[name].encode
        assert encode_member is not None
        return [name, encode_member(value, seen)]

    def decode(value: Any, reading: _Reading) -> Any:
        name, row = value
        decode_member = forms[name].decode
        assert decode_member is not None
        return decode_member(row, reading)

    return _Form(encode, decode)


# --- containers -------------------------------------------------------------------------------------------------------


def _optional(form: _Form) -> _Form:
    encode, decode = form.encode, form.decode
    if encode is None or decode is None:
        return form
    return _Form(
        lambda value, seen: None if value is None else encode(value, seen),
        lambda value, reading: None if value is None else decode(value, reading),
    )


def _all_encoded(form: _Form, values: Iterable[Any], seen: _Seen) -> list[Any]:
    encode = form.encode
    return list(values) if encode is None else [encode(value, seen) for value in values]


def _all_decoded(form: _Form, values: list[Any], reading: _Reading) -> list[Any]:
    if not isinstance(values, list):
        raise TypeError("a list is missing")
    decode = form.decode
    return values if decode is None else [decode(value, reading) for value in values]


def _sequence(kind: type, item: _Form) -> _Form:
    def encode(value: Any, seen: _Seen) -> list[Any]:
        items = _all_encoded(item, value, seen)
        return [value.maxlen, items] if kind is deque else items

    def decode(value: Any, reading: _Reading) -> Any:
        if kind is deque:
            longest, items = value
            return deque(_all_decoded(item, items, reading), longest)
        decoded = _all_decoded(item, value, reading)
        return tuple(decoded) if kind is tuple else decoded

    return _Form(encode, decode)


def _fixed(items: list[_Form]) -> _Form:
    def encode(value: Any, seen: _Seen) -> list[Any]:
        return [
            part if form.encode is None else form.encode(part, seen) for form, part in zip(items, value, strict=True)
        ]

    def decode(value: Any, reading: _Reading) -> tuple[Any, ...]:
        return tuple(
            part if form.decode is None else form.decode(part, reading) for form, part in zip(items, value, strict=True)
        )

    return _Form(encode, decode)


def _dict(key: _Form, item: _Form) -> _Form:
    def encode(value: dict[Any, Any], seen: _Seen) -> list[list[Any]]:
        return [_all_encoded(key, value, seen), _all_encoded(item, value.values(), seen)]

    def decode(value: Any, reading: _Reading) -> dict[Any, Any]:
        keys, items = value
        return dict(zip(_all_decoded(key, keys, reading), _all_decoded(item, items, reading), strict=True))

    return _Form(encode, decode)


def _array_from(value: Any, _: _Reading) -> "array[Any]":
    typecode, content = value
    return array(typecode, b64decode(content))

"""Reads Thrift's compact protocol within bounds, and writes the little of it that a footer needs.

A struct is a dict by field number of int, bytes, list or dict; booleans are 0 and 1. Only what Parquet uses
is read.
"""

from __future__ import annotations

from pipeline.types import PalisadeError

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
MAX_DEPTH = 12  # of nested structs; Parquet has 6

Struct = dict[int, "int | bytes | list[object] | Struct"]


class BadThrift(PalisadeError, ValueError):
    """Bytes that hold no valid struct."""


def read_struct(data: bytes, at: int) -> tuple[Struct, int]:
    """Returns the struct at ``at`` and where it ends; raises BadThrift."""
    try:
        return _struct(data, at, 0)
    except IndexError:
        raise BadThrift("cut off") from None


def integer(struct: Struct, field: int, default: int | None = None) -> int:
    """Returns an integer field; raises BadThrift if it is missing without a default, or of another type."""
    value = struct.get(field, default)
    if not isinstance(value, int):
        raise BadThrift(f"field {field} is no integer")
    return value


def binary(struct: Struct, field: int) -> bytes:
    """Returns a byte field, empty if it is missing."""
    value = struct.get(field, b"")
    if not isinstance(value, bytes):
        raise BadThrift(f"field {field} is no text")
    return value


def child(struct: Struct, field: int) -> Struct:
    """Returns a struct field, empty if it is missing."""
    value = struct.get(field, {})
    if not isinstance(value, dict):
        raise BadThrift(f"field {field} is no struct")
    return value


def children(struct: Struct, field: int) -> list[Struct]:
    """Returns a list of structs, empty if it is missing."""
    value = struct.get(field, [])
    structs = [v for v in value if isinstance(v, dict)] if isinstance(value, list) else None
    if structs is None or len(structs) != len(value):  # pyright: ignore[reportArgumentType]
        raise BadThrift(f"field {field} is no list of structs")
    return structs


def write_struct(fields: dict[int, tuple[int, object]]) -> bytes:
    """Encodes a struct that is given as (type, value) by field number.

    The value of a list is (type of its items, items).
    """
    out, last = bytearray(), 0
    for number, (kind, value) in sorted(fields.items()):
        out.append((number - last) << 4 | kind)  # no struct here skips more than 15 numbers
        out += _encode(kind, value)
        last = number
    out.append(0)
    return bytes(out)


def _struct(data: bytes, at: int, depth: int) -> tuple[Struct, int]:
    if depth > MAX_DEPTH:
        raise BadThrift("nested too deep")
    fields: Struct = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _zigzag(data, at)
        if number in fields:  # readers differ in which one counts
            raise BadThrift(f"field {number} is repeated")
        kind = head & 15
        if kind in (TRUE, FALSE):
            fields[number] = int(kind == TRUE)
        else:
            fields[number], at = _value(data, at, kind, depth)  # pyright: ignore[reportArgumentType]
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[object, int]:
    if kind in (I16, I32, I64):
        return _zigzag(data, at)
    if kind == BINARY:
        length, at = _varint(data, at)
        if length > len(data) - at:
            raise BadThrift("cut off")
        return data[at : at + length], at + length
    if kind == STRUCT:
        return _struct(data, at, depth + 1)
    if kind == LIST:
        return _list(data, at, depth)
    if kind in (TRUE, FALSE, BYTE):  # booleans have a byte of their own only in lists
        return data[at], at + 1
    if kind == DOUBLE:
        return 0, at + 8
    raise BadThrift(f"type {kind}")


def _list(data: bytes, at: int, depth: int) -> tuple[list[object], int]:
    head = data[at]
    at += 1
    length, kind = head >> 4, head & 15
    if length == 15:
        length, at = _varint(data, at)
    if length > len(data) - at or depth >= MAX_DEPTH:  # an item has at least a byte
        raise BadThrift("cut off")
    items: list[object] = []
    for _ in range(length):
        item, at = _value(data, at, kind, depth + 1)
        items.append(item)
    return items, at


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise BadThrift("integer too long")


def _encode(kind: int, value: object) -> bytes:
    if kind == STRUCT and isinstance(value, dict):
        return write_struct(value)
    if kind == BINARY and isinstance(value, bytes):
        return _varint_bytes(len(value)) + value
    if kind == LIST and isinstance(value, tuple):
        item, items = value
        head = (
            bytes([len(items) << 4 | item])
            if len(items) < 15
            else bytes([15 << 4 | item]) + _varint_bytes(len(items))
        )
        return head + b"".join(_encode(item, v) for v in items)
    assert kind in (I16, I32, I64)
    assert isinstance(value, int)
    return _varint_bytes(value << 1 if value >= 0 else (-value << 1) - 1)


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)

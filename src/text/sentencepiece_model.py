"""The bytes of a sentencepiece model, written and read without protobuf: its pieces, and how text is put into them.

Messages and numbers of fields are those of sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
BPE, CHAR = 2, 4  # types of models; one of single characters merges nothing

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of ModelProto
_TEXT, _SCORE, _TYPE = 1, 2, 3  # of a piece
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35  # of trainer_spec, and ids with the pieces that they name
_SPECIAL = {"unknown": (40, 45), "bos": (41, 46), "eos": (42, 47), "padding": (43, 48)}
_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5  # of normalizer_spec


class SpmPiece(NamedTuple):
    """A piece as the file writes it, its score and its type."""

    text: str
    score: float
    kind: int


class SpmModel(NamedTuple):
    """What a model says. puts_space: a space is put before a text; replaces, squeezes: a table replaces characters, and
    repeated spaces become one."""

    pieces: list[SpmPiece]
    puts_space: bool
    kind: int = BPE
    replaces: bool = False
    squeezes: bool = False


def to_bytes(model: SpmModel, ids: Mapping[str, int | None]) -> bytes:
    """The file of a model that leaves characters and spaces as they are. ids: of unknown, bos, eos and padding."""
    pieces = b"".join(
        _field(_PIECES, _field(_TEXT, text) + _field(_SCORE, score) + _field(_TYPE, kind))
        for text, score, kind in model.pieces
    )
    trainer = _field(_MODEL_TYPE, model.kind) + _field(_VOCAB_SIZE, len(model.pieces))
    trainer += _field(_BYTE_FALLBACK, any(piece.kind == BYTE for piece in model.pieces))
    for name, (id_field, piece_field) in _SPECIAL.items():
        index = ids[name]
        trainer += _field(id_field, -1 if index is None else index)
        trainer += b"" if index is None else _field(piece_field, model.pieces[index].text)
    normalizer = _field(_NAME, "identity") + _field(_DUMMY_PREFIX, model.puts_space)
    normalizer += _field(_REMOVE_SPACES, False) + _field(_ESCAPE_SPACES, True)
    return pieces + _field(_TRAINER, trainer) + _field(_NORMALIZER, normalizer)


def from_bytes(data: bytes) -> SpmModel:
    """The model in a file that the library has opened."""
    fields = list(_fields(data))
    # a message that stands several times is merged, as by protobuf: later fields rule over earlier ones
    trainer, normalizer = (
        dict(_fields(b"".join(part for number, part in fields if number == spec))) for spec in (_TRAINER, _NORMALIZER)
    )
    parts = [dict(_fields(part)) for number, part in fields if number == _PIECES]
    return SpmModel(
        [SpmPiece(part[_TEXT].decode(), part.get(_SCORE, 0.0), part.get(_TYPE, NORMAL)) for part in parts],
        puts_space=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        kind=trainer.get(_MODEL_TYPE, 1),
        replaces=bool(normalizer.get(_CHARSMAP)),
        squeezes=bool(normalizer.get(_REMOVE_SPACES, 1)),
    )


def _field(number: int, value: int | float | str | bytes) -> bytes:
    """One field of a message (protobuf.dev/programming-guides/encoding)."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value % 2**64)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all bytes but the last have the eighth."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Number and value of each field of a message; what is of a fixed size is a float."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _read_varint(data, at)
            yield number, value
            continue
        size, at = _read_varint(data, at) if wire == 2 else (4 if wire == 5 else 8, at)
        part = data[at : at + size]
        at += size
        yield number, part if wire == 2 else struct.unpack("<f" if wire == 5 else "<d", part)[0]


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and the place after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at

"""What a sentencepiece model says: its pieces, and how text is put into them. Read and written as protobuf."""

from collections.abc import Mapping
from typing import NamedTuple

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
BPE, CHAR = TrainerSpec.BPE, TrainerSpec.CHAR  # types of models; one of single characters merges nothing
# the fields of a special piece's id and text, by llama.cpp's name of it
_SPECIAL = {"unknown": "unk", "bos": "bos", "eos": "eos", "padding": "pad"}


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
    proto = ModelProto()
    for text, score, kind in model.pieces:
        proto.pieces.add(piece=text, score=score, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size = model.kind, len(model.pieces)
    trainer.byte_fallback = any(piece.kind == BYTE for piece in model.pieces)
    for name, field in _SPECIAL.items():
        index = ids[name]
        setattr(trainer, f"{field}_id", -1 if index is None else index)
        if index is not None:
            setattr(trainer, f"{field}_piece", model.pieces[index].text)
    normalizer.name, normalizer.add_dummy_prefix = "identity", model.puts_space
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return proto.SerializeToString(deterministic=True)


def from_bytes(data: bytes) -> SpmModel:
    """The model in a file that the library has opened."""
    proto = ModelProto.FromString(data)
    normalizer = proto.normalizer_spec
    return SpmModel(
        [SpmPiece(piece.piece, piece.score, piece.type) for piece in proto.pieces],
        puts_space=normalizer.add_dummy_prefix,
        kind=proto.trainer_spec.model_type,
        replaces=bool(normalizer.precompiled_charsmap),
        squeezes=normalizer.remove_extra_whitespaces,
    )

"""What a tiktoken file leaves out: the merges that its ranks stand for, spelled in GPT-2's letters for bytes."""

import itertools
from collections.abc import Mapping

# Printable bytes stand for themselves, the others for the characters from 256 on.
_SHOWN = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
_LETTERS = {byte: chr(byte) for byte in _SHOWN} | {byte: chr(256 + at) for at, byte in enumerate(_HIDDEN)}


def spelled(token: bytes) -> str:
    """A token as byte-level BPE writes it."""
    return "".join(_LETTERS[byte] for byte in token)


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts of each token, by rank: what lower ranks make of its bytes. A token of which they leave more than
    two parts has none: only a whole piece of text becomes it."""
    merges = []
    for token, rank in ranks.items():
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            if min(pairs) >= rank:
                break
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges

"""Text to token ids and back: the only door to tokenizer libraries."""

from pathlib import Path

from sentencepiece import SentencePieceProcessor

from src.errors import UserError


class Tokenizer:
    """A sentencepiece vocabulary. Ids carry no special tokens unless a caller adds them."""

    def __init__(self, path: Path) -> None:
        """Raises UserError when the file is missing or no sentencepiece model."""
        if not path.is_file():
            raise UserError(
                f"{path} does not exist; give checkpoint_split.py a --tokenizer_file (sentencepiece)"
            )
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path} is not a sentencepiece model; only those are supported so far") from None
        self.path = path
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{path} has no <s> or </s> piece; training and decoding need both")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS. Raises UserError on text that is not valid Unicode."""
        try:
            text.encode()  # sentencepiece's own complaint names no reason
        except UnicodeEncodeError as problem:
            raise UserError(
                f"text holds a lone surrogate at character {problem.start}; it is not valid Unicode"
            ) from None
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; special tokens vanish, and so do ids of a model's padded vocabulary."""
        return self._model.decode([index for index in ids if index < self.vocab_size])

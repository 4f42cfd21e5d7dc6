"""A tokenizer with more control tokens than it came with."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from src.errors import UserError
from src.text.tokenizer import Tokenizer
from src.text.vocabulary import read_json

CONFIG = "tokenizer_config.json"


def add_control_tokens(files: Sequence[Path], folder: Path, tokens: Sequence[str]) -> int:
    """Copy a tokenizer's files to a folder and give it control tokens behind its vocabulary. -> the id of the first.

    They stand in tokenizer_config.json, where transformers finds them too. Raises UserError if one is there already.
    """
    for file in files:
        shutil.copyfile(file, folder / file.name)
    tokenizer = Tokenizer(folder)
    known = [token for token in tokens if token in tokenizer.control]
    if known:
        raise UserError(f"{files[0].parent}: the tokenizer has '{known[0]}' already; nothing is to be added")
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    entries = {
        str(tokenizer.vocab_size + place): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for place, token in enumerate(tokens)
    }
    config["added_tokens_decoder"] = (config.get("added_tokens_decoder") or {}) | entries
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return tokenizer.vocab_size

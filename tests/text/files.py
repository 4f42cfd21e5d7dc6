"""Small real tokenizers of every kind, trained or written in the test."""

import base64
import io
import itertools
import json
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceTrainer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "Natalia sold 48 clips in April, and then she sold half as many in May.",
    "What is 12 + 7? The answer is 19, because 12 + 7 = 19.",
    "user assistant system model\nYou are a helpful assistant.\n\n#### 72",
    "Let $x = \\frac{1}{2}$; then $x^2 = \\frac{1}{4}$.  So   the result is 5 + 5 = 10.",
]
TEXTS = [
    "",
    " ",
    "a",
    " a",
    "  two  spaces  ",
    "What is 12+345?\n\n#### 357",
    "\ttab\r\nand\n\n\n lines ",
    "é ü ß — “quotes” 中文 🙂👩‍👩‍👧 \u200b\x00\x07",
    "$\\frac{1}{2}$ isn't 1/2's friend",
    "x" * 300,
]
CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]


def write_json(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


def write_sentencepiece(folder: Path, name: str = "tokenizer.model", **options: object) -> Path:
    """Byte-fallback BPE as Llama 2's. As in Gemma's, the turn tokens are user-defined pieces that any text may hit."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(CORPUS * 4),
            "model_writer": model,
            "model_type": "bpe",
            "vocab_size": 420,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "user_defined_symbols": CONTROL[2:],
            "minloglevel": 2,
        }
        | options
    )
    (folder / name).write_bytes(model.getvalue())
    return folder / name


def write_ranks(path: Path, n: int = 128000) -> Path:
    """A tiktoken file of n ranks: every byte, every pair of bytes, and as many triples as are needed."""
    everything = itertools.chain.from_iterable(
        itertools.product(range(256), repeat=size) for size in (1, 2, 3)
    )
    lines = (
        f"{base64.b64encode(bytes(piece)).decode()} {rank}\n"
        for rank, piece in enumerate(itertools.islice(everything, n))
    )
    path.write_text("".join(lines))
    return path


def byte_level(control: list[str]) -> tokenizers.Tokenizer:
    """A trained byte-level BPE whose control tokens come first."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(CORPUS, trainer)
    return model


def write_tokenizer_json(folder: Path, **config: object) -> Path:
    """tokenizer.json that puts <s> before a sequence, and its tokenizer_config.json."""
    model = byte_level(CONTROL)
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.add_tokens(["<think>"])
    model.enable_truncation(4)  # settings of whoever saved the file
    model.enable_padding(length=8)
    model.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"} | config)
    return folder / "tokenizer.json"


def write_merges(folder: Path, tokenizer_class: str = "Qwen2Tokenizer", **config: object) -> Path:
    """vocab.json, merges.txt and a tokenizer_config.json as Qwen 2 has them: control tokens behind the vocabulary."""
    model = json.loads(byte_level([]).to_str())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    size = len(model["vocab"])
    decoder = {str(size + index): {"content": token, "special": True} for index, token in enumerate(CONTROL)}
    decoder[str(size + len(CONTROL))] = {"content": "<think>", "special": False}
    values = {
        "tokenizer_class": tokenizer_class,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": decoder,
    }
    write_json(folder / "tokenizer_config.json", values | config)
    return folder / "vocab.json"


WRITERS = {
    "sentencepiece": write_sentencepiece,
    "tiktoken": lambda folder: write_ranks(folder / "tokenizer.model"),
    "tokenizer.json": write_tokenizer_json,
    "vocab.json and merges.txt": write_merges,
}

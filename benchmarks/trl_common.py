"""What our use of trl's trainers has in common: a tokenizer of numbers, when steps end, what a run of PPO is given."""

from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from benchmarks.paired import Watch


class Setting(NamedTuple):
    """What a run of PPO or GRPO is given."""

    folder: Path
    prompts: list[list[int]]  # of all iterations, equally long
    vocab_size: int
    episodes: int  # of an iteration
    micro: int  # episodes of a training forward pass
    response: int  # tokens at most
    epochs: int
    iterations: int
    lr: float
    bf16: bool
    given: Tensor | None  # [B, S] episodes to learn from instead of sampled ones


class Clock(TrainerCallback):
    """Notes when steps end, of which a step of the watch has n."""

    def __init__(self, watch: Watch, n: int = 1) -> None:
        self.watch, self.n, self.done = watch, n, 0

    def on_step_begin(self, *_: object, **__: object) -> None:
        """The first step's beginning, unless the watch runs."""
        if not self.watch.times:
            self.watch.start()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Every optimizer step's end."""
        self.done += 1
        if self.done % self.n == 0:
            self.watch.tick()


def words(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a word for each id: 0 is padding, 1 ends a response, 1217 is "1217"."""
    # special tokens are found inside of words, too, so they are no numbers
    special = {"<pad>": 0, "<eos>": 1}
    model = Tokenizer(WordLevel(special | {str(index): index for index in range(2, vocab_size)}, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side="left"
    )

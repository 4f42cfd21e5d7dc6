"""Other libraries' decoding, each as a function from a workload to its tokens: transformers, ctranslate2, llama.cpp."""

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

GGUF_TYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "q8_0"}  # as checkpoint_split.py --dtype says


class Workload(NamedTuple):
    """What to decode: prompts, the tokens each sample of each gets, and whether greedily."""

    prompts: list[list[int]]
    lengths: list[list[int]]  # by prompt, by sample
    greedy: bool

    @property
    def n_tokens(self) -> int:
        """Tokens to decode, prompts left out."""
        return sum(map(sum, self.lengths))


Decode = Callable[[Workload], list[list[int]]]  # the tokens by prompt and sample
INSTALL = {
    "ctranslate2": "pip install ctranslate2==4.8.0",
    "llama_cpp": "CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary :all: llama-cpp-python==0.3.36",
}


def check_installed(system: str) -> None:
    """Raise SystemExit if the library of a system is missing, with the line that installs it."""
    module = {"llama.cpp": "llama_cpp"}.get(system, system)
    if module in INSTALL and not importlib.util.find_spec(module):
        raise SystemExit(f"{system} is not installed; {INSTALL[module]}, or leave it out of --systems")


def has(system: str, precision: str) -> bool:
    """Whether a system computes in this precision on this processor; says so where ctranslate2 would take another."""
    if system == "ctranslate2":
        import ctranslate2

        types = ctranslate2.get_supported_compute_types("cpu")
        if precision not in types:
            print(f"ctranslate2 has no {precision} on this processor, only {', '.join(sorted(types))}")
        return precision in types
    return precision != "int8" or system in ("ours", "unshared", "llama.cpp")


def one_row_each(work: Workload) -> list[int]:
    """The tokens that each prompt gets. Raises SystemExit where a prompt has several samples."""
    if not work.greedy:
        raise SystemExit("ctranslate2 and llama.cpp decode greedily here; give --systems without them")
    return [length for (length,) in work.lengths]


def transformers(folder: Path, system: str, dtype: torch.dtype) -> Decode:
    """generate() with a dynamic or static cache, or continuous batching, which sizes its cache itself."""
    from transformers import GenerationConfig, LlamaForCausalLM, StoppingCriteria
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=dtype, attn_implementation="sdpa").eval()

    class RowLengths(StoppingCriteria):
        """Each row ends at its own length, as EOS would end it."""

        def __init__(self, prompt_length: int, lengths: torch.Tensor) -> None:
            self.ends = prompt_length + lengths

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            return input_ids.shape[1] >= self.ends

    def config(work: Workload, **settings: object) -> GenerationConfig:
        longest = max(map(max, work.lengths))
        sampling = {"do_sample": False} if work.greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        return GenerationConfig(max_new_tokens=longest, eos_token_id=[], pad_token_id=0, **sampling, **settings)

    def run(work: Workload) -> list[list[int]]:
        lengths = torch.tensor(work.lengths)
        longest = max(map(len, work.prompts))
        rows = [torch.tensor([0] * (longest - len(prompt)) + prompt) for prompt in work.prompts]
        mask = torch.stack([torch.arange(longest) >= longest - len(prompt) for prompt in work.prompts]).long()
        settings = {"cache_implementation": "static", "disable_compile": True} if system == "static" else {}
        out = model.generate(
            torch.stack(rows), attention_mask=mask,
            generation_config=config(work, num_return_sequences=lengths.shape[1], **settings),
            stopping_criteria=[RowLengths(longest, lengths.flatten())],
        )
        return [row[longest : longest + n].tolist() for row, n in zip(out, lengths.flatten().tolist(), strict=True)]

    def run_continuously(work: Workload) -> list[list[int]]:
        samples = [(prompt, n) for prompt, ns in zip(work.prompts, work.lengths, strict=True) for n in ns]
        with model.continuous_batching_context_manager(generation_config=config(work)) as manager:
            for index, (prompt, n) in enumerate(samples):
                manager.add_request(prompt, request_id=str(index), max_new_tokens=n, eos_token_id=-1)
            found: dict[str, list[int]] = {}
            while len(found) < len(samples):
                result = manager.get_result(timeout=60)
                assert result is not None and not result.error, f"continuous batching gave {result}"
                if result.is_finished():
                    found[result.request_id] = result.generated_tokens
        return [found[str(index)] for index in range(len(samples))]

    return run_continuously if system == "continuous" else run


def prepare_ctranslate2(folder: Path, vocab_size: int) -> None:
    """Convert folder/hf by ctranslate2's own converter, which wants a tokenizer: here one with a word for each id."""
    import ctranslate2
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    # its ids are given as these words, never as text
    words = Tokenizer(WordLevel({str(index): index for index in range(vocab_size)}, unk_token="0"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="0", bos_token="1", eos_token="2"
    ).save_pretrained(folder / "hf")
    ctranslate2.converters.TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"))


def ctranslate2(folder: Path, precision: str, threads: int) -> Decode:
    """A Generator on all rows at once."""
    import ctranslate2

    model = ctranslate2.Generator(
        str(folder / "ct2"), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
    )

    def run(work: Workload) -> list[list[int]]:
        lengths, done = one_row_each(work), Counter()

        def ends(result: object) -> bool:
            done[result.batch_id] += 1
            return done[result.batch_id] >= lengths[result.batch_id]

        found = model.generate_batch(
            [list(map(str, prompt)) for prompt in work.prompts], max_length=max(lengths), min_length=max(lengths),
            include_prompt_in_result=False, callback=ends if len(set(lengths)) > 1 else None,
        )
        return [result.sequences_ids[0][:n] for result, n in zip(found, lengths, strict=True)]

    return run


def llama_cpp(folder: Path, precision: str, threads: int, rows: int, context: int) -> Decode:
    """llama.cpp by its C functions: one batch for the prompts, then one for each token of all rows.

    rows, context: sequences at once, and tokens of each at most. Its cache is in float16, its default.
    """
    import llama_cpp as lib

    def silent(*_: object) -> None:
        pass

    callback = lib.llama_log_callback(silent)
    lib.llama_log_set(callback, None)
    lib.llama_backend_init()
    loading = lib.llama_model_default_params()
    loading.use_extra_bufts = precision != "int8"  # its AMX kernel for Q8_0 ends by SIGSEGV on eight rows or more
    model = lib.llama_model_load_from_file(os.fsencode(folder / f"gguf-{precision}/model.gguf"), loading)
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max, settings.n_batch = rows * context, rows, rows * context
    settings.n_threads = settings.n_threads_batch = threads
    state = lib.llama_init_from_model(model, settings)
    batch = lib.llama_batch_init(rows * context, 0, 1)
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(tokens: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Compute tokens (row, position, id, whether its logits are asked for); the likeliest next id of these."""
        batch.n_tokens = len(tokens)
        for place, (row, position, token, asked) in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, asked
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
        assert lib.llama_decode(state, batch) == 0, "llama_decode failed"
        n_asked = sum(asked for *_, asked in tokens)
        logits = np.ctypeslib.as_array(lib.llama_get_logits(state), (n_asked, vocab_size))
        return logits.argmax(1).tolist()

    def run(work: Workload) -> list[list[int]]:
        lib.llama_memory_clear(lib.llama_get_memory(state), True)
        lengths = one_row_each(work)
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])  # rows that go on stay neighbours
        prompts = [work.prompts[row] for row in order]
        out = [[token] for token in decode([
            (row, position, token, position == len(prompt) - 1)
            for row, prompt in enumerate(prompts) for position, token in enumerate(prompt)
        ])]
        for step in range(1, max(lengths)):
            going = [row for row, index in enumerate(order) if lengths[index] > step]
            tokens = [(row, len(prompts[row]) + step - 1, out[row][-1], True) for row in going]
            for row, token in zip(going, decode(tokens), strict=True):
                out[row].append(token)
        return [tokens for _, tokens in sorted(zip(order, out, strict=True))]

    run.callback = callback  # the library calls it as long as it lives
    return run

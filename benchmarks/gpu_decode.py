"""Decoding speed of a random-weight model on a GPU, as a share of what its memory bandwidth allows.

python benchmarks/gpu_decode.py

For each batch size and way (eager, compiled; bfloat16, int8, int4): tokens/s, and the bytes of weights a step reads per
second beside the bandwidth of a large copy measured in the same run. transformers' generate() follows on the same
weights. Without a GPU a tiny model runs in float32, which shows that the script works and nothing else.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, ours is not

import checkpoint_split
from src import load, parallel
from src.command import cli
from src.inference.engine import Request, Vocabulary, generate
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.models.quantize import weight_bytes

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 512, "max_position_embeddings": 4096}  # fmt: skip
PROMPT_TOKENS = 32
WAYS = [("", False), ("", True), ("int8", False), ("int8", True), ("int4", False), ("int4", True)]


def prepare(folder: Path, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """A random Llama, for transformers and split for us."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(parallel.device()):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)
    model.save_pretrained(folder / "hf")
    config = checkpoint_split.SplitConfig(ckpt_file=str(folder / "hf"), save_path=str(folder / "ours"))
    checkpoint_split.main(config)


def seconds(run: Callable[[], object]) -> float:
    """Time of the second of two calls; the first compiles and warms up."""
    for _ in range(2):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        elapsed = time.perf_counter() - start
    return elapsed


def _wait() -> None:
    if parallel.device().type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    n = 2**30 if parallel.device().type == "cuda" else 2**26
    source = torch.zeros(n, dtype=torch.uint8, device=parallel.device())
    target = torch.empty_like(source)
    return 2 * n * 10 / seconds(lambda: [target.copy_(source) for _ in range(10)])


def our_time(model: Decoder, batch: int, n_tokens: int, compiled: bool) -> float:
    """Seconds a step: the difference between a long and a short decoding, so that prefill drops out."""

    def run(n: int) -> None:
        prompts = [[1 + (row + place) % 99 for place in range(PROMPT_TOKENS)] for row in range(batch)]
        requests = [Request(str(row), 0, prompt) for row, prompt in enumerate(prompts)]
        sampling = Sampling(max_new_tokens=n)
        list(generate(model, requests, sampling, vocabulary=Vocabulary(()), max_batch_size=batch, compiled=compiled))

    short = n_tokens // 4
    return (seconds(lambda: run(n_tokens)) - seconds(lambda: run(short))) / (n_tokens - short)


def their_time(folder: Path, dtype: torch.dtype, batch: int, n_tokens: int) -> float:
    """Seconds a step of transformers' generate()."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=dtype).to(parallel.device()).eval()
    tokens = torch.arange(batch * PROMPT_TOKENS, device=parallel.device()).view(batch, -1) % 99 + 1

    def run(n: int) -> None:
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, min_new_tokens=n,
                       do_sample=False, pad_token_id=0)  # fmt: skip

    short = n_tokens // 4
    return (seconds(lambda: run(n_tokens)) - seconds(lambda: run(short))) / (n_tokens - short)


def main(batches: list[int] = [1, 32, 384], n_tokens: int = 200, folder: str = "") -> None:  # noqa: B006 (shown by --help)
    """Print the table.

    batches: sequences that decode at once
    n_tokens: of each sequence
    folder: where the random weights lie or are put; default: a temporary directory
    """
    parallel.start()
    on_gpu = parallel.device().type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    device = torch.cuda.get_device_name() if on_gpu else "no GPU: a tiny float32 model on the CPU, eager only"
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        if not (place / "ours").is_dir():
            prepare(place, LLAMA_2_7B if on_gpu else TINY, dtype)
        bandwidth = copy_bandwidth()
        print(f"{device}, copy bandwidth {bandwidth / 1e9:.0f} GB/s")
        for precision, compiled in WAYS if on_gpu else [way for way in WAYS if not way[1]]:
            model = load.load_solver(str(place / "ours"), quantize=precision)
            for batch in batches:
                step = our_time(model, batch, n_tokens, compiled)
                print(f"{precision or str(dtype)[6:]:9} {'compiled' if compiled else 'eager':9} batch {batch:3d} "
                      f"{batch / step:9.1f} tokens/s  weights at {weight_bytes(model) / step / bandwidth:6.1%} of it")
            del model
        for batch in batches:
            step = their_time(place, dtype, batch, n_tokens)
            print(f"transformers' generate()  batch {batch:3d} {batch / step:9.1f} tokens/s")


if __name__ == "__main__":
    cli.run(main)

"""Decoding beside transformers, ctranslate2 and llama.cpp: the same random weights and prompts, a table a precision.

python benchmarks/decode.py --model 60M --workload equal,single --precisions float32,bfloat16,int8 \
    --systems dynamic,ctranslate2,llama.cpp

Every measurement runs in a process of its own, two short calls and then the timed one; sides take turns. Weights are
rounded to bfloat16, so that files of either type hold the same; ctranslate2 opens the Hugging Face directory as its
converter makes it, llama.cpp what checkpoint_split.py --format gguf writes (int8 is Q8_0 there). Both are optional:
pip install ctranslate2==4.8.0 and, compiled for this processor, CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary
:all: llama-cpp-python==0.3.36.

equal: 64 prompts of 64 tokens, 64 tokens each. ragged: 64 prompts of 16 to 121 tokens, lengths log-normal, cut at 512,
ended the same way everywhere, by a limit for each row. shared: ragged ones after the same 701 tokens, cut at 202; the
system "unshared" is ours, each prompt read whole. samples: 8 samples at temperature 1 for each of 16 prompts. single:
one prompt, 128 tokens. gap is the share of the first 8 greedy tokens of the rows that are not those of ours at
the same precision; random weights have many near ties, so 0.02 is allowed in float32, in bfloat16 and int8 0.5.
"""

import argparse
import gc
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoint_split  # noqa: E402
from benchmarks import decode_peers, paired  # noqa: E402
from benchmarks.decode_peers import GGUF_TYPES, Decode, Workload  # noqa: E402
from benchmarks.paired import ROOT, Run, Watch  # noqa: E402
from src import load, parallel  # noqa: E402
from src.inference.engine import Request, Vocabulary, generate  # noqa: E402
from src.inference.sampling import Sampling  # noqa: E402
from src.models import cache  # noqa: E402

MODELS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 1024},
    "5M": {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 8,
           "num_key_value_heads": 4, "vocab_size": 8192},
    "60M": {"hidden_size": 768, "intermediate_size": 1280, "num_hidden_layers": 8, "num_attention_heads": 12,
            "num_key_value_heads": 4, "vocab_size": 32000},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},  # SmolLM2's shape
}
COMPARED, ALLOWED = 8, {"float32": 0.02, "bfloat16": 0.5, "int8": 0.5}
CONTEXT = 1024


def workload(name: str, prompts: int, vocab_size: int) -> Workload:
    """The requests of a workload."""
    draw = random.Random(0)
    n_prompts, n_samples = {"samples": (prompts // 4, 8), "single": (1, 1)}.get(name, (prompts, 1))
    n_shared, most = (700, 202) if name == "shared" else (0, 512)
    shared = [1, *(draw.randrange(3, vocab_size) for _ in range(n_shared))]
    sizes = [63 if name == "equal" else draw.randint(15, 120) for _ in range(n_prompts)]
    texts = [shared + [draw.randrange(3, vocab_size) for _ in range(size)] for size in sizes]
    if name in ("equal", "single"):
        return Workload(texts, [[128 if name == "single" else 64]] * n_prompts, greedy=True)
    lengths = [[min(most, max(8, round(draw.lognormvariate(4.57, 0.75)))) for _ in range(n_samples)] for _ in texts]
    return Workload(texts, lengths, greedy=name != "samples")


def first_of(work: Workload, n: int) -> Workload:
    """A short workload of the same kind, to warm up on."""
    lengths = [[min(length, 8) for length in lengths] for lengths in work.lengths[:n]]
    return Workload(work.prompts[:n], lengths, work.greedy)


def ours(folder: Path, precision: str, slots: int, *, share: bool) -> Decode:
    """Decoding by src/inference/engine.py. share: prompts have their common beginning read once."""
    parallel.start()
    cache.LEAST_SHARED = cache.LEAST_SHARED if share else sys.maxsize
    how = {"quantize": "int8"} if precision == "int8" else {"precision": precision}
    model = load.load_solver(str(folder / "ours"), **how)

    def run(work: Workload) -> list[list[int]]:
        requests = [
            Request(str(index), sample, prompt, length)
            for index, (prompt, lengths) in enumerate(zip(work.prompts, work.lengths, strict=True))
            for sample, length in enumerate(lengths)
        ]
        sampling = Sampling(temperature=0.0 if work.greedy else 1.0, max_new_tokens=512)
        found = {
            (done.request.id, done.request.sample): done.tokens
            for done in generate(model, requests, sampling, vocabulary=Vocabulary((), model.config.vocab_size, str),
                                 max_batch_size=min(slots, len(requests)))
        }
        return [found[request.id, request.sample] for request in requests]

    return run


def prepare(folder: Path, model: str, precisions: Sequence[str], systems: Sequence[str]) -> None:
    """A random Llama in every form that is asked for. Tied to its embedding it would repeat a token for ever."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = MODELS[model] | {"max_position_embeddings": CONTEXT}
    net = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, initializer_range=0.04))
    paired.save_model(net.bfloat16().float(), folder)
    for precision in precisions if "llama.cpp" in systems else []:
        checkpoint_split.main(checkpoint_split.SplitConfig(
            ckpt_file=str(folder / "ours"), save_path=str(folder / f"gguf-{precision}"), format="gguf",
            dtype=GGUF_TYPES[precision], tokenizer_file=str(ROOT / "dataset/toy/base"),
        ))
    if "ctranslate2" in systems:
        decode_peers.prepare_ctranslate2(folder, sizes["vocab_size"])


def measure(options: argparse.Namespace) -> Run:
    """Time one call in this process, after two shorter ones."""
    folder, system, precision = Path(options.folder), options.side.partition(",")[0], options.precisions
    torch.set_num_threads(options.threads)
    work = workload(options.only, options.prompts, MODELS[options.model]["vocab_size"])
    if system in ("ours", "unshared"):
        run = ours(folder, precision, options.slots, share=system == "ours")
    elif system == "ctranslate2":
        run = decode_peers.ctranslate2(folder, precision, options.threads)
    elif system == "llama.cpp":
        longest = max(map(len, work.prompts)) + max(map(max, work.lengths))
        run = decode_peers.llama_cpp(folder, precision, options.threads, len(work.prompts), longest)
    else:
        run = decode_peers.transformers(folder, system, getattr(torch, precision))
    gc.collect()
    watch = Watch()
    watch.start()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading is not decoding's
    for _ in range(2):
        run(first_of(work, 4))
    if options.profile:
        with torch.profiler.profile() as profiler:
            run(work)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40))
    watch.tick()
    tokens = run(work)
    watch.tick()
    watch.work = [0, work.n_tokens]
    return watch.record() | {"tokens": tokens}


def in_own_process(options: argparse.Namespace, folder: Path, name: str, side: str, precision: str) -> Run:
    """measure() in a fresh interpreter."""
    more = {"model": options.model, "precisions": precision, "prompts": options.prompts, "slots": options.slots,
            "threads": options.threads}
    words = [str(word) for key, value in more.items() for word in (f"--{key}", value)]
    return paired.run_side(__file__, side, name, folder, *words)


def gap(ours: Run, theirs: Run) -> float:
    """The share of the rows' first tokens that differ; of samples, which each side draws for itself, 0."""
    pairs = [
        (one, other)
        for row, others in zip(ours["tokens"], theirs["tokens"], strict=True)
        for one, other in zip(row[:COMPARED], others[:COMPARED], strict=True)
    ]
    return sum(one != other for one, other in pairs) / len(pairs)


def compare(options: argparse.Namespace, folder: Path, name: str, precision: str) -> str:
    """The table of one workload at one precision, of the systems that have it here."""
    asked = dict.fromkeys(["ours", *options.systems.split(",")])
    sides = [f"{system}, {precision}" for system in asked if decode_peers.has(system, precision)]
    found = paired.in_turns(
        sides, options.repeats, lambda side: in_own_process(options, folder, name, side, precision))
    columns = {
        "tokens/cpu s": lambda run: paired.rate(run, 0, 1),
        "tokens/s": lambda run: paired.rate(run, 1, 1),
        "peak MB": lambda run: run["peak"] / 1e6,
        "growth MB": lambda run: run["growth"] / 1e6,
    }
    base = found[sides[0]][0]
    gaps = {
        side: (0.0 if name == "samples" else gap(base, runs[0]), ALLOWED[precision]) for side, runs in found.items()
    }
    tokens = base["tokens"]
    title = f"{name}: {len(tokens)} rows, {sum(map(len, tokens))} tokens, {len(set(tokens[0]))} different in the first"
    return paired.table(title, found, columns, gaps)


def main() -> None:
    """Print the tables, or measure one side as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="60M", choices=MODELS)
    parser.add_argument("--workload", default="ragged", help="of equal, ragged, shared, samples, single")
    parser.add_argument("--precisions", default="float32", help="of float32, bfloat16, int8")
    systems = "of dynamic, static, continuous (transformers), ctranslate2, llama.cpp, unshared"
    parser.add_argument("--systems", default="dynamic", help=systems)
    parser.add_argument("--prompts", type=int, default=64, help="of the ragged and the equal workload")
    parser.add_argument("--repeats", "--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=128, help="sequences that we decode at once at most")
    parser.add_argument("--threads", type=int, default=1, help="of every side")
    parser.add_argument("--scaling", action="store_true", help="our rates with 1 to 128 slots instead")
    parser.add_argument("--profile", action="store_true", help="print where our time goes instead")
    parser.add_argument("--side", default="", help="measure this side alone (for the script's own use)")
    parser.add_argument("--only", default="", help="workload of the side")
    parser.add_argument("--folder", default="")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    systems, precisions = options.systems.split(","), options.precisions.split(",")
    for system in systems:
        decode_peers.check_installed(system)
    libraries = {"ctranslate2": "ctranslate2", "llama.cpp": "llama_cpp_python"}
    print(paired.machine("transformers", *(libraries[system] for system in systems if system in libraries)))
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, options.model, precisions, systems)
        for name in options.workload.split(","):
            for precision in precisions:
                if options.profile:
                    options.side, options.only, options.folder = "ours", name, temporary
                    options.precisions = precision
                    measure(options)
                elif options.scaling:
                    scaling(options, folder, name, precision)
                else:
                    print(f"{options.model}, {precision}, {compare(options, folder, name, precision)}", flush=True)


def scaling(options: argparse.Namespace, folder: Path, name: str, precision: str) -> None:
    """Print our rates by the number of slots."""
    for options.slots in (1, 2, 4, 8, 16, 32, 64, 128):
        run = in_own_process(options, folder, name, "ours", precision)
        print(f"{options.slots:4d} slots {paired.rate(run, 1, 1):8.1f} tokens/s {paired.rate(run, 0, 1):8.1f} "
              f"tokens/cpu s, growth {run['growth'] / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()

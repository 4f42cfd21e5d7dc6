"""What --precision bfloat16 is worth: training and decoding beside float32, and beside transformers under autocast.

python benchmarks/precision.py --rounds 5

Random weights in the shape of SmolLM2-135M on one thread, times in processor seconds, the sides in turns. First the
gate: the gradient's distance from float32's must be at most 1.1 times that of transformers under autocast. Training is
a forward and backward pass over 4 rows of 512 tokens, packed, of which 362 are learnt; decoding is greedy, from prompts
of 40 tokens.
"""

import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, ours is not

import checkpoint_split
from src import load, parallel
from src.command import cli
from src.data.batch import Batch
from src.inference.engine import Request, Vocabulary, generate
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.training.sft import sft_loss

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "tie_word_embeddings": True, "rope_theta": 1e5, "max_position_embeddings": 2048,
}
ROWS, LENGTH, PROMPT = 4, 512, 150


def training_batch() -> Batch:
    """Rows [1, 2048] end to end; what comes after each one's prompt is learnt."""
    tokens = torch.randint(0, SMOLLM2["vocab_size"], (1, ROWS * LENGTH), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(ROWS * LENGTH) % LENGTH >= PROMPT)[None]
    return Batch(tokens, mask, ((0, LENGTH),) * ROWS)


def their_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """The same sum over rows [4, 512], which need no padding, in bfloat16 under autocast if the model is to."""
    tokens, mask = batch.tokens.view(ROWS, LENGTH), batch.response_mask.view(ROWS, LENGTH)
    hidden = model.model(tokens, use_cache=False).last_hidden_state[:, :-1][mask[:, 1:]]
    logprobs = model.lm_head(hidden).float().log_softmax(-1)
    return -logprobs.gather(-1, tokens[:, 1:][mask[:, 1:]][:, None]).sum()


def gradient(model: torch.nn.Module, loss: Tensor) -> Tensor:
    """All gradients [n]; their norms do not depend on the order of rotary dimensions."""
    loss.backward()
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return found


def decoded(model: Decoder, n_rows: int, n_tokens: int) -> int:
    """How many tokens were sampled."""
    requests = [Request(str(row), 0, [(7 * row + n * n) % 4000 + 100 for n in range(40)]) for row in range(n_rows)]
    sampling = Sampling(temperature=0.0, max_new_tokens=n_tokens)
    vocabulary = Vocabulary((), model.config.vocab_size, str)
    found = generate(model, requests, sampling, vocabulary=vocabulary, max_batch_size=n_rows)
    return sum(len(completion.tokens) for completion in found)


def main(rounds: int = 5, layers: int = 30) -> None:
    """Print the gate and the table.

    Args:
        rounds: turns of every side; the best one counts
        layers: of the model
    """
    parallel.start()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        theirs = LlamaForCausalLM(LlamaConfig(**SMOLLM2, num_hidden_layers=layers))
        theirs.save_pretrained(f"{folder}/hf")
        checkpoint_split.main(checkpoint_split.SplitConfig(ckpt_file=f"{folder}/hf", save_path=f"{folder}/ours", n=1))
        trained = {precision: load.load_solver(f"{folder}/ours", precision=precision, trained=load.Trained())
                   for precision in ("float32", "bfloat16")}
        frozen = {precision: load.load_solver(f"{folder}/ours", precision=precision) for precision in trained}
    batch = training_batch()

    def autocast(enabled: bool) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return their_loss(theirs, batch)

        return loss

    gradients = {precision: gradient(model, sft_loss(model, batch)) for precision, model in trained.items()}
    ours = (gradients["bfloat16"] - gradients["float32"]).norm() / gradients["float32"].norm()
    exact = gradient(theirs, autocast(False)())
    peer = (gradient(theirs, autocast(True)()) - exact).norm() / exact.norm()
    cli.show(f"gradients off float32's: ours {ours:.4f}, transformers' autocast {peer:.4f}\n")
    if ours > 1.1 * peer:
        raise SystemExit("too far: no time counts")
    del gradients, exact

    def trains(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], int]:
        def step() -> int:
            loss().backward()
            model.zero_grad()
            return ROWS * LENGTH

        return step

    sides = {
        f"train, ours {precision}": trains(model, lambda model=model: sft_loss(model, batch))
        for precision, model in trained.items()
    }
    sides |= {
        f"train, transformers {'autocast' if on else 'float32'}": trains(theirs, autocast(on)) for on in (False, True)
    }
    for n_rows, n_tokens in ((64, 48), (1, 64)):
        sides |= {f"decode {n_rows}, ours {precision}": lambda model=model, n=n_rows, t=n_tokens: decoded(model, n, t)
                  for precision, model in frozen.items()}
    best = dict.fromkeys(sides, 0.0)
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.process_time()
            best[name] = max(best[name], side() / (time.process_time() - began))
    lines = [f"{name:32}{rate:10.1f} tokens a processor second" for name, rate in best.items()]
    cli.show("\n".join([f"{platform.processor() or platform.machine()}, torch {torch.__version__}", *lines]) + "\n")


if __name__ == "__main__":
    cli.run(main)

"""A server's greedy tokens and their log-probs beside the engine's, for the same weights.

python benchmarks/served.py --ckpt_dir DIR --base_url http://localhost:8000/v1 --model_name NAME [--problems 16]

The server holds an export of the checkpoint, or of an adapter on its base; it must answer in token ids, as vLLM does.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the repository is not

from src import load, parallel  # noqa: E402
from src.data.examples import read_prompts  # noqa: E402
from src.inference.engine import generate, vocabulary_of  # noqa: E402
from src.inference.sampling import Sampling  # noqa: E402
from src.serving.server_client import RemoteRequest, Server, complete  # noqa: E402
from src.training.rollout import requests_of  # noqa: E402


class Agreement(NamedTuple):
    """How far two samplers are alike. Log-probs in nats, of the tokens before a response's first difference."""

    responses: int
    equal: int
    tokens: int
    tokens_before_difference: int
    largest_logprob_difference: float


def compare(ckpt_dir: str, base_url: str, model_name: str, problems: int, max_new_tokens: int) -> Agreement:
    """Both continue the first toy problems greedily. Raises UserError where the server does not answer them all."""
    parallel.start()
    model, tokenizer = load.load_solver(ckpt_dir), load.load_tokenizer(ckpt_dir)
    vocabulary, sampling = vocabulary_of(tokenizer), Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    prompts = read_prompts(str(ROOT / "dataset/toy/test.json"), need_label=False)[:problems]
    requests = [request for (request,) in requests_of(prompts, tokenizer, range(1))]
    ours = {done.request.id: done for done in generate(
        model, requests, sampling, vocabulary=vocabulary, max_batch_size=8)}
    server = Server(base_url=base_url, model_name=model_name, stop_ids=vocabulary.eos_ids, token_ids=True)
    remote = [RemoteRequest(request.id, request.sample, request.prompt) for request in requests]
    equal, n_tokens, n_alike, farthest = 0, 0, 0, 0.0
    for request, reply, error in complete(server, remote, sampling, concurrency=8):
        if reply is None:
            raise SystemExit(f"{base_url}: {error}")
        own = ours[request.id]
        equal += own.tokens == list(reply.ids)
        n_tokens += len(own.tokens)
        for token, logprob, theirs, said in zip(own.tokens, own.logprobs, reply.ids, reply.tokens, strict=False):
            if token != theirs:
                break
            n_alike, farthest = n_alike + 1, max(farthest, abs(logprob - said.logprob))
    return Agreement(len(requests), equal, n_tokens, n_alike, farthest)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("ckpt_dir", "base_url", "model_name"):
        parser.add_argument(f"--{name}", required=True)
    for name, value in {"problems": 16, "max_new_tokens": 120}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in compare(**vars(parser.parse_args()))._asdict().items():
        print(f"{name:28} {value:.3g}" if isinstance(value, float) else f"{name:28} {value}")

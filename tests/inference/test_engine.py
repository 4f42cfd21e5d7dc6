"""src/inference/engine.py: what is sampled depends on the model, the prompt and (seed, id, sample) alone."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src import assemble, parallel
from src.checkpoint.sources import open_source
from src.checkpoint.split import split
from src.errors import UserError
from src.inference.engine import Completion, Request, generate
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from tests import reference
from tests.ranks import run_ranks, succeed
from tests.workers import all_logits

EOS = 2
CONTEXT = 128
LENGTHS = (1, 3, 3, 8, 20, 41, 70, 5, 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One random model split for 1 and for 2 ranks."""
    root = tmp_path_factory.mktemp("engine")
    source = open_source(str(reference.make_llama(root / "hf", "gqa")))
    for n in (1, 2):
        split(source, root / str(n), n, "", "", "gqa")
    return {n: root / str(n) for n in (1, 2)}


@pytest.fixture(scope="module")
def model(folders: dict[int, Path]) -> Decoder:
    parallel.start()
    return assemble.load_solver(str(folders[1]))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Two samples each of prompts of different lengths."""
    draw = random.Random(0)
    prompts = [[1, *(draw.randrange(3, 64) for _ in range(length - 1))] for length in LENGTHS]
    return [Request(f"p{index}", sample, prompt) for index, prompt in enumerate(prompts) for sample in (0, 1)]


def sampled(
    model: Decoder, requests: list[Request], max_batch_size: int = 64, **settings: float
) -> dict[tuple[str, int], Completion]:
    """Completions by (id, sample)."""
    sampling = Sampling(**{"temperature": 1.0, "max_new_tokens": 30, "seed": 3} | settings)
    found = list(generate(model, requests, sampling, eos_id=EOS, max_batch_size=max_batch_size))
    assert len(found) == len(requests)
    return {(done.request.id, done.request.sample): done for done in found}


def texts(completions: dict[tuple[str, int], Completion]) -> dict[tuple[str, int], list[int]]:
    return {key: done.tokens for key, done in completions.items()}


@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 5, 18])
def test_samples_do_not_depend_on_batch_size_order_or_slot(
    model: Decoder, requests: list[Request], max_batch_size: int
) -> None:
    expected = sampled(model, requests)
    shuffled = random.Random(max_batch_size).sample(requests, len(requests))
    found = sampled(model, shuffled, max_batch_size)
    assert texts(found) == texts(expected)
    for key, done in expected.items():
        assert found[key].finish == done.finish
        torch.testing.assert_close(
            torch.tensor(found[key].logprobs), torch.tensor(done.logprobs), rtol=0, atol=1e-4
        )


def test_sample_is_the_same_without_the_others(model: Decoder, requests: list[Request]) -> None:
    assert texts(sampled(model, requests[6:7])).items() <= texts(sampled(model, requests)).items()


def test_samples_differ_by_seed_id_and_sample(model: Decoder) -> None:
    prompt = [1, 5, 9]
    requests = [Request("a", 0, prompt), Request("a", 1, prompt), Request("b", 0, prompt)]
    first, second = texts(sampled(model, requests)), texts(sampled(model, requests, seed=4))
    everything = [*first.values(), *second.values()]
    assert len({tuple(tokens) for tokens in everything}) == 6


def test_greedy_takes_the_most_probable_token_of_a_plain_forward(
    model: Decoder, requests: list[Request]
) -> None:
    for done in sampled(model, requests, max_batch_size=4, temperature=0.0).values():
        logits = response_logits(model, done)
        assert logits.argmax(-1).tolist() == done.tokens


def test_logprobs_are_those_of_a_plain_forward(model: Decoder, requests: list[Request]) -> None:
    for done in sampled(model, requests, max_batch_size=4, temperature=0.7, top_p=0.8).values():
        logprobs = response_logits(model, done).log_softmax(-1)
        expected = logprobs.gather(-1, torch.tensor(done.tokens)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, rtol=0, atol=1e-5)


def response_logits(model: Decoder, done: Completion) -> Tensor:
    """Logits [N, V] that predict each response token, computed without a cache."""
    row = torch.tensor([done.request.prompt + done.tokens])
    return all_logits(model, row)[0, len(done.request.prompt) - 1 : -1]


def test_response_ends_with_eos_or_at_max_new_tokens(model: Decoder, requests: list[Request]) -> None:
    completions = sampled(model, requests, max_new_tokens=30).values()
    assert {done.finish for done in completions} == {"stop", "length"}
    for done in completions:
        assert EOS not in done.tokens[:-1]
        assert (done.tokens[-1] == EOS) == (done.finish == "stop")
        assert len(done.tokens) == len(done.logprobs) <= 30
        assert done.finish == "stop" or len(done.tokens) == 30


def test_eos_at_the_last_allowed_token_is_a_stop(model: Decoder, requests: list[Request]) -> None:
    longer = sampled(model, requests)
    done = next(done for done in longer.values() if done.finish == "stop")
    again = sampled(model, [done.request], max_new_tokens=len(done.tokens))
    (cut,) = again.values()
    assert (cut.tokens, cut.finish) == (done.tokens, "stop")


def test_response_ends_where_the_context_does(model: Decoder) -> None:
    for length in (CONTEXT - 1, CONTEXT - 5):
        request = Request("long", 0, [7] * length)
        done = sampled(model, [request, Request("short", 0, [1])], temperature=0.0)["long", 0]
        assert (len(done.tokens), done.finish) == (CONTEXT - length, "length") or done.finish == "stop"


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1])
def test_prompt_that_fills_the_context_is_refused_by_id(model: Decoder, length: int) -> None:
    requests = [Request("fits", 0, [1]), Request("row-17", 0, [1] * length)]
    with pytest.raises(
        UserError, match=f"prompt 'row-17' has {length} tokens but the model's context is 128"
    ):
        sampled(model, requests)


def test_no_requests_give_no_completions(model: Decoder) -> None:
    assert sampled(model, []) == {}


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_model_is_restored_even_when_the_caller_stops_early(
    model: Decoder, requests: list[Request], training: bool
) -> None:
    model.train(training)
    stream = generate(model, requests, Sampling(max_new_tokens=3), eos_id=EOS, max_batch_size=2)
    next(stream)
    assert not model.training
    stream.close()
    assert model.training is training
    model.eval()


def test_two_ranks_sample_what_one_samples(
    model: Decoder, folders: dict[int, Path], requests: list[Request], tmp_path: Path
) -> None:
    first, second = run_ranks(
        2, "tests.workers:completions", tmp_path, folder=str(folders[2]), requests=requests
    )
    assert first == second
    for temperature, found in first.items():
        alone = sampled(model, requests, 4, temperature=float(temperature), top_p=0.9, max_new_tokens=24)
        assert found == {f"{name}/{sample}": done.tokens for (name, sample), done in alone.items()}


@pytest.mark.parametrize("n", [1, 2, 4])
def test_trained_model_reproduces_its_published_text(tmp_path: Path, n: int) -> None:
    folder = reference.shared("weights/stories260K")
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    prompt = tmp_path / "prompt.jsonl"
    prompt.write_text(json.dumps({"instruction": golden["prompt"]}) + "\n", encoding="utf-8")
    succeed(
        "checkpoint_split.py", "--ckpt_file", folder / "stories260K.pt", "--save_path", tmp_path / "ckpt",
        f"--n={n}", "--tokenizer_file", folder / "tok512.model",
    )  # fmt: skip
    succeed(
        *("solver_evaluate.py", "--task", "none", "--ckpt_dir", tmp_path / "ckpt", "--label_file", prompt),
        *("--max_new_tokens", golden["steps"], "--temperature", 0, "--log_dir", tmp_path / "log"),
        n=n if n > 1 else None,
    )
    (line,) = (tmp_path / "log" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["response"] == golden["text"]

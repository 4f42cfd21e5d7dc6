"""src/inference/engine.py: what is sampled depends on the model, the prompt and (seed, id, sample) alone."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

import checkpoint_split
from src import load, parallel
from src.checkpoint.sources import open_source
from src.checkpoint.split import split
from src.errors import UserError
from src.inference.engine import (
    Completion,
    DecodingBatch,
    Request,
    ToolAnswer,
    ToolHook,
    Vocabulary,
    generate,
)
from src.inference.sampling import Sampling
from src.models import cache
from src.models.decoder import Decoder
from tests import reference
from tests.ranks import run_ranks, succeed
from tests.workers import WAYS, all_logits

EOS = 2
VOCABULARY = Vocabulary((EOS,), 64, str)
CONTEXT = 128
LENGTHS = (1, 3, 3, 8, 20, 41, 70, 5, 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One random model split for 1, 2 and 4 ranks."""
    root = tmp_path_factory.mktemp("engine")
    source = open_source(str(reference.make_llama(root / "hf", "gqa")))
    for n in (1, 2, 4):
        split(source, root / str(n), n, "gqa")
    return {n: root / str(n) for n in (1, 2, 4)}


@pytest.fixture(scope="module")
def model(folders: dict[int, Path]) -> Decoder:
    parallel.start()
    return load.load_solver(str(folders[1]))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Two samples each of prompts of different lengths."""
    draw = random.Random(0)
    prompts = [[1, *(draw.randrange(3, 64) for _ in range(length - 1))] for length in LENGTHS]
    return [Request(f"p{index}", sample, prompt) for index, prompt in enumerate(prompts) for sample in (0, 1)]


@pytest.fixture(scope="module")
def prefixed(requests: list[Request]) -> list[Request]:
    """The requests after 70 tokens that all of them begin with; one is nothing else."""
    prefix = [1, *(place * place % 60 + 3 for place in range(69))]
    return [request._replace(prompt=prefix + request.prompt[1:50]) for request in requests]


def sampled(
    model: Decoder,
    requests: list[Request],
    max_batch_size: int = 64,
    vocabulary: Vocabulary = VOCABULARY,
    tool_hook: ToolHook | None = None,
    **settings: object,
) -> dict[tuple[str, int], Completion]:
    """Completions by (id, sample)."""
    sampling = Sampling(**{"temperature": 1.0, "max_new_tokens": 30, "seed": 3} | settings)
    found = list(
        generate(
            model, requests, sampling, vocabulary=vocabulary, max_batch_size=max_batch_size, tool_hook=tool_hook
        )
    )
    assert len(found) == len(requests)
    return {(done.request.id, done.request.sample): done for done in found}


def texts(completions: dict[tuple[str, int], Completion]) -> dict[tuple[str, int], list[int]]:
    return {key: done.tokens for key, done in completions.items()}


@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 5, 18])
def test_w2s_15_samples_do_not_depend_on_batch_size_order_or_slot(
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


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 5}, {"temperature": 0.0}, {"max_new_tokens": 1}, {"stop": ("e", "st")}])
def test_tokens_that_are_read_a_step_late_are_the_same(
    model: Decoder, requests: list[Request], settings: dict[str, object]
) -> None:
    """As on a GPU, which computes the next ones meanwhile; stop strings, limits and refilled slots among them."""
    sampling = Sampling(**{"temperature": 1.0, "max_new_tokens": 30, "seed": 3} | settings)
    letters = Vocabulary((EOS, 7, 9), 64, lambda ids: "".join(chr(97 + index % 26) for index in ids))
    mixed = [request._replace(max_new_tokens=(None, 1, 2, 9)[place % 4]) for place, request in enumerate(requests)]
    found = []
    for n_ahead in (0, 1):
        with torch.inference_mode():
            batch = DecodingBatch(model, sampling, letters, 4, None)
            batch.n_ahead = n_ahead
            batch.add([*mixed, mixed[0]])  # one of them twice
            found.append(sorted(batch.run()))
    assert len(found[0]) == len(mixed) + 1 and {done.finish for done in found[0]} <= {"stop", "length"}
    for late, expected in zip(found[1], found[0], strict=True):
        assert late[:2] == expected[:2] and late[4:] == expected[4:]
        torch.testing.assert_close(torch.tensor(late[2:4]), torch.tensor(expected[2:4]), rtol=0, atol=1e-4)


def test_sample_is_the_same_without_the_others(model: Decoder, requests: list[Request]) -> None:
    assert texts(sampled(model, requests[6:7])).items() <= texts(sampled(model, requests)).items()


def test_w2s_15_samples_differ_by_seed_id_and_sample(model: Decoder) -> None:
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


def read_as_letters(tokens: list[int]) -> str:
    """A tokenizer's decode: two letters an id, so that strings span the borders of tokens; special ids vanish."""
    return "".join(f"{chr(97 + token % 7)}{chr(97 + token // 7)}" for token in tokens if token > EOS)


LETTERS = Vocabulary((EOS,), 64, read_as_letters)


@pytest.mark.parametrize("max_batch_size", [2, 9])
def test_w2s_05_stop_string_across_tokens_ends_the_response_and_is_left_out(
    model: Decoder, requests: list[Request], max_batch_size: int
) -> None:
    free = sampled(model, requests, vocabulary=LETTERS)
    # the last letter of one token and the first of the next, from the middle of a long response
    text = max((done.text for done in free.values()), key=len)
    stops = (text[21:23], text[31:34])
    stopped = sampled(model, requests, max_batch_size, LETTERS, stop=stops)
    assert sum(done.text != free[key].text for key, done in stopped.items()) > 1
    for key, done in stopped.items():
        whole = free[key].text
        end = min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))
        assert done.text == whole[:end]
        assert free[key].tokens[: len(done.tokens)] == done.tokens
        assert done.finish == ("stop" if end < len(whole) else free[key].finish)
        before = read_as_letters(done.tokens[:-1])
        assert not any(stop in before for stop in stops)  # nothing is drawn behind a stop string


def test_any_of_several_eos_ids_ends_a_response(model: Decoder, requests: list[Request]) -> None:
    free = sampled(model, requests)
    other = next(done.tokens[3] for done in free.values() if len(done.tokens) > 4)
    for key, done in sampled(model, requests, vocabulary=Vocabulary((EOS, other), 64, str)).items():
        ends = [place for place, token in enumerate(free[key].tokens) if token in (EOS, other)]
        assert done.tokens == free[key].tokens[: ends[0] + 1 if ends else None]
        assert done.finish == ("stop" if ends else "length")


def test_scdpo_02_banned_and_padding_ids_are_never_drawn(model: Decoder, requests: list[Request]) -> None:
    free = {token for done in sampled(model, requests).values() for token in done.tokens}
    assert max(free) > 50 and 7 in free
    ban = {7: float("-inf")}
    for settings in ({}, {"top_p": 0.9}, {"temperature": 0.0}):
        found = sampled(model, requests, vocabulary=Vocabulary((EOS,), 50, str), logit_bias=ban, **settings)
        tokens = {token for done in found.values() for token in done.tokens}
        assert max(tokens) < 50 and 7 not in tokens


def test_samples_of_a_prompt_share_one_reading(
    model: Decoder, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def count(module: Decoder, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].shape[1] > 1:
            read.append(len(arguments[0]))

    many = [request._replace(sample=sample) for request in requests[10:14] for sample in range(5)]
    handle = model.register_forward_pre_hook(count)
    for slots in (1, 3, 64):  # a prompt's samples find room at different times
        read.clear()
        sampled(model, many, slots)
        assert sum(read) == 2  # requests[10:14] are two prompts
    handle.remove()


def test_a_prompt_that_another_begins_with_is_read_with_it(model: Decoder, requests: list[Request]) -> None:
    longest, other = requests[12].prompt, requests[10].prompt
    many = [
        Request(f"{len(prompt)}", sample, prompt)
        for prompt in (longest[:30], other, longest, longest[:5], longest[:69], other[:40])
        for sample in (0, 1)
    ]
    expected = {(one.id, one.sample): sampled(model, [one])[one.id, one.sample].tokens for one in many}
    read = []
    handle = model.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].shape))
    for slots in (1, 3, 64):
        read.clear()
        assert texts(sampled(model, many, slots)) == expected
        assert sum(rows for rows, length in read if length > 1) == 2
    handle.remove()


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.9}])
@pytest.mark.parametrize("max_batch_size", [1, 5, 18])
def test_a_shared_prefix_is_read_once_and_changes_no_sample(
    model: Decoder,
    prefixed: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    max_batch_size: int,
    settings: dict[str, float],
) -> None:
    read = []
    handle = model.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].numel()))
    found = sampled(model, prefixed, max_batch_size, **settings)
    with_sharing = sum(read)
    monkeypatch.setattr(cache, "LEAST_SHARED", 1000)
    expected = sampled(model, prefixed, max_batch_size, **settings)
    handle.remove()
    assert sum(read) - 2 * with_sharing >= 69 * 7  # 8 prompts differ
    assert texts(found) == texts(expected)
    for key, done in expected.items():
        torch.testing.assert_close(torch.tensor(found[key].logprobs), torch.tensor(done.logprobs), rtol=0, atol=1e-5)


def test_a_shared_prefix_leaves_bfloat16_as_near_to_float32(
    model: Decoder, folders: dict[int, Path], prefixed: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = load.load_solver(str(folders[1]), precision="bfloat16")

    def distance() -> float:
        """Of the log-probs of what was sampled from float32's, root mean square."""
        squares = []
        for done in sampled(rounded, prefixed).values():
            exact = response_logits(model, done).log_softmax(-1).gather(-1, torch.tensor(done.tokens)[:, None])
            squares.append((torch.tensor(done.logprobs) - exact[:, 0]).square())
        return float(torch.cat(squares).mean().sqrt())

    shared = distance()
    monkeypatch.setattr(cache, "LEAST_SHARED", 1000)
    assert shared < 1.25 * distance()


def test_log_probs_of_the_sampled_distribution_renormalise_the_plain_ones(
    model: Decoder, requests: list[Request]
) -> None:
    for done in sampled(model, requests, 4, temperature=0.7, top_k=3).values():
        scaled = response_logits(model, done) / 0.7
        third = scaled.topk(3).values[:, -1:]
        logprobs = scaled.masked_fill(scaled < third, float("-inf")).log_softmax(-1)
        expected = logprobs.gather(-1, torch.tensor(done.tokens)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(done.sampled_logprobs), expected, rtol=0, atol=1e-4)


def test_every_token_is_heard_as_it_is_drawn(model: Decoder, requests: list[Request]) -> None:
    heard: dict[tuple[str, int], list[int]] = {}

    def hear(request: Request, token: int) -> None:
        heard.setdefault((request.id, request.sample), []).append(token)

    sampling = Sampling(temperature=1.0, max_new_tokens=9)
    for done in generate(model, requests, sampling, vocabulary=VOCABULARY, max_batch_size=5, on_token=hear):
        assert heard[done.request.id, done.request.sample] == done.tokens


@pytest.mark.parametrize("flags", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_without_numbers_is_refused(folders: dict[int, Path], flags: dict[str, float], value: float) -> None:
    """Greedy decoding would say token 0 for ever, and evaluate to 0%."""
    model = load.load_solver(str(folders[1]))
    with torch.no_grad():
        model.layers[0].attention.wo.weight[0, 0] = value
    asked = [Request(f"p{index}", 0, [1, 5 + index, 6]) for index in range(3)]
    with pytest.raises(UserError, match="request 'p.': the model's logits are NaN: its weights hold NaN or infinity"):
        list(generate(model, asked, Sampling(**flags, max_new_tokens=4), vocabulary=VOCABULARY, max_batch_size=2))


def test_no_requests_give_no_completions(model: Decoder) -> None:
    assert sampled(model, []) == {}


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_model_is_restored_even_when_the_caller_stops_early(
    model: Decoder, requests: list[Request], training: bool
) -> None:
    model.train(training)
    stream = generate(model, requests, Sampling(max_new_tokens=3), vocabulary=VOCABULARY, max_batch_size=2)
    next(stream)
    assert not model.training
    stream.close()
    assert model.training is training
    model.eval()


@pytest.mark.parametrize(("n", "which"), [(2, "prefixed"), (4, "requests")])
def test_w2s_04_ranks_sample_what_one_samples(
    model: Decoder, folders: dict[int, Path], request: pytest.FixtureRequest, tmp_path: Path, n: int, which: str
) -> None:
    requests = request.getfixturevalue(which)
    first, *others = run_ranks(
        n, "tests.workers:completions", tmp_path, folder=str(folders[n]), requests=requests
    )
    assert all(other == first for other in others)
    for way, settings in WAYS.items():
        alone = sampled(model, requests, 7, Vocabulary((EOS,), 60, str), **{"max_new_tokens": 24} | settings)
        assert first[way] == {f"{name}/{sample}": done.tokens for (name, sample), done in alone.items()}, way


@pytest.mark.parametrize("n", [1, 2, 4])
def test_trained_model_reproduces_its_published_text_among_seven_others(tmp_path: Path, n: int) -> None:
    folder = reference.shared("weights/stories260K")
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    others = [
        "Tom",
        "Lily and Ben went to the park. They saw",
        "A dog",
        "She",
        "It was",
        "Mom said",
        "The sun",
    ]
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        json.dumps({"instruction": prompt}) + "\n" for prompt in [*others[:3], golden["prompt"], *others[3:]]
    ]
    prompts.write_text("".join(rows), encoding="utf-8")
    checkpoint_split.main(
        checkpoint_split.SplitConfig(
            ckpt_file=str(folder / "stories260K.pt"), save_path=str(tmp_path / "ckpt"), n=n,
            tokenizer_file=str(folder / "tok512.model"),
        )
    )
    succeed(
        *("solver_evaluate.py", "--task", "none", "--ckpt_dir", tmp_path / "ckpt", "--label_file", prompts),
        *("--max_new_tokens", golden["steps"], "--temperature", 0, "--log_dir", tmp_path / "log"),
        *("--max_batch_size", 8),
        n=n if n > 1 else None,
    )
    lines = (tmp_path / "log" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = {sample["prompt"]: sample["response"] for sample in map(json.loads, lines)}
    assert len(samples) == 8
    assert samples[golden["prompt"]] == golden["text"]


GIVEN = [7, 11, 13, 5]


def paused_at(model: Decoder, request: Request) -> int:
    """A token that the model draws greedily behind a prompt, the fourth."""
    drawn = sampled(model, [request], temperature=0.0, max_new_tokens=4)
    return drawn[request.id, request.sample].tokens[-1]


@pytest.mark.parametrize("max_batch_size", [1, 3, 64])
def test_what_a_tool_appends_is_continued_from(
    model: Decoder, requests: list[Request], max_batch_size: int
) -> None:
    """As if the prompt had held it from the beginning: the cache has taken it in."""
    request = requests[6]
    pause = paused_at(model, request)
    heard = []

    def on_pause(rows: list[tuple[Request, list[int]]]) -> list[ToolAnswer]:
        heard.extend(rows)
        return [ToolAnswer(GIVEN, "" if tokens.count(pause) == 1 else "enough", "ran") for _, tokens in rows]

    found = sampled(
        model, requests, max_batch_size, temperature=0.0, max_new_tokens=20, tool_hook=ToolHook((pause,), on_pause)
    )[request.id, request.sample]
    first = found.tokens.index(pause) + 1
    assert found.tokens[first : first + len(GIVEN)] == GIVEN
    assert found.logprobs[first : first + len(GIVEN)] == [0.0] * len(GIVEN)
    appended = [place for place, is_sampled in enumerate(found.is_sampled) if not is_sampled]
    assert appended == list(range(first, first + len(GIVEN)))
    assert found.tool_results == ["ran"] * (1 + (found.finish == "enough"))
    assert (request, found.tokens[:first]) in heard
    rest = found.tokens[first + len(GIVEN) :]
    again = Request("again", 0, [*request.prompt, *found.tokens[: first + len(GIVEN)]])
    alone = sampled(model, [again], temperature=0.0, max_new_tokens=max(1, len(rest)))["again", 0]
    assert rest == alone.tokens[: len(rest)]
    assert len(rest) > 3
    torch.testing.assert_close(
        torch.tensor(found.logprobs[-len(rest) :]), torch.tensor(alone.logprobs), rtol=0, atol=1e-4
    )


def test_a_pause_can_end_a_row_and_nothing_given_pauses_again(model: Decoder, requests: list[Request]) -> None:
    request = requests[6]
    pause = paused_at(model, request)
    hook = ToolHook((pause,), lambda rows: [ToolAnswer([], "why")] * len(rows))
    ended = sampled(model, [request], temperature=0.0, tool_hook=hook)
    assert ended[request.id, request.sample].finish == "why"
    calls = []

    def on_pause(rows: list[tuple[Request, list[int]]]) -> list[ToolAnswer]:
        calls.append(len(rows))
        return [ToolAnswer([pause, EOS, pause], "twice" * (len(calls) > 1))]

    found = sampled(model, [request], temperature=0.0, max_new_tokens=5, tool_hook=ToolHook((pause,), on_pause))
    tokens = found[request.id, request.sample].tokens
    first = tokens.index(pause)
    assert tokens[first + 1 : first + 4] == [pause, EOS, pause]
    assert len(tokens) > first + 4


def test_each_stretch_between_pauses_has_its_own_limit(model: Decoder, requests: list[Request]) -> None:
    request = requests[6]
    pause = paused_at(model, request)
    first = ToolHook((pause,), lambda rows: [ToolAnswer(GIVEN * 5 * (len(tokens) < 10)) for _, tokens in rows])
    found = sampled(model, [request], temperature=0.0, max_new_tokens=6, tool_hook=first)
    tokens = found[request.id, request.sample].tokens
    assert len(tokens) >= tokens.index(pause) + 1 + 20 + 6
    one = sampled(model, [request], temperature=0.0, max_new_tokens=6, tool_hook=first._replace(whole=True))
    assert sum(one[request.id, request.sample].is_sampled) == 6 and len(one[request.id, request.sample].tokens) == 26
    whole = sampled(
        model, [request], temperature=0.0, max_new_tokens=6,
        tool_hook=ToolHook((pause,), lambda rows: [ToolAnswer(GIVEN * 100) for _ in rows]),
    )[request.id, request.sample]
    assert (len(request.prompt) + len(whole.tokens), whole.finish) == (CONTEXT, "length")

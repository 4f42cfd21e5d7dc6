"""src/training/preference.py and reference.py: losses beside transformers, invariance, prefixes, the cache."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import preference_train
from src import load, losses, parallel
from src.checkpoint import saving, storage
from src.data.batch import BatchSampler, Dataset
from src.data.encoding import encode_prompt, encode_response
from src.data.examples import Pair
from src.errors import UserError
from src.jsonfile import read_json, write_json
from src.models.decoder import Decoder
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer
from src.training.preference import Preference, collate_sides, open_preferences, with_reference
from src.training.reference import (
    Reference,
    reference_identity,
    reference_logprobs,
    response_sums,
    row_key,
)
from src.training.resuming import content_hash
from src.training.reward_model import pair_dataset
from tests.conftest import Folders
from tests.ranks import Job, in_few_launches
from tests.reference import hf_model, relative_difference
from tests.tiny import weights
from tests.training.workers import PAIRS, join_weights, preference_epochs

OnRanks = Callable[[tuple[int, ...]], list[dict[str, object]]]
LN2 = math.log(2)
KINDS = [
    {"objective": "dpo"},
    {"objective": "dpo", "length_normalize": True, "nll_weight": 0.5},
    {"objective": "cdpo", "label_smoothing": 0.1},
    {"objective": "ipo", "beta": 0.3},
    {"objective": "orpo"},
    {"objective": "simpo", "beta": 2.0, "margin": 1.6},
]


@pytest.fixture(scope="module")
def whole(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Weights and reports with every step in one padded forward pass on one rank, by place in KINDS."""
    log_dir = str(tmp_path_factory.mktemp("log"))
    return [preference_epochs(folders.one, log_dir, **kind) for kind in KINDS]


def make_data(rows: list[Pair], tokenizer: Tokenizer) -> Dataset:
    return pair_dataset(rows, tokenizer, max_seq_len=64, source="pairs.json")._replace(collate=collate_sides)


def one_step(data: Dataset, reference: Reference | None, size: int = 99):
    """The batches of the single step that all pairs make."""
    batching = BatchSampler(max_batch_size=size, accumulation_steps=99 // size, seed=1)
    ((_, _, batches),) = batching.steps(with_reference(data, reference), packing=False, epochs=1)
    return batches


def perturbed(model: Decoder) -> Decoder:
    """The model with other weights."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def plain_sums(model: torch.nn.Module, data: Dataset) -> tuple[Tensor, Tensor]:
    """Summed log-probs by a plain log-softmax of transformers' logits, a text at a time, and counts. -> two [2, B]."""
    sums, counts = [], []
    for pair in data.samples:
        for side in pair:
            tokens = torch.tensor([side.tokens])
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
            each = logprobs.gather(1, tokens[0, 1:, None])[:, 0]
            sums.append(each[side.response_start - 1 :].sum())
            counts.append(side.n_response)
    return torch.stack(sums).view(-1, 2).T, torch.tensor(counts).view(-1, 2).T


def plain_loss(kind: dict[str, object], sums: Tensor, frozen: Tensor, counts: Tensor) -> float:
    """The papers' formulas in full, float64; sums, frozen, counts [2, B]."""
    sums, frozen = sums.double(), frozen.double()
    means, beta = sums / counts, kind.get("beta", 0.1)
    if kind.get("length_normalize") or kind["objective"] == "ipo":
        sums, frozen = means, frozen / counts
    margin = (sums[0] - sums[1]) - (frozen[0] - frozen[1])
    smoothing = kind.get("label_smoothing", 0.0)
    odds = means.exp() / (1 - means.exp())
    loss = {
        "dpo": -torch.sigmoid(beta * margin).log(),
        "cdpo": -(1 - smoothing) * torch.sigmoid(beta * margin).log()
        - smoothing * torch.sigmoid(-beta * margin).log(),
        "ipo": (margin - 1 / (2 * beta)) ** 2,
        "orpo": -means[0] - beta * torch.sigmoid((odds[0] / odds[1]).log()).log(),
        "simpo": -torch.sigmoid(beta * (means[0] - means[1]) - kind.get("margin", 0.0)).log(),
    }[kind["objective"]]
    return (loss - kind.get("nll_weight", 0.0) * means[0]).mean().item()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_losses_equal_a_plain_computation_with_transformers(
    kind: dict[str, object], folders: Folders, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data, preference = make_data(PAIRS, tokenizer), Preference(**{"beta": 0.1} | kind)
    policy, frozen = perturbed(load.load_solver(folders.one)), load.load_solver(folders.one)
    saving.begin_save(policy, str(tmp_path / "policy"), folders.one).complete()
    checkpoint_to_hf(tmp_path / "policy", tmp_path / "hf")
    sums, counts = plain_sums(hf_model(tmp_path / "hf"), data)
    expected_frozen, _ = plain_sums(hf_model(folders.hf), data)
    reference = reference_logprobs(
        frozen, data.samples, tmp_path / "r.jsonl", "x", max_batch_size=3, log=RunLog(str(tmp_path), {})
    )
    for pair, said in zip(data.samples, expected_frozen.T.tolist(), strict=True):
        assert [reference.of(side) for side in pair] == pytest.approx(said, abs=1e-4)
    (batch,) = one_step(data, reference if preference.needs_reference else None)
    loss, tally = preference.loss(policy, batch)
    assert loss.item() / len(data.samples) == pytest.approx(plain_loss(kind, sums, expected_frozen, counts), rel=1e-5)
    chosen, rejected = (sums / counts).mean(1).tolist()
    assert (tally[4:] / tally[0]).tolist() == pytest.approx([chosen, rejected], abs=1e-5)


def checkpoint_to_hf(source: Path, target: Path) -> None:
    import checkpoint_split

    checkpoint_split.main(
        checkpoint_split.SplitConfig(ckpt_file=str(source), save_path=str(target), format="hf")
    )


def test_w2s_18_first_loss_is_ln_2(whole: list[dict[str, Tensor]]) -> None:
    for kind, found in zip(KINDS, whole, strict=True):
        first = dict(zip(("loss", "accuracy", "margin"), found["reports"][0].tolist(), strict=False))
        if kind["objective"] in ("dpo", "cdpo") and not kind.get("nll_weight"):
            assert first["loss"] == pytest.approx(LN2, abs=1e-6)
        if kind["objective"] in ("dpo", "cdpo", "ipo"):
            assert first["margin"] == pytest.approx(0.0, abs=1e-5)
        if kind["objective"] == "ipo":
            assert first["loss"] == pytest.approx((1 / 0.6) ** 2, abs=1e-5)
        assert found["reports"][1][0] < found["reports"][0][0]  # and one step has helped


def test_w2s_18_golden_number_and_precomputed_equals_online(
    folders: Folders, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    preference = Preference(objective="dpo", beta=0.1)
    each, margins = preference.pair_losses(
        torch.tensor([-10.0, -14.0]), torch.tensor([-11.0, -13.5]), torch.tensor([3, 4])
    )
    assert margins.item() == 1.5 and each.item() == pytest.approx(0.620957, abs=1e-6)
    data, frozen = make_data(PAIRS, tokenizer), load.load_solver(folders.one)
    reference = reference_logprobs(
        frozen, data.samples, tmp_path / "r.jsonl", "x", max_batch_size=2, log=RunLog(str(tmp_path), {})
    )
    (batch,) = one_step(data, reference)
    with torch.no_grad():
        assert_close(batch.reference, response_sums(frozen, batch), rtol=0, atol=2e-5)


def test_w2s_19_orpo_by_hand_and_its_gradient_at_certainty() -> None:
    preference = Preference(objective="orpo", beta=0.1)
    sums, counts = torch.tensor([-2.0, -4.5]), torch.tensor([4, 3])  # means -0.5 and -1.5
    each, _ = preference.pair_losses(sums, torch.zeros(2), counts)
    assert each.item() == pytest.approx(0.517086, abs=1e-6)
    for certain in (0.0, -1e-8, -1e-3):
        sums = torch.tensor([certain, -1.0], dtype=torch.bfloat16, requires_grad=True)
        each, _ = preference.pair_losses(sums, torch.zeros(2), torch.ones(2))
        each.sum().backward()
        assert each.isfinite().all() and sums.grad.isfinite().all()


@pytest.mark.parametrize(("size", "packing"), [(1, False), (8, True), (2, True)])
def test_micro_batches_and_packing(
    folders: Folders, whole: list[dict[str, Tensor]], tmp_path: Path, size: int, packing: bool
) -> None:
    for kind, expected in zip(KINDS, whole, strict=True):
        found = preference_epochs(folders.one, str(tmp_path), size, 8 // size, packing, **kind)
        for name, tensor in found.items():
            assert relative_difference(tensor, expected[name]) < 2e-6, (kind, name)


TWO_RANKS = [(2, 1, 1), (2, 2, 1), (2, 1, 2)]  # ranks, those that share a model, and those that share a batch


@pytest.fixture(scope="module")
def on_ranks(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> OnRanks:
    """By topology, what every rank has of KINDS, and on four ranks of DPO alone, padded and packed."""
    folder, jobs = tmp_path_factory.mktemp("ranks"), {}
    for n, tensor_parallel_size, context_parallel_size in (*TWO_RANKS, (4, 4, 1), (4, 2, 1)):
        share = n // tensor_parallel_size // context_parallel_size
        kinds = [{"accumulation_steps": 2 // share, "packing": place % 2 == 1, **kind}
                 for place, kind in enumerate(KINDS)]
        alone = [{"accumulation_steps": 2, "packing": packing} for packing in (False, True)]
        log_dir = folder / f"{n}-{tensor_parallel_size}-{context_parallel_size}"  # where the reference is kept, too
        arguments = {"folder": (folders.one, folders.two)[tensor_parallel_size > 1], "log_dir": str(log_dir),
                     "cases": [{"max_batch_size": 4, **case} for case in (kinds if n == 2 else alone)]}
        jobs[n, tensor_parallel_size, context_parallel_size] = Job(
            n, "tests.training.workers:preference_cases", arguments, tensor_parallel_size,
            context_parallel_size=context_parallel_size,
        )
    return in_few_launches(jobs, folder)


@pytest.mark.parametrize("tensor_parallel_size", [4, 2])
def test_w2s_18_first_loss_is_ln_2_on_four_ranks(
    on_ranks: OnRanks, tensor_parallel_size: int
) -> None:
    for rank in on_ranks((4, tensor_parallel_size, 1)):
        for place in ("0", "1"):
            assert rank[place]["reports"][0][0].item() == pytest.approx(LN2, abs=1e-6)
            assert rank[place]["reports"][1][0] < rank[place]["reports"][0][0]


@pytest.mark.parametrize(("n", "tensor_parallel_size", "context_parallel_size"), TWO_RANKS)
def test_w2s_18_ranks(
    folders: Folders, whole: list[dict[str, Tensor]], on_ranks: OnRanks,
    n: int, tensor_parallel_size: int, context_parallel_size: int,
) -> None:
    ranks = on_ranks((n, tensor_parallel_size, context_parallel_size))
    model = load.load_solver(folders.one)
    for place, expected in enumerate(whole):
        found = [rank[str(place)] for rank in ranks]
        for name in ("losses", "reports", "held"):
            for rank in found:
                # margins are small differences of sums of some 30 nats
                assert_close(
                    rank.pop(name), expected[name], rtol=1e-5, atol=1e-5, msg=f"{KINDS[place]} {name}"
                )
        for first in range(0, n, tensor_parallel_size):
            joined = join_weights(found[first : first + tensor_parallel_size], model)
            for name, tensor in joined.items():
                assert relative_difference(tensor, expected[name]) < 2e-6, (KINDS[place], name)


def test_lora_starts_at_its_reference_and_leaves_the_base_alone(folders: Folders, tmp_path: Path) -> None:
    before = weights(folders.one)
    found = preference_epochs(folders.one, str(tmp_path), lora_rank=4)
    assert found["reports"][0][0].item() == pytest.approx(LN2, abs=1e-6)
    assert found["reports"][1][0] < LN2 - 1e-6
    for name, tensor in before.items():
        assert torch.equal(found.get(name, found.get(name.replace(".weight", ".base.weight"))), tensor)


def test_scdpo_20_a_prefix_carries_no_loss(folders: Folders, tokenizer: Tokenizer) -> None:
    model = load.load_solver(folders.one)
    for prefix in ("", "1+1\n\n", "1+1\n\n2+2\n\nabc\n\n"):
        chosen, rejected = make_data([Pair("a", ["b c"], ["d"], prefix)], tokenizer).samples[0]
        prompt = encode_prompt(tokenizer, "a", prefix)
        assert chosen.tokens[: chosen.response_start] == rejected.tokens[: rejected.response_start] == prompt
        assert (
            tokenizer.decode(chosen.tokens) == f"a {prefix}b c"
        )  # this vocabulary begins an answer with a space
        space = 0 if prefix else 1
        assert [side.n_response - space for side in (chosen, rejected)] == [
            4,
            2,
        ]  # with EOS, however long the prefix
        (batch,) = one_step(make_data([Pair("a", ["b c"], ["d"], prefix)], tokenizer), None)
        (both,) = response_sums(model, batch)[None]
        for side, found in zip((chosen, rejected), both, strict=True):
            logits = model.logits(model(torch.tensor([side.tokens])))[0]
            each = logits.float().log_softmax(-1)[:-1].gather(1, torch.tensor(side.tokens)[1:, None])[:, 0]
            assert_close(found, each[len(prompt) - 1 :].sum(), rtol=1e-5, atol=1e-5)


def test_scdpo_20_identical_continuations_have_no_difference(folders: Folders, tokenizer: Tokenizer) -> None:
    same = make_data([Pair("a", ["b c"], ["b c"], "1+1\n\n")], tokenizer)  # read_pairs() refuses such a row
    (batch,) = one_step(same, None)
    _, tally = Preference(objective="simpo", beta=2.0).loss(load.load_solver(folders.one), batch)
    assert tally[3].item() == pytest.approx(0.0, abs=1e-6)


def test_scdpo_05_the_prompt_of_training_is_that_of_generation(tokenizer: Tokenizer) -> None:
    for row in PAIRS:
        for pair in make_data([row], tokenizer).samples:
            for side in pair:
                prompt = encode_prompt(tokenizer, row.instruction, row.prefix)
                assert side.tokens[: side.response_start] == prompt
                assert side.tokens.count(tokenizer.bos_id) == side.tokens.count(tokenizer.eos_id) == 1


def reference_of(folder: str, data: Dataset, path: Path, tokenizer: Tokenizer) -> Reference:
    identity = reference_identity(content_hash(Path(folder)), tokenizer, torch.float32)
    log = RunLog(str(path.parent), {})
    return reference_logprobs(
        load.load_solver(folder), data.samples, path, identity, max_batch_size=2, log=log
    )


def test_reference_is_computed_once_and_never_taken_for_another(
    folders: Folders, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = make_data(PAIRS, tokenizer), tmp_path / "reference.jsonl"
    first = reference_of(folders.one, data, path, tokenizer)
    written = path.read_bytes()
    assert len(written.splitlines()) == len({tuple(side.tokens) for pair in data.samples for side in pair})
    assert reference_of(folders.one, data, path, tokenizer) == first and path.read_bytes() == written
    path.write_bytes(written[: len(written) // 2])  # killed within a line
    again = reference_of(folders.one, data, path, tokenizer)
    assert again.logprobs == pytest.approx(first.logprobs, abs=1e-5)
    changed = tmp_path / "changed"
    saving.begin_save(perturbed(load.load_solver(folders.one)), str(changed), folders.one).complete()
    other = reference_of(str(changed), data, path, tokenizer)
    assert not other.logprobs.keys() & first.logprobs.keys()
    assert not any(map(math.isclose, sorted(other.logprobs.values()), sorted(first.logprobs.values())))
    config = read_json(changed / "params.json")  # the same weights turn otherwise
    write_json(changed / "params.json", config | {"rope_theta": 2 * config["rope_theta"]})
    assert not reference_of(str(changed), data, path, tokenizer).logprobs.keys() & other.logprobs.keys()
    monkeypatch.setattr(tokenizer, "fingerprint", lambda: "another")
    assert not reference_of(folders.one, data, path, tokenizer).logprobs.keys() & first.logprobs.keys()


def test_few_bits_are_rounded_by_each_rank_so_a_reference_of_other_ranks_is_another(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for quantize, n_kinds in {"": 1, "bfloat16": 1, "int8": 2, "int4": 2}.items():
        found = set()
        for n in (1, 2):
            monkeypatch.setattr(parallel, "tensor_parallel_size", lambda n=n: n)
            found.add(reference_identity("weights", tokenizer, torch.float32, quantize))
        assert len(found) == n_kinds


def test_a_row_is_known_by_its_prompt_and_response_and_their_border(tokenizer: Tokenizer) -> None:
    rows = [
        encode_response(tokenizer, *texts, prefix=prefix)
        for *texts, prefix in (("a", "b", ""), ("ab", "b", ""), ("a", "bb", ""), ("a", "b", "b"))
    ]
    rows.append(rows[1]._replace(answer_mask=[False] * len(rows[1].tokens)))  # and by what of it counts
    assert len({row_key(identity, row) for identity in "xy" for row in rows}) == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"response": "a"}\n',
            "line 1: expected the keys 'key' and 'logprob' .* found response; choose another",
        ),
        ('{"key": "a", "logprob": null}\n', "line 1: expected the keys"),
        ('[{"response": "a"}]', "row 1: expected the keys"),  # no line end: not torn, another's
        ("text\n", "line 1: not valid json"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    folders: Folders, tokenizer: Tokenizer, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "reference.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        reference_of(folders.one, make_data(PAIRS, tokenizer), path, tokenizer)
    assert path.read_text() == text


def write_pairs(path: Path) -> Path:
    rows = [
        {
            "instruction": f"{a}+{b}=",
            "chosen": f"{a + b}",
            "rejected": f"{a + b + 1}",
            "prefix": "a\n\n" * (b % 2),
        }
        for a, b in itertools.product(range(4), repeat=2)
    ]
    path.write_text(json.dumps(rows))
    return path


def test_held_out_problems_are_the_last_ones(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = str(write_pairs(tmp_path / "pairs.json"))
    data, held = open_preferences(path, "", 0.25, tokenizer, max_seq_len=64)
    assert (len(data.samples), len(held.samples)) == (12, 4)
    assert tokenizer.decode(held.samples[0][0].tokens) == "3+0= 3"
    with pytest.raises(UserError, match="leaves nothing to train or test on"):
        open_preferences(path, "", 0.0, tokenizer, max_seq_len=64)


@pytest.mark.parametrize("lora_rank", [-1, 4])
def test_a_stopped_run_goes_on_bit_for_bit(folders: Folders, tmp_path: Path, lora_rank: int) -> None:
    pairs, name = str(write_pairs(tmp_path / "pairs.json")), "adapter" if lora_rank > 0 else "consolidated"

    def train(save_dir: Path, **flags: object) -> dict[str, Tensor]:
        preference_train.main(
            preference_train.PreferenceTrainConfig(
                ckpt_dir=folders.one,
                save_dir=str(save_dir),
                train_file=pairs,
                lr=1e-3,
                max_batch_size=4,
                epochs=2,
                lora_rank=lora_rank,
                lora_dropout=0.1 if lora_rank > 0 else 0.0,
                save_every=1,
                keep_last=9,
                **flags,
            )
        )
        return storage.read_shard(save_dir / f"{name}.00.pth")

    expected = train(tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "margin" in row]
    assert steps[0]["loss"] == pytest.approx(LN2, abs=1e-6) and steps[-1]["loss"] < LN2
    assert {"accuracy", "margin", "chosen_logprob", "rejected_logprob", "grad_norm", "lr", "mfu"} <= steps[
        0
    ].keys()
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8]
    run = json.loads((tmp_path / "a/run.json").read_text())
    assert run["reference"] == {
        "ckpt_dir": folders.one,
        "fingerprint": storage.fingerprint(Path(folders.one)),
    }
    stopped = tmp_path / "b"
    shutil.copytree(tmp_path / "a", stopped)
    for left in ("step-6", "step-7", "step-8"):
        shutil.rmtree(stopped / left)
    (stopped / f"{name}.00.pth").unlink()
    found = train(stopped, resume="auto")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    again = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "margin", "accuracy", "grad_norm", "eval_loss", "tokens")
    assert [[row.get(key) for key in kept] for row in again] == [
        [row.get(key) for key in kept] for row in rows
    ]


def test_the_reference_may_be_another_model(folders: Folders, tmp_path: Path) -> None:
    other = tmp_path / "other"
    saving.begin_save(perturbed(load.load_solver(folders.one)), str(other), folders.one).complete()
    pairs = str(write_pairs(tmp_path / "pairs.json"))
    preference_train.main(
        preference_train.PreferenceTrainConfig(
            ckpt_dir=folders.one,
            save_dir=str(tmp_path / "out"),
            train_file=pairs,
            reference_ckpt_dir=str(other),
            max_steps=1,
        )
    )
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["reference"]["fingerprint"] == storage.fingerprint(other)
    row = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[0])
    assert abs(row["margin"]) > 1e-3 and row["loss"] != pytest.approx(LN2, abs=1e-5)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_policy_is_its_own_reference(folders: Folders, tmp_path: Path, quantize: str) -> None:
    """The reference is what the adapters are put on, so the first loss is ln 2; its log-probs are not float32's."""
    pairs, file = str(write_pairs(tmp_path / "pairs.json")), tmp_path / "reference.jsonl"
    for bits in ("", quantize):
        preference_train.main(
            preference_train.PreferenceTrainConfig(
                ckpt_dir=folders.one, save_dir=str(tmp_path / f"out-{bits}"), train_file=pairs, lora_rank=2, lr=1e-2,
                max_batch_size=15, reference_file=str(file), quantize=bits, epochs=4,
            )
        )
        rows = [json.loads(line) for line in (tmp_path / f"out-{bits}/metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "margin" in row]
        assert losses[0] == pytest.approx(LN2, abs=1e-6) and losses[-1] < LN2 - 1e-2
    values = [json.loads(line)["logprob"] for line in file.read_text().splitlines()]
    assert len(values) == len(set(values))


def test_an_adapter_is_its_own_reference(folders: Folders, tmp_path: Path) -> None:
    pairs = str(write_pairs(tmp_path / "pairs.json"))
    for source, target in ((folders.one, "first"), (str(tmp_path / "first"), "second")):
        preference_train.main(
            preference_train.PreferenceTrainConfig(
                ckpt_dir=source,
                save_dir=str(tmp_path / target),
                train_file=pairs,
                lora_rank=2,
                lr=1e-2,
                max_batch_size=12,
            )
        )
        row = json.loads((tmp_path / target / "metrics.jsonl").read_text().splitlines()[0])
        assert row["loss"] == pytest.approx(
            LN2, abs=1e-6
        )  # the base would be another reference the second time
    first, second = (
        json.loads((tmp_path / x / "run.json").read_text())["reference"] for x in ("first", "second")
    )
    assert first["fingerprint"] != second["fingerprint"]


def test_dpo_loss_of_equal_margins_is_symmetric_under_smoothing() -> None:
    margins = torch.tensor([0.7, -0.7])
    smoothed = losses.dpo_loss(margins, 1.0, 0.3)
    plain = losses.dpo_loss(margins, 1.0)
    assert_close(smoothed, 0.7 * plain + 0.3 * plain.flip(0))


def test_rows_are_no_longer_than_the_references_context(
    folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = shutil.copytree(folders.one, tmp_path / "short")
    write_json(short / "params.json", read_json(short / "params.json") | {"max_seq_len": 8})
    rows = [{"instruction": f"{a}", "chosen": "1" * n, "rejected": "2"} for a, n in ((1, 1), (2, 1), (3, 1), (4, 40))]
    write_json(tmp_path / "pairs.json", rows)

    def train(max_seq_len: int) -> None:
        preference_train.main(preference_train.PreferenceTrainConfig(
            ckpt_dir=folders.one, reference_ckpt_dir=str(short), save_dir=str(tmp_path / "out"), held_out=0.4,
            train_file=str(tmp_path / "pairs.json"), max_seq_len=max_seq_len, dry_run=True))

    with pytest.raises(UserError, match="--max_seq_len 64 is more than the context of .*short, 8 tokens"):
        train(64)
    with pytest.raises(UserError, match="longer than --max_seq_len 8"):
        train(-1)

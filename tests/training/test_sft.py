"""src/training/sft.py: what the loss is on, and that an update does not depend on how it is cut up."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from src import load
from src.command.config import OptimizerFlags, TokenizerFlags
from src.data.batch import Batch, BatchSampler, Dataset
from src.data.encoding import encode_response, masked_text
from src.data.examples import Chat, Instruction
from src.errors import UserError
from src.models.decoder import Decoder
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer
from src.training.sft import n_supervised, sft_dataset, sft_loss
from src.training.trainer import Trainer
from tests.conftest import Folders
from tests.ranks import run_ranks
from tests.training.workers import INSTRUCTIONS, join_weights, sft_epochs


@pytest.fixture
def model(folders: Folders) -> Decoder:
    return load.load_solver(folders.one)


def make_data(rows: list[Instruction], tokenizer: Tokenizer, max_seq_len: int = 64) -> Dataset:
    """The rows as training data."""
    return sft_dataset(rows, tokenizer, max_seq_len=max_seq_len, source="rows.json")


def batching(max_batch_size: int, accumulation_steps: int, seed: int = 1) -> BatchSampler:
    """The steps of one data-parallel rank."""
    return BatchSampler(max_batch_size=max_batch_size, accumulation_steps=accumulation_steps, seed=seed)


@pytest.mark.parametrize("packing", [False, True])
def test_w2s_03_loss_is_the_mean_over_outputs_and_their_eos(
    model: Decoder, tokenizer: Tokenizer, packing: bool
) -> None:
    rows = [Instruction("1+1=", ["2"]), Instruction("a", ["bcd efg"])]
    ((_, _, batches),) = batching(2, 1).steps(make_data(rows, tokenizer), packing=packing, epochs=1)
    expected, count = 0.0, 0
    for row in rows:
        prompt = [1, *tokenizer.encode(row.instruction)]
        response = [*tokenizer.encode(row.outputs[0]), 2]
        logprobs = model.logits(model(torch.tensor([prompt + response])))[0].log_softmax(-1)
        for place, token in enumerate(response, len(prompt)):
            expected -= logprobs[place - 1, token].item()
            count += 1
    assert n_supervised(batches) == count
    assert sft_loss(model, batches[0]).item() / count == pytest.approx(expected / count, abs=1e-5)


def test_w2s_03_four_rows_are_learnt_by_heart(model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [Instruction(f"{n}+1=", [f"{n + 1} #### {n + 1}"]) for n in range(4)]
    data = make_data(rows, tokenizer)
    encoded = encode_response(tokenizer, rows[0].instruction, rows[0].outputs[0])
    assert encoded.tokens.count(tokenizer.eos_id) == 1 and encoded.tokens[-1] == tokenizer.eos_id
    assert encoded.tokens.count(tokenizer.bos_id) == 1
    assert not any(encoded.supervised[: encoded.response_start])
    trainer = Trainer(
        model,
        RunLog(str(tmp_path), {}),
        OptimizerFlags(lr=1e-2, schedule="constant", warmup_ratio=0.0),
        total_steps=60,
    )
    for _, _, (batch,) in batching(4, 1).steps(data, packing=False, epochs=60):
        trainer.backward(sft_loss(model, batch) / n_supervised([batch]))
        loss = trainer.step().loss
    assert loss < 0.05


def test_prompt_targets_and_padding_do_not_matter(model: Decoder, tokenizer: Tokenizer) -> None:
    ((_, _, (batch,)),) = batching(2, 1).steps(
        make_data(INSTRUCTIONS[:2], tokenizer), packing=False, epochs=1
    )
    loss = sft_loss(model, batch)
    assert not batch.response_mask[:, 0].any() and (~batch.response_mask).any(1).all()
    wider = Batch(
        torch.nn.functional.pad(batch.tokens, (0, 5), value=9),
        torch.nn.functional.pad(batch.response_mask, (0, 5)),
    )
    end = batch.response_mask.int().argmax(1) + batch.response_mask.sum(1)
    for row, place in enumerate(end):
        wider.tokens[row, place:] = 63
    assert_close(sft_loss(model, wider), loss, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("max_batch_size, accumulation_steps", [(4, 1), (1, 4), (3, 2), (2, 3)])
@pytest.mark.parametrize("packing", [False, True])
def test_gradient_and_update_do_not_depend_on_the_split(
    folders: Folders, tmp_path: Path, max_batch_size: int, accumulation_steps: int, packing: bool
) -> None:
    per_step = max_batch_size * accumulation_steps
    found = sft_epochs(folders.one, str(tmp_path), max_batch_size, accumulation_steps, packing)
    whole = sft_epochs(folders.one, str(tmp_path), per_step, 1)
    assert found["losses"].shape == whole["losses"].shape == (2 * -(-len(INSTRUCTIONS) // per_step),)
    for name, expected in whole.items():
        assert_close(
            found[name], expected, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_update_is_the_same_on_two_ranks(folders: Folders, model: Decoder, tmp_path: Path) -> None:
    one = sft_epochs(folders.one, str(tmp_path / "log"))
    two = run_ranks(
        2, "tests.training.workers:sft_epochs", tmp_path, folder=folders.two, log_dir=str(tmp_path / "log")
    )
    assert_close(two[0].pop("losses"), one.pop("losses"), rtol=1e-6, atol=1e-5)
    two[1].pop("losses")
    for name, found in join_weights(two, model).items():
        assert_close(found, one[name], rtol=1e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert not torch.equal(found, model.get_parameter(name))


def texts_of(data: Dataset, tokenizer: Tokenizer, epoch: int, seed: int = 1) -> list[str]:
    """The responses of an epoch in training order."""
    steps = batching(2, 2, seed).steps(data, packing=False, epochs=epoch, done=2 * (epoch - 1))
    batches = [batch for step in steps for batch in step.batches]
    return [
        tokenizer.decode(tokens[mask].tolist())
        for batch in batches
        for tokens, mask in zip(batch.tokens, batch.response_mask, strict=True)
    ]


def test_order_and_choice_of_outputs_depend_on_seed_and_epoch_alone(tokenizer: Tokenizer) -> None:
    data = make_data(INSTRUCTIONS, tokenizer)
    second = texts_of(data, tokenizer, 2)
    assert second == texts_of(
        make_data(INSTRUCTIONS, tokenizer), tokenizer, 2
    )  # epoch 1 was not drawn before
    assert second != texts_of(data, tokenizer, 1)
    assert second != texts_of(data, tokenizer, 2, seed=2)


def test_every_epoch_has_every_row_once_with_one_of_its_outputs(tokenizer: Tokenizer) -> None:
    data = make_data(INSTRUCTIONS, tokenizer)
    several = INSTRUCTIONS[3].outputs
    seen = set()
    for epoch in range(1, 9):
        texts = texts_of(data, tokenizer, epoch)
        (chosen,) = set(texts) & set(several)
        seen.add(chosen)
        assert sorted(texts) == sorted(
            [chosen, *(row.outputs[0] for row in INSTRUCTIONS if row.outputs != several)]
        )
    assert seen == set(several)
    steps = list(batching(2, 2).steps(data, packing=False, epochs=2))
    assert [(step.epoch, step.number) for step in steps] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert batching(2, 2).steps_per_epoch(len(data.samples)) == 2


def test_long_rows_are_dropped_and_counted_up_to_one_percent(tokenizer: Tokenizer) -> None:
    long = Instruction("a", ["b", "c" * 40])
    data = make_data([Instruction("a", ["b"])] * 99 + [long], tokenizer, max_seq_len=30)
    assert len(data.samples) == 99 and data.report == "rows.json: 100 samples, 1 too long: 0 cut, 1 dropped"
    with pytest.raises(UserError, match="rows.json: 2 of 100 rows are longer than --max_seq_len 30"):
        make_data([Instruction("a", ["b"])] * 98 + [long] * 2, tokenizer, max_seq_len=30)


def test_every_answer_of_a_conversation_is_learnt(folders: Folders, model: Decoder) -> None:
    tokenizer = load.load_tokenizer(folders.one, TokenizerFlags(chat_template="llama-2"))
    messages = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "cd"},
    ]
    data = sft_dataset([Chat("f, row 1", messages)], tokenizer, max_seq_len=200, source="f")
    for packing in (False, True):
        ((_, _, (found,)),) = batching(1, 1).steps(data, packing=packing, epochs=1)
        learnt = found.tokens[found.response_mask].tolist()
        assert tokenizer.decode(learnt).split() == ["2", "cd"] and learnt.count(tokenizer.eos_id) == 2
    shown = masked_text(data.samples[0][0], tokenizer)
    assert shown.count("[[2") == shown.count("[[cd") == 1 and shown.count("[[") == 2
    plain = load.load_tokenizer(folders.one)
    with pytest.raises(UserError, match="f, row 1: messages need a --chat_template"):
        sft_dataset([Chat("f, row 1", messages)], plain, max_seq_len=200, source="f")


@pytest.mark.parametrize("truncation", ["error", "drop", "left", "right"])
def test_a_text_of_100_kb_is_refused_or_fitted_and_counted(tokenizer: Tokenizer, truncation: str) -> None:
    """An answer longer than the context may be lost once, counted; two of two are refused."""
    long = Instruction("1+1=", ["2" * 100_000])

    def fitted(rows: list[Instruction]) -> Dataset:
        return sft_dataset(rows, tokenizer, max_seq_len=64, source="rows.json", truncation=truncation)

    with pytest.raises(
        UserError, match=r"rows.json: 2 of 2 rows are longer than --max_seq_len 64 \(the longest has 100"
    ):
        fitted([long, long])
    prompt = Instruction("1" * 100_000, ["2"])
    if truncation == "left":  # only the prompt's beginning is lost
        ((cut,),) = fitted([prompt]).samples
        (whole,) = make_data([Instruction("1", ["2"])], tokenizer).samples[0]
        assert len(cut.tokens) == 64 and cut.tokens[-cut.n_response :] == whole.tokens[-whole.n_response :]
    else:
        with pytest.raises(UserError, match="1 of 1 rows are longer"):
            fitted([prompt])
    if truncation != "error":
        data = fitted([Instruction("1+1=", ["2"])] * 200 + [long])
        assert data.report.startswith("rows.json: 201 samples, 1 too long")
        assert max(len(option.tokens) for row in data.samples for option in row) <= 64

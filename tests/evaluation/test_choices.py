"""src/evaluation/choices.py: transformers' log-probs of every choice, acc and acc_norm of them, on any ranks."""

import json
from pathlib import Path

import pytest
import torch

import solver_evaluate
from dataset.prepare import build, save
from src.errors import UserError
from src.evaluation.metrics import wilson_interval
from src.report.page import write_report
from tests.ranks import succeed
from tests.reference import hf_model
from tests.tiny import split, write_hf_llama, write_tokenizer

ARC = [
    {"question": f"{n}+{n % 3}=", "answerKey": "ABCD"[n % 4], "id": f"q{n}",
     "choices": {"label": [*"ABCD"], "text": [f"{n + n % 3}", f"a {n} b", "bead" * (1 + n % 3), "cafe é"]}}
    for n in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, its one-shard split and the problems of a published file."""
    folder = tmp_path_factory.mktemp("choices")
    split(write_hf_llama(folder / "hf"), folder / "one")
    (folder / "arc.jsonl").write_text("\n".join(map(json.dumps, ARC)))
    save(build(folder / "arc.jsonl", "arc", [], {}, strict=True).rows, folder / "test.json")
    return folder


def evaluate(folder: Path, log_dir: Path, **changes: object) -> dict[str, object]:
    """results.json."""
    flags = {"task": "ARC", "ckpt_dir": str(folder / "one"), "label_file": str(folder / "test.json"),
             "log_dir": str(log_dir), "choices": "text"}
    solver_evaluate.main(solver_evaluate.SolverEvaluateConfig(**flags | changes))
    return json.loads((log_dir / "results.json").read_text())


def rows(log_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (log_dir / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "template"), [("text", ""), ("letter", ""), ("text", "llama-2")])
def test_choices_have_the_log_probs_of_transformers_and_a_rerun_continues(
    folder: Path, tmp_path: Path, kind: str, template: str
) -> None:
    model, tokenizer = hf_model(folder / "hf"), write_tokenizer(tmp_path)
    results = evaluate(folder, tmp_path / "log", choices=kind, max_batch_size=5, chat_template=template)
    right, right_norm = 0, 0
    for raw, row in zip(ARC, rows(tmp_path / "log"), strict=True):
        texts, sums = raw["choices"]["text"], []
        listed = " ".join(f"({letter}) {text}" for letter, text in zip("ABCD", texts, strict=True))
        prompt = f"Question: {raw['question']}" + f"\nOptions: {listed}" * (kind == "letter") + "\nAnswer:"
        prompt = f"[INST] {prompt} [/INST]" if template else prompt
        scored = texts if kind == "text" else [*"ABCD"]
        for text in scored:
            start, ids = 1 + len(tokenizer.encode(prompt)), [1, *tokenizer.encode(f"{prompt} {text}")]
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logprobs[at - 1, ids[at]].item() for at in range(start, len(ids))))
        assert row["choices"] == scored and row["choice_logprobs"] == pytest.approx(sums, abs=1e-3)
        best, best_norm = (max(range(4), key=each.__getitem__) for each in (
            sums, [value / len(text.encode()) for value, text in zip(sums, scored, strict=True)]))
        assert row["answer"] == "ABCD"[best] and row["logprob"] == pytest.approx(sums[best], abs=0.051)
        right, right_norm = right + ("ABCD"[best] == raw["answerKey"]), right_norm + (
            "ABCD"[best_norm] == raw["answerKey"])
    assert (results["accuracy"], results["acc_norm"]) == (right / 12, right_norm / 12)
    assert results["acc_norm_interval"] == list(wilson_interval(right_norm, 12))
    lines = (tmp_path / "log/samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log/samples.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    again = evaluate(folder, tmp_path / "log", choices=kind, max_batch_size=64, chat_template=template)
    assert again == results
    assert [row["answer"] for row in rows(tmp_path / "log")] == [json.loads(line)["answer"] for line in lines]
    with pytest.raises(UserError, match=f"holds samples with choices={kind}, but this run has None"):
        evaluate(folder, tmp_path / "log", choices="", chat_template=template)


def test_two_ranks_choose_as_one_and_runs_are_compared(folder: Path, tmp_path: Path) -> None:
    results = evaluate(folder, tmp_path / "one")
    succeed("solver_evaluate.py", "--task", "ARC", "--ckpt_dir", folder / "one", "--label_file", folder / "test.json",
            "--log_dir", tmp_path / "two", "--choices", "text", n=2)
    assert json.loads((tmp_path / "two/results.json").read_text()) == results
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one["choice_logprobs"] == pytest.approx(two["choice_logprobs"], abs=2e-3)
    page = write_report(tmp_path / "two", tmp_path / "one").read_text()
    assert "Of 12 problems that both have" in page and "acc_norm" in page
    # graded again from the file they are the same numbers
    again = evaluate(folder, tmp_path / "again", choices="", ckpt_dir="",
                     samples_file=str(tmp_path / "one/samples.jsonl"))
    assert again["acc_norm"] == results["acc_norm"] and again["accuracy"] == results["accuracy"]


@pytest.mark.parametrize("flags", [{}, {"choices": None, "task": "GSM8K"}], ids=["choices", "greedy"])
def test_a_model_without_numbers_has_no_accuracy(folder: Path, tmp_path: Path, flags: dict[str, object]) -> None:
    """It would choose A each time, or say token 0 for ever."""
    model = hf_model(folder / "hf")
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    split(tmp_path / "hf", tmp_path / "nan")
    with pytest.raises(UserError, match=r"'q\d+': the model's logits are NaN: its weights hold NaN"):
        evaluate(folder, tmp_path / "log", ckpt_dir=str(tmp_path / "nan"), **flags)


@pytest.mark.parametrize(("row", "flags", "complaint"), [
    ({}, {"temperature": 1.0}, "--temperature has no effect on --choices"),
    ({}, {"task": "GSM8K"}, "--task GSM8K compares by exact@5; name a task of choices"),
    ({}, {"ckpt_dir": "", "samples_file": "x.jsonl"}, "--choices has no effect on samples that exist"),
    ({"choices": None}, {}, "problem '0' has no 'choices', which --choices text needs"),
    ({"question": None}, {}, "problem '0' has no 'question'"),
    ({"question": None}, {"choices": "letter"}, None),
    ({"label": "D"}, {}, "'label' is 'D'; expected the letter of a choice, A to C"),
    ({"choices": ["4"]}, {}, "expected 2 to 10 texts"),
    ({"choices": ["4", "5", "9"]}, {}, "'choices' is .*, which would be lost"),
    ({"question": "12" * 70}, {}, "but the model's context is 128"),
])
def test_what_does_not_go_together_is_refused_by_name(
    folder: Path, tmp_path: Path, row: dict[str, object], flags: dict[str, object], complaint: str | None
) -> None:
    problem = {"instruction": "2+2= (A) 4 (B) 5 (C) 6", "question": "2+2=", "choices": ["4", "5", "6"], "label": "A"}
    (tmp_path / "labels.jsonl").write_text(json.dumps(problem | row))
    flags = {"label_file": str(tmp_path / "labels.jsonl"), "task": "choice"} | flags
    if complaint is None:
        assert evaluate(folder, tmp_path / "log", **flags)["problems"] == 1
        return
    with pytest.raises(UserError, match=complaint):
        evaluate(folder, tmp_path / "log", **flags)

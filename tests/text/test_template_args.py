"""--template_args and prompts that open thoughts, in the scripts: recorded, followed, exported, refused by name."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import checkpoint_split
from solver_evaluate import SolverEvaluateConfig
from solver_evaluate import main as evaluate
from solver_train import SolverTrainConfig
from solver_train import main as train
from src import load, parallel
from src.command.config import TokenizerFlags
from src.data.encoding import encode_prompt
from src.data.examples import read_samples
from src.errors import UserError
from src.text.tokenizer import Tokenizer
from tests.reference import shared
from tests.text.files import write_json, write_merges
from tests.text.test_template_kinds import BEGUN, DROPPED, OPENED, PLAIN, THOUGHT

OFF = "enable_thinking=false"
ROWS = [{"messages": PLAIN}] * 4


@pytest.fixture(autouse=True)
def one_process() -> None:
    parallel.start()


def base(folder: Path, template: str = "", tokenizer: Path | None = None) -> str:
    """A tiny Llama whose tokenizer has this template, or is a copy of another one, split."""
    hf = folder / "hf"
    if tokenizer:
        shutil.copytree(tokenizer, hf)
    else:
        hf.mkdir()
        write_merges(hf, chat_template=template)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=Tokenizer(hf).vocab_size, max_position_embeddings=512, **sizes))
    model.save_pretrained(hf)
    checkpoint_split.main(checkpoint_split.SplitConfig(ckpt_file=str(hf), save_path=str(folder / "base"), n=1))
    return str(folder / "base")


def trained(folder: Path, ckpt_dir: str, rows: list[dict[str, object]] = ROWS, **flags: object) -> str:
    file, out = write_json(folder / "rows.json", rows), str(flags.pop("save_dir", folder / "out"))
    train(SolverTrainConfig(ckpt_dir=ckpt_dir, save_dir=out, train_file=str(file), **flags))
    return out


def sampled(folder: Path, ckpt_dir: str, **flags: object) -> str:
    file = write_json(folder / "problems.json", [{"instruction": "1+1?"}])
    evaluate(SolverEvaluateConfig(task="none", label_file=str(file), log_dir=str(folder / "log"), ckpt_dir=ckpt_dir,
                                  max_new_tokens=4, **flags))
    return read_samples(str(folder / "log/samples.jsonl"))[0].prompt


def test_arguments_are_recorded_followed_and_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    start = base(tmp_path, DROPPED)
    out = trained(tmp_path, start, chat_template="file", template_args=OFF, max_steps=1)
    assert load.load_config(out).template_args == {"enable_thinking": False}
    followed = load.load_tokenizer(out)
    ids = encode_prompt(followed, "1+1?")
    assert followed.decode(ids).endswith("assistant\n<think>\n\n</think>\n\n")
    more = trained(tmp_path, out, save_dir=tmp_path / "more", max_steps=1)
    assert load.load_config(more).template_args == {"enable_thinking": False}
    load.check_tokenizer(followed, more)
    sampled(tmp_path, more)
    assert not caplog.records
    with pytest.raises(UserError, match="template_args={'enable_thinking': False}, but this run has None"):
        sampled(tmp_path, more, template_args="{}")
    assert '{"enable_thinking": false}, but reads texts in the form of file here' in caplog.text
    caplog.clear()
    load.check_tokenizer(load.load_tokenizer(start, TokenizerFlags(chat_template="file")), out)
    assert 'trained with chat template file {"enable_thinking": false}, but reads texts in the form of' in caplog.text
    # another template takes none of them
    assert load.load_tokenizer(out, TokenizerFlags(chat_template="qwen")).template_args == {}
    config = checkpoint_split.SplitConfig(ckpt_file=out, save_path=str(tmp_path / "back"), format="hf")
    checkpoint_split.main(config)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")
    question = [{"role": "user", "content": "1+1?"}]
    assert theirs.apply_chat_template(question, add_generation_prompt=True, return_dict=False) == ids
    thinks = theirs.apply_chat_template(question, add_generation_prompt=True, return_dict=False, enable_thinking=True)
    assert ids[: len(thinks)] == thinks != ids
    config = checkpoint_split.SplitConfig(ckpt_file=str(tmp_path / "back"), save_path=str(tmp_path / "again"), n=1)
    checkpoint_split.main(config)
    assert encode_prompt(load.load_tokenizer(str(tmp_path / "again")), "1+1?") == ids


def test_a_run_is_resumed_with_its_arguments(tmp_path: Path) -> None:
    start = base(tmp_path, DROPPED)
    flags = {"chat_template": "file", "save_every": 1, "resume": "auto"}
    out = trained(tmp_path, start, template_args=OFF, max_steps=1, **flags)
    assert (Path(out) / "step-1").is_dir()
    with pytest.raises(UserError, match="template_args was {'enable_thinking': False} and is nothing now"):
        trained(tmp_path, start, max_steps=2, **flags)
    trained(tmp_path, start, template_args='{"enable_thinking": false}', max_steps=2, **flags)  # the same


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"template_args": OFF}, "--template_args enable_thinking: --chat_template none has no template"),
        ({"template_args": "x=1", "chat_template": "file"}, "takes no 'x' .*can be given is: enable_thinking"),
        ({"template_args": "x=1", "chat_template": "qwen"}, "chat template qwen: it takes no 'x'"),
    ],
)
def test_arguments_without_effect_are_refused(tmp_path: Path, flags: dict[str, str], message: str) -> None:
    start = base(tmp_path, DROPPED)
    for command in (trained, sampled):
        with pytest.raises(UserError, match=message):
            command(tmp_path, start, **flags)
    assert not (tmp_path / "out").exists()


def test_arguments_stand_in_params_json_as_an_object(tmp_path: Path) -> None:
    params = Path(base(tmp_path, DROPPED)) / "params.json"
    params.write_text(json.dumps(json.loads(params.read_text()) | {"template_args": ["x"]}))
    with pytest.raises(UserError, match=r"params.json: template_args=\['x'\]: expected an object"):
        load.load_tokenizer(str(params.parent))


@pytest.mark.parametrize("report", ["", "TK1_prompt_opens_think/r1", "TK1_prompt_opens_think/qwq"])
def test_a_prompt_that_opens_thoughts_is_trained_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], report: str
) -> None:
    start = base(tmp_path, OPENED, shared(f"reports/{report}") if report else None)
    rows = [{"instruction": "1+1?", "output": "<think>\n" + BEGUN}] * 2 + [{"messages": THOUGHT}]
    trained(tmp_path, start, rows, chat_template="file", dry_run=True)
    shown = capsys.readouterr().out
    assert shown.count("<think>") == 1 and "<think>\n[[Easy.\n</think>\n\nIt is 2.<" in shown
    out = trained(tmp_path, start, rows, chat_template="file")
    metrics = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in metrics if "supervised_tokens" in row]) == 4  # the conversation is two samples
    assert sampled(tmp_path, out) == "1+1?"


def test_tk2_is_trained_on_every_turn(tmp_path: Path) -> None:
    start = base(tmp_path, tokenizer=shared("reports/TK2_qwen3_multi_turn/tokenizer"))
    out = trained(tmp_path, start, [{"messages": THOUGHT}] * 2, chat_template="file")
    metrics = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in metrics if "supervised_tokens" in row]) == 4

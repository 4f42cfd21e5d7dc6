"""An instruct model in every stage: each shows it the text that transformers makes of the same messages."""

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from src import load, parallel
from src.command.config import TokenizerFlags
from src.errors import UserError
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from tests import shown_ids
from tests.ranks import succeed
from tests.text.files import write_json, write_merges
from tests.tiny import build, main_of

# A system message of its own, and a variable
TEMPLATE = """\
{% if messages[0].role != 'system' %}<|im_start|>system
Be brief.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{{ ' (' + tone + ')' if loop.first and tone is defined else '' }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SYSTEM = "You're exact: write \\boxed{}, \"so\",\nthen stop."
FORM = {"chat_template": "file", "template_args": "tone=kind", "system_prompt": SYSTEM}
ANSWERS = {"Add 12 and 7": ("It is 19", "It is 20"), "Take 5 from 9": ("It is 4", "Is it 5"),
           "Half of 48": ("It is 24", "It is 12"), "Count to 3": ("It is 3", "Not so")}
PROBLEMS = [{"id": str(n), "instruction": text, "output": right, "label": right[6:]}
            for n, (text, (right, _)) in enumerate(ANSWERS.items())]
PAIRS = [{"instruction": text, "chosen": right, "rejected": wrong} for text, (right, wrong) in ANSWERS.items()]
LABELS = [{"instruction": text, "steps": [wrong], "labels": [0]} for text, (_, wrong) in ANSWERS.items()]


class World(NamedTuple):
    """A folder with data and `base`, an imported instruct model; and transformers' tokenizer of it."""

    folder: Path
    theirs: PreTrainedTokenizerBase

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def prompt(self, instruction: str) -> list[int]:
        """What transformers makes of the system message and the problem."""
        return self._ids(instruction, add_generation_prompt=True)

    def whole(self, instruction: str, answer: str) -> list[int]:
        """The same with an answer, up to the token that ends it."""
        ids, end = self._ids(instruction, answer), self.theirs.convert_tokens_to_ids("<|im_end|>")
        return ids[: len(ids) - ids[::-1].index(end)]

    def _ids(self, instruction: str, answer: str = "", **more: object) -> list[int]:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": instruction}]
        messages += [{"role": "assistant", "content": answer}] if answer else []
        return self.theirs.apply_chat_template(messages, return_dict=False, tone="kind", **more)


def import_model(folder: Path, **config: object) -> str:
    """A tiny Llama of transformers whose tokenizer has TEMPLATE, or what else config says of it, split."""
    write_merges(folder / "hf", **{"chat_template": TEMPLATE} | config)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=Tokenizer(folder / "hf").vocab_size, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    main_of("checkpoint_split")(ckpt_file=str(folder / "hf"), save_path=str(folder / "base"))
    return str(folder / "base")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Nothing in it may be changed."""
    folder = tmp_path_factory.mktemp("instruct")
    (folder / "hf").mkdir()
    import_model(folder)
    for name, rows in (("problems", PROBLEMS), ("pairs", PAIRS), ("labels", LABELS)):
        write_json(folder / f"{name}.json", rows)
    parallel.start()
    return World(folder, AutoTokenizer.from_pretrained(folder / "hf"))


def train(world: World, name: str, script: str, n: int = 1, **flags: object) -> None:
    """One step of a trainer on n ranks; what they are shown is kept as `name`.ids."""
    words = [f"--{flag}={value}" for flag, value in ({"max_steps": 1} | flags).items()]
    succeed("tests/shown_ids.py", world.path(f"{name}.ids"), f"{script}.py", *words, n=n)


@pytest.fixture(scope="module")
def trained(world: World) -> World:
    """SFT with a template, and from that alone a verifier and DPO, and from these PPO."""
    path = world.path
    train(world, "sft", "solver_train", 2, ckpt_dir=path("base"), save_dir=path("sft"),
          train_file=path("problems.json"), max_batch_size=2, **FORM)
    pairs = {"label_file": path("pairs.json"), "train_file": path("pairs.json"), "ckpt_dir": path("sft")}
    with ThreadPoolExecutor() as both:
        runs = [both.submit(train, world, name, script, save_dir=path(name), max_batch_size=4, **pairs)
                for name, script in (("verifier", "verifier_train"), ("dpo", "preference_train"))]
        for run in runs:
            run.result()
    train(world, "ppo", "ppo_train", 2, actor_ckpt_dir=path("dpo"), actor_save_dir=path("ppo"),
          critic_ckpt_dir=path("verifier"), critic_save_dir=path("critic"), reward_model_ckpt_dir=path("verifier"),
          reward="verifier,rule", train_file=path("problems.json"), max_buffer_size=4, max_batch_size=2,
          max_new_tokens=3)
    return world


def times(ids: list[int], rows: list[list[int]]) -> int:
    """How often these ids stand in the rows, one after the other."""
    return sum(row[place : place + len(ids)] == ids for row in rows for place in range(len(row)))


def assert_shown(world: World, rows: list[list[int]], *sides: int) -> None:
    """Each problem stands in the rows as transformers puts it and in no other form, with its answers of these sides."""
    for instruction, answers in ANSWERS.items():
        shown = times(world.prompt(instruction), rows)
        assert shown and shown == times(world.theirs.encode(instruction), rows), instruction
        for side in sides:
            assert times(world.whole(instruction, answers[side]), rows), answers[side]


def test_trainers_show_what_transformers_writes(trained: World) -> None:
    for name, sides in (("sft", (0,)), ("verifier", (0, 1)), ("ppo", ())):
        assert_shown(trained, shown_ids.read(trained.folder, f"{name}.ids"), *sides)
    rows = shown_ids.read(trained.folder, "dpo.ids")
    assert_shown(trained, rows, 0)
    for instruction, (_, rejected) in ANSWERS.items():  # packed, it stands after the chosen answer to the same prompt
        assert times(trained.whole(instruction, rejected)[len(trained.prompt(instruction)) :], rows), rejected


def test_every_trainer_records_the_form(trained: World) -> None:
    for name in ("sft", "verifier", "dpo", "ppo", "critic"):
        config = load.load_config(trained.path(name))
        assert (config.chat_template, config.template_args) == ("file", {"tone": "kind"}), name
        assert config.system_prompt == SYSTEM, name
        flags = json.loads((trained.folder / name / "run.json").read_text())["flags"] if name != "critic" else FORM
        assert flags["system_prompt"] == (SYSTEM if name in ("sft", "critic") else "")


def test_other_commands_follow(
    trained: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    forward = Decoder.forward

    def shown(run: Callable[..., None], **flags: object) -> list[list[int]]:
        monkeypatch.setattr(Decoder, "forward", forward)
        monkeypatch.setattr(Decoder, "forward", shown_ids.keeping(tmp_path / "ids"))
        run(**flags)
        rows = shown_ids.read(tmp_path, "ids")
        (tmp_path / "ids").unlink()
        return rows

    samples = {"task": "none", "label_file": trained.path("problems.json"), "max_new_tokens": 3, "temperature": 1.0}
    log = str(tmp_path / "log")
    evaluate, score = main_of("solver_evaluate"), main_of("verifier_evaluate")
    assert_shown(trained, shown(evaluate, ckpt_dir=trained.path("ppo"), log_dir=log, num_samples=2, **samples))
    judge = {"ckpt_dir": trained.path("verifier"), "samples_file": f"{log}/samples.jsonl", "task": "GSM8K",
             "label_file": trained.path("problems.json"), "log_dir": str(tmp_path / "scored")}
    assert_shown(trained, shown(score, **judge))
    credit = {"reference_ckpt_dir": trained.path("sft"), "steps_file": trained.path("labels.json")}
    assert_shown(trained, shown(main_of("preference_evaluate"), ckpt_dir=trained.path("dpo"),
                                log_dir=str(tmp_path / "credit"), **credit), 1)
    attempts = samples | {"task": "toy", "attempts": 1}
    assert_shown(trained, shown(build.attempts, ckpt_dir=trained.path("dpo"), log_dir=str(tmp_path / "more"),
                                **attempts))
    assert not caplog.records

    # another form is said, is another set of samples, and gives scores of its own
    with pytest.raises(UserError, match="holds samples with system_prompt=You're exact.*, but this run has None"):
        evaluate(ckpt_dir=trained.path("ppo"), log_dir=log, num_samples=2, system_prompt="none", **samples)
    assert 'and the system prompt "You' in caplog.text and 'in the form of file {"tone": "kind"} here' in caplog.text
    rows = shown(score, **judge, system_prompt="none")
    assert rows and not times(trained.prompt(PROBLEMS[0]["instruction"]), rows)


def test_ppo_says_that_its_verifier_reads_another_form(trained: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    flags = {"actor_ckpt_dir": trained.path("dpo"), "actor_save_dir": trained.path("a"), "dry_run": True,
             "critic_ckpt_dir": trained.path("verifier"), "critic_save_dir": trained.path("c"),
             "reward_model_ckpt_dir": trained.path("verifier"), "train_file": trained.path("problems.json"),
             "max_new_tokens": 3}
    main_of("ppo_train")(**flags)
    assert not caplog.records
    main_of("ppo_train")(**flags, system_prompt="Go.")
    assert 'verifier was trained with chat template file {"tone": "kind"} and the system prompt "You' in caplog.text
    assert 'in the form of file {"tone": "kind"} and the system prompt "Go." here' in caplog.text


def test_a_template_file_of_another_text_is_another_form(
    trained: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    main_of("checkpoint_split")(ckpt_file=trained.path("verifier"), save_path=str(tmp_path / "v"))
    (tmp_path / "v/chat_template.jinja").write_text(TEMPLATE.replace("Be brief", "Be long"))
    load.check_tokenizer(load.load_tokenizer(trained.path("sft")), str(tmp_path / "v"))
    assert "which is another template, here" in caplog.text


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_the_export_has_the_form_of_training(trained: World, tmp_path: Path, name: str) -> None:
    back = tmp_path / "back"
    main_of("checkpoint_split")(ckpt_file=trained.path(name), save_path=str(back), format="hf")
    theirs, ours = AutoTokenizer.from_pretrained(back), load.load_tokenizer(trained.path(name))
    question = [{"role": "user", "content": "Half of 48"}]
    prompt = theirs.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert prompt == trained.prompt("Half of 48")
    own = [{"role": "system", "content": "Other"}, *question]
    text = theirs.apply_chat_template(own, tokenize=False)
    assert "exact" not in text and text.startswith("<|im_start|>system\nOther (kind)<|im_end|>")
    assert GenerationConfig.from_pretrained(back).eos_token_id[0] == ours.eos_id
    # and comes back as what it was
    main_of("checkpoint_split")(ckpt_file=str(back), save_path=str(tmp_path / "again"))
    again = load.load_tokenizer(str(tmp_path / "again"))
    assert again.chat_facts() == ours.chat_facts()
    assert again.encode_rendered(again.chat.prompt(question)) == prompt
    main_of("checkpoint_split")(ckpt_file=trained.path(name), save_path=str(tmp_path / "gguf"), format="gguf")
    main_of("checkpoint_split")(ckpt_file=str(tmp_path / "gguf/model.gguf"), save_path=str(tmp_path / "third"))
    third = load.load_tokenizer(str(tmp_path / "third"), TokenizerFlags(chat_template="file"))
    assert third.encode_rendered(third.chat.prompt(question)) == prompt


@pytest.mark.parametrize("change, message", [
    ({"system_prompt": "Go."}, "system_prompt was You're exact: .* and is Go. now"),
    ({"chat_template": "none", "template_args": "", "system_prompt": ""}, "chat_template was file and is none now"),
])
def test_a_run_is_not_resumed_in_another_form(
    trained: World, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    flags = {"ckpt_dir": trained.path("sft"), "save_dir": str(tmp_path / "out"), "resume": "auto", "save_every": 1}
    pairs = {"train_file": trained.path("pairs.json"), "label_file": trained.path("pairs.json"), "max_batch_size": 4}
    prefer = main_of("preference_train")
    prefer(**flags, **pairs, max_steps=1)
    with pytest.raises(UserError, match=f"{message}.*; resume with the data and flags of then"):
        prefer(**flags, **pairs, **change, max_steps=2)
    prefer(**flags, **pairs, **FORM, max_steps=2)  # said or followed, it is the same


def test_raw_prompts_beside_a_template_are_said_once_in_every_script(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    base = import_again(world, tmp_path)
    assert f"{base} has a chat template: give --chat_template file to the commands" in caplog.text
    problems, pairs = world.path("problems.json"), world.path("pairs.json")
    train = {"ckpt_dir": base, "save_dir": str(tmp_path / "out"), "dry_run": True}
    runs = {
        "solver_train": train | {"train_file": problems},
        "preference_train": train | {"train_file": pairs, "label_file": pairs},
        "verifier_train": train | {"train_file": [pairs], "label_file": pairs},
        "solver_evaluate": {"task": "none", "ckpt_dir": base, "label_file": problems, "log_dir": str(tmp_path / "log"),
                            "dry_run": True},
        "ppo_train": {"actor_ckpt_dir": base, "actor_save_dir": str(tmp_path / "out"), "advantage": "grpo",
                      "reward": ["rule"], "train_file": problems, "max_new_tokens": 3, "dry_run": True},
    }
    for name, flags in runs.items():
        caplog.clear()
        main_of(name)(**flags)
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert said == [f"{base} has a chat template, but its prompts are raw here; give --chat_template file, or none "
                        f"to say that it is meant"], name
        caplog.clear()
        main_of(name)(**flags, chat_template="none")
        assert not [record for record in caplog.records if record.levelno == logging.WARNING], name


def import_again(world: World, tmp_path: Path) -> str:
    main_of("checkpoint_split")(ckpt_file=world.path("hf"), save_path=str(tmp_path / "base"))
    return str(tmp_path / "base")


def test_raw_prompts_that_are_meant_are_recorded_as_such(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    pairs, raw = world.path("pairs.json"), str(tmp_path / "raw")
    data = {"train_file": pairs, "label_file": pairs, "max_batch_size": 4}
    main_of("preference_train")(ckpt_dir=world.path("base"), save_dir=raw, chat_template="none", **data)
    assert load.load_config(raw).chat_template == "none"
    load.load_tokenizer(raw)
    assert not caplog.records


@pytest.mark.parametrize("flags, message", [
    ({"system_prompt": "Go."}, "--system_prompt 'Go.': --chat_template none has no template to take that"),
    ({"system_prompt": "Go.", "chat_template": "gemma"}, "--system_prompt: .*gemma: this format has no system message"),
])
def test_a_system_prompt_without_effect_is_refused(world: World, flags: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load.load_tokenizer(world.path("base"), TokenizerFlags(**flags))


def test_a_template_that_leaves_the_system_message_out_is_refused(tmp_path: Path) -> None:
    template = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    write_merges(tmp_path, chat_template=template)
    with pytest.raises(UserError, match="--system_prompt 'Go.': chat template file does not write a system message"):
        Tokenizer(tmp_path, "file", system_prompt="Go.")


def test_a_conversation_keeps_its_own_system_message(world: World) -> None:
    tokenizer = Tokenizer(world.folder / "hf", "file", system_prompt="Go.")
    question = {"role": "user", "content": "1+1?"}
    assert "system\nGo.<" in tokenizer.chat.prompt([question])
    own = tokenizer.chat.prompt([{"role": "system", "content": "Stay."}, question])
    assert "system\nStay.<" in own and "Go." not in own


def test_a_damaged_template_is_told_to_those_who_ask_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "hf").mkdir()
    base = import_model(tmp_path, chat_template=None)
    (Path(base) / "chat_template.json").write_text("{")
    assert load.load_tokenizer(base).chat is None and not caplog.records
    with pytest.raises(UserError, match="chat_template.json"):
        load.load_tokenizer(base, TokenizerFlags(chat_template="file"))

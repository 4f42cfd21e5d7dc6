"""src/text/extend.py, say_ends() and checkpoint_split.py: what import and training knew of ends, exports say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config

import checkpoint_split
import solver_train
from src import load, parallel
from src.checkpoint import saving
from src.checkpoint.gguf import open_gguf
from src.checkpoint.sources import open_source
from src.command.config import TokenizerFlags
from src.errors import UserError
from src.models.lora import LoraConfig
from src.text.extend import say_ends
from src.text.tokenizer import Tokenizer
from tests import reference, tiny
from tests.text.files import write_json, write_merges, write_sentencepiece

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 128,
}
MESSAGES = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def base(folder: Path, generation: dict[str, object] | None = None, **config: object) -> Path:
    """A random Qwen 2 with a tokenizer, whose end is said in config.json, or in generation_config.json too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, **config))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        write_json(folder / "generation_config.json", generation)
    write_merges(folder)
    return folder


def trained(folder: str, save_dir: Path, chat_template: str, lora: LoraConfig | None = None) -> str:
    """What training leaves of a checkpoint with a chat template, its weights untouched."""
    parallel.start()
    model = load.load_solver(folder)
    load.put_lora_on(model, lora, 0)
    tokenizer = load.load_tokenizer(folder, TokenizerFlags(chat_template=chat_template))
    saving.record(model, **tokenizer.chat_facts())
    saving.begin_save(model, str(save_dir), folder, lora=lora).complete()
    return str(save_dir)


def exported(source: str, folder: Path, format: str = "hf", tokenizer_file: str = "") -> Path:
    checkpoint_split.main(
        checkpoint_split.SplitConfig(
            ckpt_file=source, save_path=str(folder), format=format, tokenizer_file=tokenizer_file
        )
    )
    return folder


def ids(folder: Path) -> list[object]:
    """bos, eos and pad as transformers generates with them, and as config.json says them."""
    config = json.loads((folder / "config.json").read_text())
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == config.get("eos_token_id")
    return [generation.bos_token_id, generation.eos_token_id, generation.pad_token_id]


@pytest.mark.parametrize("eos", [7, [7, 9]])
def test_ends_in_config_json_alone_stop_samples_here_and_in_the_export(tmp_path: Path, eos: object) -> None:
    source = base(tmp_path / "hf", eos_token_id=eos, bos_token_id=5, pad_token_id=3)
    ours = tiny.split(source, tmp_path / "ours")
    tokenizer = load.load_tokenizer(ours)
    assert tokenizer.stop_ids == {7, tokenizer.eos_id} | ({9} if isinstance(eos, list) else set())
    assert ids(exported(ours, tmp_path / "back")) == [5, eos, 3]
    again = exported(tiny.split(tmp_path / "back", tmp_path / "two", 2), tmp_path / "third")
    assert ids(again) == [5, eos, 3]


@pytest.mark.parametrize("generation", [{}, {"do_sample": True}, {"eos_token_id": None}])
def test_a_generation_config_without_ends_leaves_them_to_the_config(
    tmp_path: Path, generation: dict[str, object]
) -> None:
    ours = tiny.split(base(tmp_path / "hf", generation, eos_token_id=[7, 9]), tmp_path / "ours")
    tokenizer = load.load_tokenizer(ours)
    assert tokenizer.stop_ids == {7, 9, tokenizer.eos_id}
    back = exported(ours, tmp_path / "back")
    assert ids(back)[1] == [7, 9]
    assert json.loads((back / "generation_config.json").read_text()) == generation | {"eos_token_id": [7, 9]}
    solver = trained(ours, tmp_path / "solver", "qwen")
    end = load.load_tokenizer(solver).eos_id
    assert ids(exported(solver, tmp_path / "tuned"))[1] == [end, 7, 9]


def test_ends_of_a_checkpoint_stay_when_its_tokenizer_comes_from_elsewhere(tmp_path: Path) -> None:
    source = base(tmp_path / "hf", {"eos_token_id": [7, 9], "top_k": 3}, eos_token_id=7)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (source / name).rename(tmp_path / "elsewhere" / name)
    for place in ("elsewhere", "elsewhere/vocab.json"):
        for format in ("shards", "hf"):
            back = tmp_path / f"{Path(place).name}-{format}"
            exported(str(source), back, format, tokenizer_file=str(tmp_path / place))
            assert json.loads((back / "generation_config.json").read_text()) == {"eos_token_id": [7, 9], "top_k": 3}
            assert {7, 9} <= Tokenizer(back).stop_ids
    write_json(tmp_path / "elsewhere/generation_config.json", {"eos_token_id": 5})  # it is of this tokenizer
    back = exported(str(source), tmp_path / "other", "shards", tokenizer_file=str(tmp_path / "elsewhere"))
    assert json.loads((back / "generation_config.json").read_text()) == {"eos_token_id": 5}


def test_what_stands_beside_a_tokenizer_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = base(tmp_path / "hf", {"eos_token_id": 7})
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (source / name).unlink()
    exported(str(source), tmp_path / "ours", "shards")
    assert "no tokenizer lies beside" in caplog.text
    checkpoint_split.main(checkpoint_split.SplitConfig(inspect=str(source)))
    assert "none: give --tokenizer_file" in capsys.readouterr().out
    with pytest.raises(UserError, match="--code_tokens needs a tokenizer, but none lies beside"):
        checkpoint_split.main(
            checkpoint_split.SplitConfig(ckpt_file=str(source), save_path=str(tmp_path / "code"), code_tokens=True)
        )


@pytest.mark.parametrize("eos", [-1, 511, [7, 511]])
def test_ids_that_no_text_can_hold_end_nothing(tmp_path: Path, eos: object) -> None:
    ours = tiny.split(base(tmp_path / "hf", eos_token_id=eos), tmp_path / "ours")
    tokenizer = load.load_tokenizer(ours)
    assert tokenizer.vocab_size < 511
    assert tokenizer.stop_ids == {tokenizer.eos_id} | ({7} if isinstance(eos, list) else set())


def test_a_tokenizer_that_does_not_open_is_exported_as_it_came(tmp_path: Path) -> None:
    source = base(tmp_path / "hf", eos_token_id=7)
    write_json(source / "tokenizer_config.json", {"eos_token": "<nowhere>"})
    back = exported(tiny.split(source, tmp_path / "ours"), tmp_path / "back")
    assert ids(back)[1] == 7 and (back / "vocab.json").is_file()


def test_an_import_that_says_all_is_exported_as_it_was(tmp_path: Path) -> None:
    generation = {"eos_token_id": [4, 8], "pad_token_id": 2, "do_sample": True, "temperature": 0.7}
    source = base(tmp_path / "hf", generation, eos_token_id=8)
    back = exported(tiny.split(source, tmp_path / "ours"), tmp_path / "back")
    assert json.loads((back / "generation_config.json").read_text()) == generation
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 8
    assert not (back / "chat_template.jinja").exists()


@pytest.mark.parametrize("template", ["qwen", "gemma"])
@pytest.mark.parametrize("generation", [None, {"eos_token_id": 7, "top_k": 3}])
def test_the_end_and_the_template_of_training_stand_in_the_export(
    tmp_path: Path, template: str, generation: dict[str, object] | None
) -> None:
    ours = tiny.split(base(tmp_path / "hf", generation, eos_token_id=7, pad_token_id=3), tmp_path / "ours")
    solver = trained(ours, tmp_path / "solver", template)
    tokenizer = load.load_tokenizer(solver)
    back = exported(solver, tmp_path / "back")
    expected = [tokenizer.eos_id, *sorted(tokenizer.stop_ids - {tokenizer.eos_id, 7}), 7]
    found = GenerationConfig.from_pretrained(back)
    assert found.eos_token_id[0] == tokenizer.eos_id and sorted(found.eos_token_id) == sorted(expected)
    assert found.top_k == (3 if generation else GenerationConfig().top_k)
    theirs = AutoTokenizer.from_pretrained(back)
    turn = tokenizer.chat.turns(MESSAGES)[0]
    text = theirs.apply_chat_template(MESSAGES, tokenize=False)
    prompt = theirs.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == turn.prompt and text.startswith(turn.prompt + turn.answer)
    assert open_source(str(back)).config.chat_template == template


@pytest.mark.parametrize("template", ["qwen", "gemma"])
def test_a_gguf_file_has_the_end_and_the_template_of_training(tmp_path: Path, template: str) -> None:
    ours = tiny.split(base(tmp_path / "hf", eos_token_id=7, pad_token_id=3), tmp_path / "ours")
    solver = trained(ours, tmp_path / "solver", template)
    tokenizer = load.load_tokenizer(solver)
    file = exported(solver, tmp_path / "gguf", "gguf") / "model.gguf"
    metadata = open_gguf(file).metadata
    ends = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    assert tokenizer.stop_ids | {7} == ends - {None}
    assert metadata["tokenizer.chat_template"] == tokenizer.chat.source
    back = load.load_tokenizer(tiny.split(file, tmp_path / "back"), TokenizerFlags(chat_template="file"))
    assert back.stop_ids == ends - {None} and back.eos_id == tokenizer.eos_id
    assert back.chat.turns(MESSAGES) == tokenizer.chat.turns(MESSAGES)


def test_generate_stops_at_the_end_of_training(tmp_path: Path) -> None:
    ours = tiny.split(base(tmp_path / "hf", eos_token_id=7), tmp_path / "ours")
    solver = trained(ours, tmp_path / "solver", "qwen")
    end = load.load_tokenizer(solver).eos_id
    back = exported(solver, tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    model.lm_head.weight.data[end] *= 0
    model.lm_head.weight.data[end] += (
        1e3 * model.model.norm.weight.data
    )  # now it is always the likeliest or the last
    prompt = torch.tensor([[1, 17, 5]])
    with torch.no_grad():
        likeliest = model(prompt).logits[0, -1].argmax().item()
    if likeliest != end:
        model.lm_head.weight.data[end] *= -1
    assert model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 3:].tolist() == [end]


@pytest.mark.parametrize("template", ["none", "file"])
def test_other_ways_to_train_add_their_end(tmp_path: Path, template: str) -> None:
    source = base(tmp_path / "hf", eos_token_id=7)
    jinja = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<end_of_turn>{% endif %}{% endfor %}"
    (source / "chat_template.jinja").write_text(jinja)
    solver = trained(tiny.split(source, tmp_path / "ours"), tmp_path / "solver", template)
    back = exported(solver, tmp_path / "back")
    assert GenerationConfig.from_pretrained(back).eos_token_id[0] == load.load_tokenizer(solver).eos_id
    assert (back / "chat_template.jinja").read_text() == jinja


def test_an_adapter_exported_for_peft_has_them_beside_it(tmp_path: Path) -> None:
    ours = tiny.split(base(tmp_path / "hf", eos_token_id=7), tmp_path / "ours")
    lora = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("wq",))
    adapter = trained(ours, tmp_path / "adapter", "qwen", lora)
    end = load.load_tokenizer(adapter).eos_id
    for format in ("peft", "hf"):
        back = exported(adapter, tmp_path / f"back-{format}", format)
        assert GenerationConfig.from_pretrained(back).eos_token_id[0] == end
        assert "<|im_start|>" in AutoTokenizer.from_pretrained(back).chat_template


def test_files_of_meta_get_the_ends_of_their_tokenizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    theirs.save_pretrained(tmp_path / "hf")
    source = open_source(str(tmp_path / "hf"))
    torch.save(
        {name: stored.load() for name, stored in source.tensors.items()}, tmp_path / "consolidated.00.pth"
    )
    write_json(tmp_path / "params.json", {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2})
    write_sentencepiece(tmp_path, user_defined_symbols=[])  # as the files of Llama 2
    tokenizer = Tokenizer(tmp_path)
    for ours in (tmp_path, Path(tiny.split(tmp_path, tmp_path / "ours"))):
        back = exported(str(ours), tmp_path / f"back-{ours.name}")
        assert ids(back)[1] == tokenizer.eos_id
        assert json.loads((back / "config.json").read_text())["bos_token_id"] == tokenizer.bos_id
        theirs = AutoTokenizer.from_pretrained(back)  # it would leave out BOS and the first word's space
        for text in ("2 + 3 = 5", "two\n\nthree", "é"):
            assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)]
        for text in ("<s>[INST] 2 + 3 [/INST]", "<s>two</s><s>three"):
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode_rendered(text)


def test_a_verifier_does_not_take_the_end_for_padding(tmp_path: Path) -> None:
    ours = tiny.split(base(tmp_path / "hf", eos_token_id=7, pad_token_id=7), tmp_path / "ours")
    back = exported(tiny.make_verifier(ours, tmp_path / "verifier"), tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["pad_token_id"] is None


def test_ends_without_a_vocabulary_or_without_ids(tmp_path: Path) -> None:
    assert say_ends(tmp_path, "", {}) == {} and not list(tmp_path.iterdir())
    assert say_ends(tmp_path, "", {"eos_token_id": 3}) == {"eos_token_id": 3}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 3}


def test_reported_folders_keep_their_ends(tmp_path: Path) -> None:
    folder = reference.shared("reports/EX1_eos_in_config/model")
    assert ids(exported(tiny.split(folder, tmp_path / "a"), tmp_path / "b")) == [291, 290, 290]
    report = reference.shared("reports/EX2_chat_eos")
    ours = tiny.split(report / "base", tmp_path / "c")
    solver_train.main(
        solver_train.SolverTrainConfig(
            ckpt_dir=ours,
            save_dir=str(tmp_path / "d"),
            train_file=str(report / "chat.jsonl"),
            chat_template="qwen",
            epochs=1,
        )
    )
    back = exported(str(tmp_path / "d"), tmp_path / "e")
    assert ids(back) == [None, [292, 290], 290]
    assert "<|im_start|>" in (back / "chat_template.jinja").read_text()


def test_transformers_puts_no_space_after_the_user_defined_pieces_of_an_export(tmp_path: Path) -> None:
    base = Path(__file__).parents[2] / "dataset/toy/base"  # "\n\n" is one
    back, tokenizer = exported(tiny.split(base, tmp_path / "ours"), tmp_path / "back"), Tokenizer(base)
    theirs = AutoTokenizer.from_pretrained(back)
    for text in ("New: 6x5=30.\n\nWith them: 98.", "two\n\nthree"):
        assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)]

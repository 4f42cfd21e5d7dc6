"""Process verifiers in the forms of other projects score steps as their own code on transformers does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
)

from src import load, parallel
from src.data.batch import make_batch
from src.data.encoding import Encoded, encode_prompt
from src.data.examples import Prompt, Sample, StepLabels
from src.errors import UserError
from src.evaluation.scoring import score_samples, score_steps
from src.runlog import RunLog
from src.training import rewards
from src.training.ppo_config import RewardFlags
from src.training.rollout import Rollout
from tests.conftest import Folders
from tests.text.files import byte_level, write_json, write_sentencepiece
from tests.tiny import main_of

PROBLEM, STEPS = "What is 12 + 7?", ["Step 1: 12 + 7 is 19.", "Step 2: so 5 + 5.", "#### 19"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 432, "max_position_embeddings": 256, "initializer_range": 0.2}
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nReason.<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ '<s>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def chat_tokenizer(folder: Path, control: list[str], template: str, end: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(control), eos_token=end, chat_template=template,
                                        additional_special_tokens=control)
    tokenizer.save_pretrained(folder)
    return tokenizer


@torch.no_grad()
def qwen_prm(folder: Path) -> list[float]:
    """Qwen2.5-Math-PRM: a head of two layers over <extra_0> after each step. -> the probability of each being right."""
    tokenizer = chat_tokenizer(folder, ["<|im_start|>", "<|im_end|>", "<extra_0>"], CHATML, "<|im_end|>")
    config = Qwen2Config(**SIZES, architectures=["Qwen2ForProcessRewardModel"])
    model = Qwen2Model(config).eval()
    score = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    config.save_pretrained(folder)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(tensors | {f"score.{name}": tensor for name, tensor in score.state_dict().items()},
              folder / "model.safetensors")
    messages = [{"role": "user", "content": PROBLEM},
                {"role": "assistant", "content": "<extra_0>".join(STEPS) + "<extra_0>"}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt").input_ids
    places = ids[0] == tokenizer.convert_tokens_to_ids("<extra_0>")
    return score(model(ids).last_hidden_state)[0, places].softmax(-1)[:, 1].tolist()


@torch.no_grad()
def math_shepherd(folder: Path) -> list[float]:
    """Math-Shepherd: the probability of + against - after the step token."""
    write_sentencepiece(folder, user_defined_symbols=["▁ки", "▁+", "▁-"])
    tokenizer = SentencePieceProcessor(str(folder / "tokenizer.model"))
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).eval()
    model.save_pretrained(folder)
    ids = torch.tensor([[1, *tokenizer.encode(f"{PROBLEM} " + "\n".join(f"{step} ки" for step in STEPS))]])
    candidates = tokenizer.encode("+ -")
    (tag,) = tokenizer.encode("ки")
    return model(ids).logits[:, :, candidates].softmax(-1)[:, :, 0][ids == tag].tolist()


@torch.no_grad()
def rlhflow(folder: Path) -> list[float]:
    """RLHFlow: the probability of + as the answer to each step, at the third last token of a conversation."""
    control = ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = chat_tokenizer(folder, control, LLAMA, "<|eot_id|>")
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    model.save_pretrained(folder)
    candidates = [tokenizer.encode(sign)[-1] for sign in "+-"]
    scores, conversation = [], []
    for number, step in enumerate(STEPS):
        conversation += [{"role": "user", "content": f"{PROBLEM} {step}" if number == 0 else step},
                         {"role": "assistant", "content": "+"}]
        ids = tokenizer(tokenizer.apply_chat_template(conversation, tokenize=False), return_tensors="pt").input_ids
        scores.append(model(ids).logits[0, -3, candidates].softmax(-1)[0].item())
    return scores


@pytest.mark.parametrize("make", [qwen_prm, math_shepherd, rlhflow])
def test_steps_score_as_in_their_own_code(make: Callable[[Path], list[float]], tmp_path: Path) -> None:
    parallel.start()
    torch.manual_seed(0)
    theirs, ours = tmp_path / "theirs", str(tmp_path / "ours")
    theirs.mkdir()
    expected = make(theirs)
    assert max(expected) - min(expected) > 0.01
    form = make.__name__.replace("_", "-")
    flag = {} if form == "qwen-prm" else {"verifier_form": form}
    main_of("checkpoint_split")(ckpt_file=str(theirs), save_path=ours, n=2, **flag)

    verifier, tokenizer = load.load_verifier(ours), load.load_tokenizer(ours)
    assert verifier.config.verifier_form == form and verifier.config.objective == "process"
    rows = [StepLabels(PROBLEM, STEPS, [1.0] * 3), StepLabels(PROBLEM, STEPS[:1], [1.0])]
    found = score_steps(verifier, tokenizer, rows, max_batch_size=2)
    assert found[0] == pytest.approx(expected, abs=2e-6) and found[1] == pytest.approx(expected[:1], abs=2e-6)

    joined = ("\n" if form == "math-shepherd" else "\n\n").join(STEPS)
    (scored,) = score_samples(verifier, tokenizer, [Sample("0", 0, PROBLEM, joined, None, {})], aggregation="min",
                              max_batch_size=2, path=tmp_path / "scores.jsonl", log=RunLog(str(tmp_path / "log"), {}))
    assert scored.step_scores == pytest.approx(expected, abs=2e-6) and scored.score == min(scored.step_scores)

    with pytest.raises(UserError, match=f"of the form {form}, which scores here and is not trained"):
        load.load_verifier(ours, from_solver=True)
    main_of("checkpoint_split")(ckpt_file=ours, save_path=str(tmp_path / "again"), n=1)  # cut anew, it is the same
    again = load.load_verifier(str(tmp_path / "again"))
    assert score_steps(again, tokenizer, rows, max_batch_size=2) == found
    with pytest.raises(UserError, match="has no form in a config.json"):
        main_of("checkpoint_split")(ckpt_file=ours, save_path=str(tmp_path / "hf"), format="hf")


def test_ppo_rewards_a_policy_of_another_tokenizer(tmp_path: Path, folders: Folders) -> None:
    torch.manual_seed(0)
    (tmp_path / "theirs").mkdir()
    expected = qwen_prm(tmp_path / "theirs")
    prm = str(tmp_path / "prm")
    main_of("checkpoint_split")(ckpt_file=str(tmp_path / "theirs"), save_path=prm)
    policy, text = load.load_tokenizer(folders.one), "\n\n".join(STEPS)
    ids = encode_prompt(policy, PROBLEM)
    batch = make_batch([Encoded(ids + policy.encode(text), len(ids))])
    rollout = Rollout([Prompt("0", PROBLEM, None, None, None)], [text], batch, torch.tensor([True]),
                      torch.zeros(batch.tokens.shape), [[]])
    found, _ = rewards.verifier_reward(load.load_verifier(prm), policy, RewardFlags(step_reward="raw"), 2,
                                       load.load_tokenizer(prm), rollout)
    assert found.sum().item() == pytest.approx(sum(expected), abs=1e-5)
    write_json(tmp_path / "prompts.json", [{"instruction": "1+1=", "label": "2"}])
    main_of("ppo_train")(
        actor_ckpt_dir=folders.one, actor_save_dir=str(tmp_path / "actor"), reward_model_ckpt_dir=prm,
        reward=["verifier"], advantage="reinforce++", train_file=str(tmp_path / "prompts.json"), max_new_tokens=4,
        max_buffer_size=2, max_batch_size=2, lr=1e-4)
    assert (tmp_path / "actor" / "manifest.json").is_file()

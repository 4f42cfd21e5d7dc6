"""docs/ecosystem.md: its lines are run; what an absent program would open is checked another way."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open

import checkpoint_split
import solver_evaluate
import solver_train
from src import load
from src.data.examples import Sample
from src.evaluation.scoring import score_one
from tests.conftest import TOY_BASE
from tests.ranks import ROOT
from tests.test_readme import blocks
from tests.tiny import make_verifier, split

PAGE = ROOT / "docs" / "ecosystem.md"
LIMIT = 96  # tokens of an answer, as the page's task says

# Programs of the page's command lines: how each is checked. None of the last four is to be had from PyPI for a CPU.
CHECKED = {
    "lm_eval": "run here", "tensorboard": "tests/test_runlog.py reads its events by its own reader",
    "trackio": "tests/test_runlog.py reads its runs by its command line",
    "llama-server": "the same server runs here out of the package xllamacpp",
    "echo": "", "ollama": "opens the same file by llama.cpp", "vllm": "the adapter is what its checks ask for, here",
}


class Work(NamedTuple):
    """The page's directories in one place, and what solver_evaluate.py found for problems.jsonl there."""

    folder: Path
    solver: str
    verifier: str
    samples: list[dict[str, str]]
    accuracy: float


def export(source: str, target: Path, form: str, **flags: object) -> None:
    """What checkpoint_split.py --format writes."""
    checkpoint_split.main(checkpoint_split.SplitConfig(
        ckpt_file=source, save_path=str(target), format=form, **flags))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A toy solver that knows half of twelve problems by heart, and a verifier, exported."""
    folder = tmp_path_factory.mktemp("ecosystem")
    rows = json.loads((ROOT / "dataset/toy/demonstrations.json").read_text())[:12]
    (folder / "train.json").write_text(json.dumps(rows[:6]))
    (folder / "problems.jsonl").write_text(
        "".join(json.dumps({key: row[key] for key in ("instruction", "label")}) + "\n" for row in rows))
    solver = str(folder / "solver")
    solver_train.main(solver_train.SolverTrainConfig(
        ckpt_dir=split(TOY_BASE, folder / "base"), save_dir=solver, train_file=str(folder / "train.json"), epochs=60,
        lr=4e-3, max_batch_size=6))
    solver_evaluate.main(solver_evaluate.SolverEvaluateConfig(
        task="toy", ckpt_dir=solver, label_file=str(folder / "problems.jsonl"), log_dir=str(folder / "log"),
        max_new_tokens=LIMIT))
    samples = [json.loads(line) for line in (folder / "log/samples.jsonl").read_text().splitlines()]
    accuracy = json.loads((folder / "log/results.json").read_text())["accuracy"]
    assert 0 < accuracy < 1
    verifier = make_verifier(solver, folder / "verifier")
    export(solver, folder / "export/hf", "hf", dtype="float32")
    export(verifier, folder / "export/verifier", "hf", dtype="float32")
    return Work(folder, solver, verifier, samples, accuracy)


def test_every_command_of_the_page_is_run_or_checked_otherwise() -> None:
    lines = "\n".join(blocks(PAGE, "bash")).replace("\\\n", " ").splitlines()
    assert {line.split()[0] for line in lines if line} == CHECKED.keys()


def test_lm_eval_finds_our_answers_and_our_accuracy(work: Work) -> None:
    pytest.importorskip("lm_eval")
    (task,), (line, *_) = blocks(PAGE, "yaml"), blocks(PAGE, "bash")
    (work.folder / "tasks").mkdir()
    (work.folder / "tasks" / "toy.yaml").write_text(task)
    words = shlex.split(line.replace("\\\n", " "))
    done = subprocess.run([sys.executable, "-m", *words, "--device", "cpu"], cwd=work.folder, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    (results,) = work.folder.glob("log/lm-eval/*/results_*.json")
    assert json.loads(results.read_text())["results"]["toy"]["exact_match,hashes"] == work.accuracy
    (logged,) = work.folder.glob("log/lm-eval/*/samples_toy_*.jsonl")
    theirs = {row["doc"]["instruction"]: row["resps"][0][0].removeprefix(" ")  # it keeps a first word's space
              for row in map(json.loads, logged.read_text().splitlines())}
    assert theirs == {row["prompt"]: row["response"] for row in work.samples}


SERVER = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.verbosity = sys.argv[1], 1024, False, 0
server = xllamacpp.Server(params)
for prompt in json.loads(sys.argv[2]):
    asked = {"prompt": prompt, "n_predict": int(sys.argv[3]), "temperature": 0.0, "cache_prompt": False}
    print("said", json.dumps(server.handle_completions(asked)))
"""


def test_llama_cpp_writes_our_greedy_text(work: Work) -> None:
    pytest.importorskip("xllamacpp")
    export(work.solver, work.folder / "export/gguf", "gguf", dtype="float32")
    file = work.folder / "export/gguf/model.gguf"
    prompts = json.dumps([row["prompt"] for row in work.samples])
    done = subprocess.run([sys.executable, "-c", SERVER, str(file), prompts, str(LIMIT)], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line.removeprefix("said ")) for line in done.stdout.splitlines() if line.startswith("said ")]
    texts = [reply["choices"][0]["text"].removeprefix(" ") for reply in said]  # as lm-eval's
    assert texts == [row["response"] for row in work.samples]


def test_a_verifier_is_a_reward_of_trl(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in blocks(PAGE, "python") if "trl" in block)
    monkeypatch.chdir(work.folder)
    found: dict[str, object] = {}
    exec(code, found)  # noqa: S102 (the page's own code, which trains a step)
    ours, tokenizer = load.load_verifier(work.verifier), load.load_tokenizer(work.verifier)
    rows = [Sample("0", 0, row["prompt"], row["response"], None, {}) for row in work.samples]
    scores = [score_one(ours, tokenizer, row).score for row in rows]
    theirs = found["verifier_score"]([row.prompt for row in rows], [row.response for row in rows])
    assert torch.tensor(theirs).sigmoid().tolist() == pytest.approx(scores, rel=1e-4)  # which ours is shown as


def test_an_adapter_is_what_vllm_asks_for(work: Work) -> None:
    """vLLM refuses ranks above its limit, biases, DoRA and modules_to_save, and names of other layers' tensors."""
    solver_train.main(solver_train.SolverTrainConfig(
        ckpt_dir=str(work.folder / "base"), save_dir=str(work.folder / "lora"), lora_rank=16, max_steps=1,
        train_file=str(work.folder / "train.json")))
    export(str(work.folder / "lora"), work.folder / "export/peft", "peft")
    config = json.loads((work.folder / "export/peft/adapter_config.json").read_text())
    limit = re.search(r"--max-lora-rank (\d+)", PAGE.read_text())[1]
    assert config["r"] <= int(limit) and config["bias"] == "none"
    assert not config.get("use_dora") and not config.get("modules_to_save")
    modules = "|".join(config["target_modules"])
    with safe_open(work.folder / "export/peft/adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert re.fullmatch(
                rf"base_model\.model\.model\.layers\.\d+\.\w+\.({modules})\.lora_[AB]\.weight", name), name
    served = json.loads((work.folder / "export/hf/config.json").read_text())
    assert served["architectures"] == ["LlamaForCausalLM"]

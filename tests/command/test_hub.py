"""src/command/hub.py: hf:ORG/NAME gives what lies at a small server that answers as the Hub does."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import data_build
from src.command import hub
from src.command.flags import parse
from src.data.rows import read_rows
from src.errors import UserError
from tests.ranks import ROOT
from tests.tiny import write_hf_llama

COMMIT = "c" * 40
FETCH = """
import json, sys
from src.command.hub import fetch
from src.errors import UserError
found = {}
for word in sys.argv[1:]:
    try:
        found[word] = fetch(*word.split("=", 1))
    except UserError as error:
        found[word] = f"error: {error}"
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """Repositories under root/{models,datasets}/ORG/NAME at one commit, as far as the two libraries ask for them."""

    root: Path

    def do_GET(self) -> None:
        words = self.path.partition("?")[0].strip("/").split("/")
        is_api = words[0] == "api"
        kind = words.pop(1) if is_api else words.pop(0) if words[0] == "datasets" else "models"
        org, name, *rest = words[is_api:]
        repo = self.root / kind / org / name
        if not repo.is_dir():
            return self.reply(404, b"{}", "RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self.reply(404, b"{}", "RevisionNotFound")
        files = [str(file.relative_to(repo)) for file in sorted(repo.rglob("*")) if file.is_file()]
        if not is_api:
            path = repo / "/".join(rest[2:])
            return self.reply(200, path.read_bytes()) if path.is_file() else self.reply(404, b"", "EntryNotFound")
        if rest[:1] in (["tree"], ["paths-info"]):
            asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            below = json.loads(asked)["paths"] if asked else ["/".join(rest[2:])]
            found = [entry(repo, path) for path in files if any(path.startswith(part) for part in below)]
            return self.reply(200, json.dumps(found).encode())
        about = {"id": f"{org}/{name}", "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
        return self.reply(200, json.dumps(about | {"private": False, "tags": [], "downloads": 0}).encode())

    do_HEAD = do_POST = do_GET

    def reply(self, status: int, content: bytes, problem: str = "") -> None:
        self.send_response(status)
        for key, value in (("X-Repo-Commit", COMMIT), ("ETag", f'"{hashlib.sha1(content).hexdigest()}"'),
                           ("Content-Length", str(len(content))), *[("X-Error-Code", problem)][: bool(problem)]):
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def entry(repo: Path, path: str) -> dict[str, object]:
    content = (repo / path).read_bytes()
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"root": tmp_path / "hub"}))
    Thread(target=server.serve_forever, daemon=True).start()
    yield os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
                        "HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()


def fetched(environment: dict[str, str], *words: str) -> list[str]:
    command = [sys.executable, "-c", FETCH, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return [found[word] for word in words]


def test_rows_and_checkpoints_come_from_the_hub_and_then_from_its_cache(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    repo = tmp_path / "hub" / "datasets" / "org" / "data"
    repo.mkdir(parents=True)
    (repo / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: a.jsonl\n  - split: test\n"
        "    path: b.jsonl\n- config_name: other\n  data_files:\n  - split: train\n    path: b.jsonl\n---\n")
    rows = [{"question": "1+1", "answer": "2"}, {"question": "1+2", "answer": "3"}]
    for name, row in zip("ab", rows, strict=True):
        (repo / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    model = tmp_path / "hub" / "models" / "org" / "model"
    model.mkdir(parents=True)
    write_hf_llama(model)
    (model / "pytorch_model.bin").write_bytes(b"the same once more")

    words = ("train_file=hf:org/data:main:train", "train_file=hf:org/data:main:test", "train_file=hf:org/data:other",
             "ckpt_dir=hf:org/model", "ckpt_file=hf:org/model:config.json", f"base_dir=hf:org/model@{COMMIT}")
    found = fetched(environment, *words)
    assert [row.values for path in found[:3] for row in read_rows(path)] == [rows[0], rows[1], rows[1]], found
    folder = Path(found[3])
    assert found[5] == found[3] and found[4] == str(folder / "config.json")
    assert {file.name for file in folder.iterdir()} == {file.name for file in model.glob("*[nlrs]")} - {
        "pytorch_model.bin"}
    assert all(file.read_bytes() == (model / file.name).read_bytes() for file in folder.iterdir())

    wrong = {"train_file=hf:org/none": "doesn't exist", "train_file=hf:org/data": "main", "train_file=hf:org": "expec",
             "train_file=hf:org/data:main": "train, test", "train_file=hf:org/data:main:x": "x",
             "ckpt_dir=hf:o/n": "404",
             "ckpt_dir=hf:org/model:a:b": "expected hf:ORG", "ckpt_file=hf:org/model:no.gguf": "404",
             "ckpt_dir=hf:org/model@v9": "404", "train_file=hf:org/data@v9:main:train": "v9"}
    for word, said in zip(wrong, fetched(environment, *wrong), strict=True):
        assert said.startswith("error: --") and wrong[word] in said and "\n" not in said, (word, said)

    offline = environment | {"HF_HUB_OFFLINE": "1"}
    assert fetched(offline, words[0], words[3]) == [found[0], found[3]]
    assert "cannot be fetched" in fetched(offline, "ckpt_dir=hf:org/later")[0]
    unreachable = environment | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "empty")}
    for said in fetched(unreachable, words[0], words[3]):
        assert "cannot be fetched" in said and "\n" not in said, said


def test_a_script_reads_what_a_flag_names_at_the_hub(tmp_path: Path, environment: dict[str, str]) -> None:
    repo = tmp_path / "hub" / "datasets" / "openai" / "gsm8k"
    repo.mkdir(parents=True)
    (repo / "train.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}) + "\n")
    command = [sys.executable, "dataset/prepare.py", "gsm8k", "--raw_file", "hf:openai/gsm8k:train", "--save_file"]
    done = subprocess.run([*command, tmp_path / "rows.json"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "rows.json").read_text())[0]["label"] == "2"
    done = subprocess.run([*command, "hf:openai/mine"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "expected a local path" in done.stderr


def test_rows_of_the_hub_without_the_package_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="hf:a/b: rows are read by the package datasets, which is not installed"):
        hub.fetch("train_file", "hf:a/b")


def test_a_list_of_files_may_name_the_hub_too() -> None:
    with pytest.raises(UserError, match=r"--known_files is 'hf:mine'; expected hf:ORG/NAME\[@REVISION\]\[:CONFIG\]"):
        parse(data_build.problems, ["--samples_file=a", "--save_file=b", "--known_files", "c.json", "hf:mine"])

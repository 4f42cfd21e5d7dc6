"""`hf:ORG/NAME[@REVISION][:CONFIG][:SPLIT]`, where a flag expects a path: fetched from the Hugging Face Hub, once.

What is fetched lies in the Hub's own cache (HF_HOME), by commit, from where later commands take it, with
HF_HUB_OFFLINE=1 without a network. HF_ENDPOINT and HF_TOKEN mean what they do elsewhere.
"""

import re
from pathlib import Path

from src.errors import UserError
from src.jsonfile import write_whole

_FORM = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^:]+))?(?::([^:]+))?(?::(.+))?")
_CKPT_FLAGS = ("tokenizer_file", "config_file", "ckpt_file", "inspect", "certify")


def fetch(flag: str, path: str) -> str:
    """The local path of what `hf:...` names: a checkpoint's directory or FILE, or a file of rows. Raises UserError.

    Any other path is returned as it is. The flag's name says whether a checkpoint or data is expected.
    """
    if not path.startswith("hf:"):
        return path
    is_ckpt = flag in _CKPT_FLAGS or flag.endswith("_dir")
    form = _FORM.fullmatch(path)
    if not form or is_ckpt and form[4]:
        raise UserError(f"--{flag} is {path!r}; expected hf:ORG/NAME[@REVISION]"
                        + ("[:FILE]" if is_ckpt else "[:CONFIG][:SPLIT]"))
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, RevisionResolutionError  # half a second

    try:
        return _checkpoint(form[1], form[2], form[3]) if is_ckpt else _rows(form[1], form[2], form[3], form[4])
    except (OSError, ValueError, RuntimeError, HTTPError, EntryNotFoundError, RevisionResolutionError) as problem:
        reason = " ".join(str(problem).split())[:300] or type(problem).__name__
        raise UserError(f"--{flag} {path} cannot be fetched: {reason}") from None


def _checkpoint(repo: str, revision: str | None, file: str | None) -> str:
    """A model's directory in the cache, or one file of it, such as a gguf."""
    from huggingface_hub import hf_hub_download, snapshot_download

    if file:
        return hf_hub_download(repo, file, revision=revision)
    kinds = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
    folder = snapshot_download(repo, revision=revision, allow_patterns=kinds)
    if not list(Path(folder).glob("*.safetensors")):  # many repositories hold the same weights in both forms
        folder = snapshot_download(repo, revision=revision, allow_patterns=[*kinds, "*.bin", "*.pth"])
    return folder


def _rows(repo: str, revision: str | None, config: str | None, split: str | None) -> str:
    """A parquet file of the rows of a split, as `datasets` reads the repository, in its cache."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f"hf:{repo}: rows are read by the package datasets, which is not installed; pip install "
                        "datasets, or download the file and name it") from None
    place = f"hf://datasets/{repo}"  # a directory of this name here is not meant
    try:
        if config and not split and config not in datasets.get_dataset_config_names(place, revision=revision):
            config, split = None, config
        rows = datasets.load_dataset(place, config, split=split, revision=revision)
    except datasets.exceptions.DatasetsError as problem:
        raise ValueError(problem.__cause__ or problem) from None
    if split is None:
        if len(rows) != 1:
            example = ":".join(filter(None, (f"hf:{repo}", config, next(iter(rows)))))
            raise ValueError(f"it has the splits {', '.join(rows)}; name one, as in {example}")
        ((split, rows),) = rows.items()
    file = Path(rows.cache_files[0]["filename"]).with_name(f"{split}.parquet")  # its directory is the commit's
    if not file.exists():
        write_whole(file, rows.to_parquet)
    return str(file)

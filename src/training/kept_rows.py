"""Encoded rows kept in the directory of their run: rank 0 makes the file, all ranks map it, a resumed run finds it."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from src import parallel, runlog
from src.checkpoint.tensor_files import file_hash
from src.data.encoded_rows import EncodedRows, Fill, write
from src.errors import UserError
from src.jsonfile import flush, read_json, telling_full_disk, write_json
from src.processes import watchdog

LOOK_SECONDS = 0.1  # between two looks for the file that rank 0 makes
_CODE = ("data", "text", "training")  # of src/: what makes ids of rows


def rows_identity(run_fingerprint: Mapping[str, object]) -> str:
    """What the rows of a run are known by: its data by contents, its tokenizer, every flag that is compared when it is
    resumed, and the code."""
    root = Path(__file__).parents[1]
    code = [file_hash(file) for name in _CODE for file in sorted((root / name).rglob("*.py"))]
    return hashlib.sha256(json.dumps([dict(run_fingerprint), code]).encode()).hexdigest()


class KeptRows(NamedTuple):
    """Where some rows of a run are kept: `path`, with a `.json` that says of which identity they are, and their hash.
    The latter comes last: what a kill leaves counts for nothing, and is made again."""

    path: Path
    identity: str

    def __call__(self, fill: Fill) -> tuple[EncodedRows, str]:
        """The samples and what fill() said when they were made: by rank 0, while the others wait. All ranks call this;
        nothing is sent, for a collective has a time limit. Raises UserError for a full disk."""
        found = self._find()
        if found is None and parallel.rank() == 0:
            self._write(fill)
            found = self._find()
            if found is None:
                raise UserError(f"{self.path} does not read as it was written a moment ago; use another disk")
        while found is None:
            time.sleep(LOOK_SECONDS)
            watchdog.got_on()  # rank 0 may read for long before it writes; when it is gone is told elsewhere
            found = self._find()
        return found

    @property
    def _facts(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def _partial(self) -> Path:
        return self.path.with_suffix(".partial")

    def _find(self) -> tuple[EncodedRows, str] | None:
        """The samples that lie there; None where there are none, or others, or damaged ones."""
        with contextlib.suppress(UserError):  # no file, or none of ours
            facts = read_json(self._facts)
            if facts.get("identity") == self.identity and facts.get("blake3") == file_hash(self.path):
                return EncodedRows(self.path), str(facts.get("report"))
        return None

    def _write(self, fill: Fill) -> None:
        log, began = runlog.logger(), time.monotonic()
        if self._facts.exists():
            log.info("%s is of other data, flags or code, or damaged: it is made again", self.path)
        self.path.parent.mkdir(exist_ok=True)
        self._facts.unlink(missing_ok=True)
        try:
            with telling_full_disk(self.path, "--dry_run says how much the encoded rows take"):
                with self._partial.open("wb") as file:
                    report = write(file, fill)
                flush(self._partial)
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)
        size = self.path.stat().st_size
        write_json(self._facts, {"identity": self.identity, "blake3": file_hash(self.path), "report": report})
        log.info("%s: encoded rows, %.1f MB in %.0f s", self.path, size / 1e6, time.monotonic() - began)

"""One process at a time: locks on what is written, which the kernel frees when their holder dies, however it dies."""

import atexit
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from src.errors import UserError

LOCK = ".lock"
_HELD: dict[Path, AbstractContextManager[None]] = {}  # what hold() keeps
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Hold a directory, which exists, or a file. Raises UserError that names the process if another one does. What this
    process keeps by hold() it has. Where the file system has no locks this holds nothing."""
    if place.resolve() in _HELD:
        yield
        return
    path = place / LOCK if place.is_dir() else place.with_name(f".{place.name}{LOCK}")
    file = _lock(path, place)
    try:
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()} {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _lock(path: Path, place: Path) -> int:
    """The lock file of a place, open and locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process, _, host = os.read(file, 300).decode(errors="replace").partition(" ")
            os.close(file)
            where = f" on {host}" if host not in ("", socket.gethostname()) else ""
            raise UserError(f"{place} is being written by process {process or '?'}{where}; wait for it, or choose "
                            "another place") from None
        except OSError as problem:
            if problem.errno not in _NO_LOCKS:
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # its last holder removed it between our open and our lock


def hold(folder: Path) -> None:
    """Keep a directory for this process until it ends. Raises UserError if another process holds it."""
    if folder.resolve() not in _HELD:
        lock = alone(folder)
        lock.__enter__()
        _HELD[folder.resolve()] = lock
        atexit.register(lock.__exit__, None, None, None)

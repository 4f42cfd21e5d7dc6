"""src/code_solutions/runner.py against attacks.py: none succeeds, the caller lives, the next run is clean.

The plain runs show that the attacks are real: the same code in an ordinary Python process does what it says.
"""

import contextlib
import ctypes
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from string import Template

import pytest

from src.code_solutions.runner import Execution, Limits, best_isolation, run
from src.errors import UserError
from tests.code_solutions.attacks import ATTACKS, BREACH, PRELUDE, Attack

LIMITS = Limits(
    cpu_seconds=5, wall_seconds=20, memory_bytes=256 * 2**20, disk_bytes=8 * 2**20, files=64, output_bytes=2**14,
    processes=8,
)
SHORT = replace(LIMITS, cpu_seconds=1, wall_seconds=1)  # for attacks that go on until they are stopped
OVERDUE_SECONDS = 25.0  # more than the limits and a start on a busy machine, less than the attacks' minutes
CLEAN = "import json, os; print(1 + 1, json.dumps([1]), os.listdir('.'))"
CALLS = {
    "x86_64": {"clone": 56, "add_key": 248, "bpf": 321, "userfaultfd": 323, "perf_event_open": 298, "sync": 162,
               "fcntl": 72},
    "aarch64": {"clone": 220, "add_key": 217, "bpf": 280, "userfaultfd": 282, "perf_event_open": 241, "sync": 81,
                "fcntl": 25},
}
# the caller of a plain attack; if it does not come to its last line, the attack reached it
CALLER = """
import subprocess, sys
code = subprocess.run([sys.executable, "-c", sys.argv[1]], close_fds=False).returncode
print("BREACH: its process is dead" if code < 0 else "", "CALLER LIVES")
"""

libc = ctypes.CDLL(None, use_errno=True)


class World:
    """What an attack could reach: a secret, a process, servers, a folder, shared memory."""

    def __init__(self, folder: Path) -> None:
        self.token = f"atk{os.getpid()}"  # at most 15 characters, to be the name of a process
        self.folder, self.outside = folder, folder / "outside"
        self.outside.mkdir()
        self.secret = folder / "SECRET"
        self.secret.write_text(f"{BREACH}: the secret")
        self.victim_file = folder / "victim"
        self.descriptor = os.open(self.secret, os.O_RDONLY)
        os.set_inheritable(self.descriptor, True)
        self.victim: subprocess.Popen[bytes] | None = None
        self.shm_key = 0x5EC0000 + os.getpid() * 4
        self.segment = libc.shmget(self.shm_key, 4096, 0o1666)
        libc.shmat.restype = ctypes.c_void_p
        ctypes.memmove(libc.shmat(self.segment, None, 0), f"{BREACH}: shared\0".encode(), 16)
        self.servers = [
            self.serve(socket.socket(), ("127.0.0.1", 0)),
            self.serve(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), ("127.0.0.1", 0)),
            self.serve(socket.socket(socket.AF_UNIX), f"\0{self.token}"),
            self.serve(socket.socket(socket.AF_UNIX), str(folder / "socket")),
        ]
        self.mend()

    def serve(self, server: socket.socket, address: tuple[str, int] | str) -> socket.socket:
        """Answer everyone with BREACH."""
        server.bind(address)

        def datagrams() -> None:
            while True:
                server.sendto(f"{BREACH}: a datagram".encode(), server.recvfrom(100)[1])

        def streams() -> None:
            server.listen()
            while True:
                with server.accept()[0] as client:
                    client.sendall(f"{BREACH}: a connection".encode())

        def until_closed(answer: Callable[[], None]) -> None:
            with contextlib.suppress(OSError):
                answer()

        answer = datagrams if server.type == socket.SOCK_DGRAM else streams
        threading.Thread(target=until_closed, args=(answer,), daemon=True).start()
        return server

    def fill(self, code: str) -> str:
        """The code with its names."""
        names = {
            "secret": self.secret, "outside": self.outside, "victim_file": self.victim_file, "token": self.token,
            "victim": self.victim.pid, "shm_key": self.shm_key, "tcp": self.servers[0].getsockname()[1],
            "udp": self.servers[1].getsockname()[1], "socket": self.folder / "socket",
        }
        return PRELUDE + Template(code).substitute(names | CALLS.get(platform.machine(), CALLS["aarch64"]))

    def damage(self) -> list[str]:
        """What an attack left behind or broke."""
        found = [str(path) for path in self.outside.iterdir()]
        found += [path for path in (f"/tmp/{self.token}", f"/dev/shm/{self.token}") if os.path.exists(path)]
        found += [f"process {pid}" for pid in self.lingering()]
        if not self.victim_file.exists():
            found.append("the victim file is gone")
        if self.victim.poll() is not None:
            found.append("the victim is dead")
        if libc.shmget(self.shm_key + 1, 0, 0) >= 0:
            found.append("a segment of shared memory")
        return found

    def lingering(self) -> list[int]:
        """Processes that took the name of the token."""
        found = []
        for path in Path("/proc").glob("[0-9]*/comm"):
            with contextlib.suppress(OSError):
                if path.read_text().strip() == self.token:
                    found.append(int(path.parent.name))
        return found

    def mend(self) -> None:
        """Undo damage()."""
        for pid in self.lingering():
            os.kill(pid, signal.SIGKILL)
        for path in (*self.outside.iterdir(), Path(f"/tmp/{self.token}"), Path(f"/dev/shm/{self.token}")):
            path.unlink(missing_ok=True)
        self.victim_file.touch()
        if (segment := libc.shmget(self.shm_key + 1, 0, 0)) >= 0:
            libc.shmctl(segment, 0, None)  # IPC_RMID
        if self.victim is None or self.victim.poll() is not None:
            self.victim = subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(600)", self.token],
                start_new_session=True,
            )

    def close(self) -> None:
        for server in self.servers:
            server.close()
        self.mend()
        self.victim.kill()
        self.victim.wait()
        libc.shmctl(self.segment, 0, None)
        os.close(self.descriptor)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    os.environ["SPLITRL_SECRET"] = f"{BREACH}: the environment"
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()
    del os.environ["SPLITRL_SECRET"]


@pytest.fixture(autouse=True)
def mended(world: World) -> Iterator[None]:
    world.mend()
    yield
    world.mend()


@pytest.fixture(scope="module")
def isolation() -> str:
    try:
        return best_isolation()
    except UserError as refusal:
        pytest.skip(str(refusal))


def plain(code: str, folder: Path, endless: bool) -> str:
    """The output of an ordinary Python process, with BREACH if it goes on for ever, dies of a signal or kills its
    caller."""
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER, code],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        close_fds=False,
    )
    try:
        output = process.communicate(
            f"{BREACH}: standard input".encode(), SHORT.wall_seconds if endless else 60
        )[0]
    except subprocess.TimeoutExpired:
        return f"{BREACH}: goes on"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
    return output.decode(errors="replace") + (
        "" if b"CALLER LIVES" in output else f"{BREACH}: the caller is dead"
    )


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_scdpo_06_attack_fails(attack: Attack, world: World, isolation: str) -> None:
    began = time.monotonic()
    execution = run([world.fill(attack.code)], SHORT if attack.endless else LIMITS, isolation)
    assert time.monotonic() - began < OVERDUE_SECONDS
    assert BREACH not in execution.output
    assert not [c for c in execution.output if ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160]
    assert len(execution.output) <= LIMITS.output_bytes
    assert world.damage() == []
    assert execution.status in attack.statuses, execution.output
    assert run([CLEAN], LIMITS, isolation) == Execution("2 [1] []\n", "ok")


@pytest.mark.parametrize(
    "attack", [attack for attack in ATTACKS if not attack.not_shown], ids=lambda attack: attack.name
)
def test_attack_succeeds_without_a_sandbox(attack: Attack, world: World, tmp_path: Path) -> None:
    output = plain(world.fill(attack.code), tmp_path, attack.endless)
    if not world.damage() and BREACH not in output and attack.may_be_denied:
        pytest.skip(f"this machine denies it to this user in any process: {output[-200:]}")
    assert world.damage() or BREACH in output, output


def test_there_are_attacks_enough() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 40

"""Attacks on the sandbox, as data: what a solution's code could try, and how a success shows.

An attack succeeds if its output holds BREACH, if it outlives its limits, or if the World of test_code_attacks
finds damage. Every one is also run without a sandbox, where that is safe, to show that it is an attack. World
fills in the $names, and defines breach().
"""

from dataclasses import dataclass

BREACH = "BREACH"
# code prints it through this function, so that a traceback that quotes the code does not count
PRELUDE = "breach = lambda *what: print('BR' + 'EACH', *what, flush=True)\n"


@dataclass(frozen=True)
class Attack:
    """One attack. statuses: how its run may end."""

    name: str
    code: str
    not_shown: str = ""  # why it is not run without a sandbox
    endless: bool = False  # it never comes to an end by itself
    may_be_denied: bool = False  # some machines deny it to some users without any sandbox
    statuses: tuple[str, ...] = ("ok", "error", "crashed", "timeout", "memory", "disk", "output_limit")


HARMS_MACHINE = "it would harm the machine that runs the tests"
HARMS_CALLER = "it harms an interpreter that shares its process with the caller, which no plain run does"
RAW = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"

RESOURCES = [
    Attack(
        "fork_bomb",
        "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
        HARMS_MACHINE,
        endless=True,
        statuses=("timeout",),
    ),
    Attack(
        "many_processes",
        """
import os, time
for _ in range(40):
    if os.fork() == 0:
        time.sleep(1)
        os._exit(0)
breach("40 processes at once")""",
        statuses=("error",),
    ),
    Attack(
        "many_threads",
        """
import threading, time
for _ in range(40):
    threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
breach("40 threads at once")""",
        statuses=("error",),
    ),
    Attack(
        "allocate_10_gb", "x = bytearray(10 * 2**30)\nbreach('10 GB')", HARMS_MACHINE, statuses=("memory",)
    ),
    Attack("allocate_400_mb", "x = b'x' * (400 * 2**20)\nbreach('400 MB')", statuses=("memory",)),
    Attack(
        "raise_own_limits",
        """
import resource
for name in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
    try: resource.setrlimit(name, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError) as problem: print(problem)
x = b'x' * (400 * 2**20)
breach('400 MB')""",
        statuses=("memory",),
    ),
    Attack(
        "memory_in_children",
        """
import os, time
ends = []
for _ in range(5):
    read, write = os.pipe()
    if os.fork() == 0:
        x = b'x' * (100 * 2**20)
        os.write(write, b'.')
        time.sleep(2)
        os._exit(0)
    os.close(write)
    ends.append(read)
if all(os.read(end, 1) for end in ends):
    time.sleep(0.5)
    breach('500 MB in five processes')""",
        statuses=("memory",),
    ),
    Attack(
        "mmap_bomb",
        """
import mmap
maps = [mmap.mmap(-1, 2**20) for _ in range(400)]
breach('400 maps of 1 MB')""",
    ),
    Attack(
        "memory_in_memfd",
        """
import os
fds = []
for _ in range(40):
    fds.append(os.memfd_create('x'))
    for _ in range(7):
        os.write(fds[-1], b'x' * 2**20)
breach('280 MB in files without a name')""",
    ),
    *(
        Attack(
            name,
            f"""
import ctypes, mmap, os, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
SIZE, PART = 64 * 2**20, 2**20
ends = []
for _ in range(5):
    read, write = os.pipe()
    if os.fork() == 0:
        fd = {fd}
        place = libc.mmap(None, ctypes.c_size_t(SIZE), 3, {flags}, fd, ctypes.c_long(0))
        if place == 2**64 - 1: os._exit(1)
        for start in range(place, place + SIZE, PART):
            ctypes.memset(start, 1, PART)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(PART), 4)
        os.write(write, b'.')
        time.sleep(2)
        os._exit(0)
    os.close(write)
    ends.append(read)
if all(os.read(end, 1) for end in ends):
    time.sleep(0.5)
    breach('320 MB that no process shows')""",
        )
        for name, fd, flags in (
            ("shared_memory_in_children", -1, 0x21),
            ("shared_memory_of_dev_zero", "os.open('/dev/zero', os.O_RDWR)", 0x01),
            ("shared_memory_of_a_file", "os.open(str(_), os.O_RDWR | os.O_CREAT); os.ftruncate(fd, SIZE)", 0x01),
        )
    ),
    Attack(
        "shared_memory_in_python",
        "import mmap\nmaps = [mmap.mmap(-1, 2**16) for _ in range(16)]\nbreach('shared and without a name')",
        statuses=("error",),
    ),
    Attack(
        "memory_in_sockets",
        """
import os, socket, time
ends = []
for _ in range(7):
    read, write = os.pipe()
    if os.fork() == 0:
        pairs = [socket.socketpair() for _ in range(24)]
        for end in [end for pair in pairs for end in pair]:
            end.setblocking(False)
            try:
                while end.send(b'x' * 2**16): pass
            except BlockingIOError: pass
        os.write(write, b'.')
        time.sleep(2)
        os._exit(0)
    os.close(write)
    ends.append(read)
if all(os.read(end, 1) for end in ends):
    x = b'x' * (130 * 2**20)
    time.sleep(0.5)
    breach('200 MB, a third of them in sockets')""",
        statuses=("memory",),
    ),
    Attack(
        "large_socket_buffers",
        """
import socket
def room(end):
    end.setblocking(False)
    try:
        for sent in range(10**6): end.send(b'x' * 1024)
    except BlockingIOError: return sent
(usual, _), (large, _other) = socket.socketpair(), socket.socketpair()
try: large.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**30)
except OSError as problem: print(problem)
if room(large) > room(usual): breach('more memory in a socket')""",
    ),
    Attack(
        "large_pipe",
        "import fcntl, os\nif fcntl.fcntl(os.pipe()[1], 1031, 2**20) >= 2**20: breach('1 MB in a pipe')",
        may_be_denied=True,
    ),
    Attack(
        "pages_in_pipes",
        """
import ctypes, os
class Span(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
page = ctypes.create_string_buffer(4096)
span = Span(ctypes.addressof(page), 4096)
if ctypes.CDLL(None).vmsplice(os.pipe()[1], ctypes.byref(span), ctypes.c_size_t(1), 0) > 0: breach('a page')""",
    ),
    Attack(
        "attributes_of_files",
        "import os\nopen('f', 'w').close()\nos.setxattr('f', 'user.x', b'x' * 1000)\nbreach('attributes')",
        may_be_denied=True,
        statuses=("error",),
    ),
    Attack("locked_memory", "import ctypes\nx = ctypes.create_string_buffer(2**20)\n"
           "if ctypes.CDLL(None).mlock(x, ctypes.c_size_t(2**20)) == 0: breach('memory that is never paged out')",
           may_be_denied=True),
    Attack("huge_file", "open('big', 'wb').write(b'x' * (64 * 2**20))\nbreach('64 MB on disk')"),
    Attack(
        "many_large_files",
        """
for number in range(10):
    open(f'big{number}', 'wb').write(b'x' * (4 * 2**20))
breach('40 MB on disk')""",
    ),
    Attack("sparse_file", "import os\nopen('s', 'wb').truncate(2**36)\nbreach(os.stat('s').st_size)"),
    Attack(
        "inodes",
        """
import os, time
for number in range(2000):
    open(f'f{number}', 'w').close()
time.sleep(0.3)
breach('2000 files')""",
    ),
    Attack(
        "directories",
        """
import os, time
for number in range(2000):
    os.mkdir(f'd{number}')
time.sleep(0.3)
breach('2000 directories')""",
    ),
    Attack("open_files", "files = [open('/dev/null') for _ in range(200)]\nbreach('200 open files')"),
    Attack("infinite_loop", "while True: pass", endless=True, statuses=("timeout",)),
    Attack(
        "infinite_loop_in_c",
        "import itertools\nall(itertools.repeat(1))",
        endless=True,
        statuses=("timeout",),
    ),
    Attack("huge_power_in_c", "7 ** 10 ** 9", endless=True, statuses=("timeout", "memory")),
    Attack("sleep", "import time\ntime.sleep(10**6)", endless=True, statuses=("timeout",)),
    Attack(
        "ignored_signals",
        """
import signal
for number in signal.valid_signals() - {9, 19}:
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
while True: pass""",
        endless=True,
        statuses=("timeout",),
    ),
    Attack(
        "swallowed_exceptions",
        """
while True:
    try:
        while True: pass
    except BaseException: pass""",
        endless=True,
        statuses=("timeout",),
    ),
    Attack(
        "output_10_gb",
        "for _ in range(10 * 2**10): print('x' * 2**20)\nbreach('10 GB')",
        "it would fill the machine's memory",
        statuses=("output_limit",),
    ),
    Attack("output_1_mb", "print('x' * 2**20)\nbreach('1 MB')", statuses=("output_limit",)),
    Attack(
        "deep_recursion",
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
        HARMS_MACHINE,
        endless=True,
        statuses=("memory", "crashed", "error", "timeout"),
    ),
    Attack(
        "deep_recursion_in_c",
        """
import sys
sys.setrecursionlimit(10**9)
x = []
for _ in range(10**6): x = [x]
repr(x)""",
        may_be_denied=True,
        statuses=("memory", "crashed", "error"),
    ),
    Attack("segmentation_fault", "import ctypes\nctypes.string_at(0)", statuses=("crashed",)),
    Attack(
        "core_dump",
        """
import os, resource
try: resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
except (OSError, ValueError) as problem: print(problem)
child = os.fork()
if child == 0: os.abort()
if os.WCOREDUMP(os.waitpid(child, 0)[1]): breach('a core dump')""",
        may_be_denied=True,
    ),
    Attack("format_bomb", "x = '%0400000000d' % 1\nbreach('400 MB')", statuses=("memory",)),
    Attack(
        "regex_bomb", "import re\nre.match('(a+)+$$', 'a' * 50 + 'b')", endless=True, statuses=("timeout",)
    ),
]

FILES = [
    Attack("read_secret_file", "print(open('$secret').read())", statuses=("error",)),
    Attack("read_through_dots", "print(open('../' * 20 + '$secret').read())", statuses=("error",)),
    Attack(
        "read_through_proc_root",
        """
for pid in ('self', '1', 'thread-self'):
    try: print(open(f'/proc/{pid}/root$secret').read())
    except OSError as problem: print(problem)""",
    ),
    Attack(
        "read_through_proc_cwd",
        """
for pid in ('self', '1'):
    try: print(open(f'/proc/{pid}/cwd/' + '../' * 20 + '$secret').read())
    except OSError as problem: print(problem)""",
    ),
    Attack(
        "hard_link_in",
        "import os\nos.link('$secret', 'copy')\nprint(open('copy').read())",
        statuses=("error",),
    ),
    Attack(
        "symlink_in",
        "import os\nos.symlink('$secret', 'link')\nprint(open('link').read())",
        statuses=("error",),
    ),
    Attack("read_environment", "import os\nprint(os.environ)"),
    Attack(
        "read_environments",
        """
import os
for pid in filter(str.isdigit, os.listdir('/proc')):
    try: print(open(f'/proc/{pid}/environ', errors='replace').read())
    except OSError: pass""",
    ),
    Attack(
        "read_descriptors",
        """
import os
for fd in range(64):
    try: print(os.pread(fd, 100, 0))
    except OSError: pass""",
    ),
    Attack(
        "read_descriptors_of_others",
        """
import os
for pid in filter(str.isdigit, os.listdir('/proc')):
    if pid == str(os.getpid()): continue
    try:
        for fd in os.listdir(f'/proc/{pid}/fd'):
            if 'SECRET' in os.readlink(f'/proc/{pid}/fd/{fd}'): breach('a file of another process')
    except OSError: pass""",
    ),
    Attack("read_standard_input", "import sys\nprint(sys.stdin.read())"),
    Attack("write_outside", "open('$outside/mark', 'w').write('x')", statuses=("error",)),
    Attack(
        "symlink_out",
        "import os\nos.symlink('$outside', 'out')\nopen('out/mark', 'w').write('x')",
        statuses=("error",),
    ),
    Attack(
        "rename_out",
        "import os\nopen('x', 'w').close()\nos.rename('x', '$outside/mark')",
        statuses=("error",),
    ),
    Attack("write_tmp", "open('/tmp/$token', 'w').write('x')", statuses=("error",)),
    Attack("write_shared_memory_folder", "open('/dev/shm/$token', 'w').write('x')", statuses=("error",)),
    Attack("delete_outside", "import os\nos.remove('$victim_file')", statuses=("error",)),
    Attack(
        "open_library_to_write",
        "import os\nos.open(os.__file__, os.O_WRONLY)\nbreach('a library')",
        may_be_denied=True,
        statuses=("error",),
    ),
    Attack(
        "open_package_to_write",
        "import os\nfrom importlib import util\nos.open(util.find_spec('numpy').origin, os.O_WRONLY)\nbreach()",
        may_be_denied=True,
        statuses=("error",),
    ),
    Attack(
        "open_runner_to_write",
        """
import os
for folder, _, names in os.walk('/'):
    for name in names:
        if name.startswith('code_'): os.open(os.path.join(folder, name), os.O_WRONLY); breach()""",
        "a walk of the whole disk",
    ),
]

PROCESSES = [
    Attack("kill_parent", "import os\nos.kill(os.getppid(), 9)"),
    Attack("kill_group", "import os\nos.killpg(0, 9)"),
    Attack("kill_everyone", "import os\nos.kill(-1, 9)", HARMS_MACHINE),
    Attack("kill_victim", "import os\nos.kill($victim, 9)", statuses=("error",)),
    Attack(
        "signal_worker",
        """
import os, signal
for number in signal.valid_signals():
    try: os.kill(1, number)
    except OSError: pass
while True: pass""",
        HARMS_MACHINE,
        endless=True,
        statuses=("timeout",),
    ),
    Attack(
        "limit_worker",
        """
import resource
for name in (resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_AS):
    try:
        resource.prlimit(1, name, (0, 0))
        breach('limits of the worker')
    except OSError: pass""",
        HARMS_MACHINE,
    ),
    Attack(
        "see_victim",
        """
import os
for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
        if '$token' in open(f'/proc/{pid}/cmdline').read(): breach('sees', pid)
    except OSError: pass""",
    ),
    Attack(
        "ptrace_victim",
        RAW + "if libc.ptrace(16, $victim, 0, 0) == 0: breach('attached')",
        may_be_denied=True,
    ),
    Attack("ptrace_worker", RAW + "if libc.ptrace(16, 1, 0, 0) == 0: breach('attached')", HARMS_MACHINE),
    Attack(
        "worker_memory",
        """
import os
for pid in {'1', str(os.getppid())}:
    with open(f'/proc/{pid}/mem', 'r+b') as memory: breach('memory of', pid)""",
        HARMS_MACHINE,
        statuses=("error",),
    ),
    Attack(
        "worker_memory_by_call",
        RAW
        + """
class Span(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
here = ctypes.create_string_buffer(b'x' * 8)
span = Span(ctypes.addressof(here), 8)
for pid in (1, os.getppid()):
    if libc.process_vm_readv(pid, ctypes.byref(span), 1, ctypes.byref(span), 1, 0) >= 0: breach()""",
        may_be_denied=True,
    ),
    Attack(
        "daemon",
        RAW
        + """
import time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        libc.prctl(15, b'$token', 0, 0, 0)
        for fd in range(3): os.close(fd)
        time.sleep(60)
    os._exit(0)
time.sleep(0.2)""",
    ),
    Attack(
        "daemon_that_writes",
        """
import os, time
if os.fork() == 0:
    os.setsid()
    for _ in range(600):
        print('x' * 100, flush=True)
        time.sleep(0.1)
    os._exit(0)""",
        endless=True,
    ),
    Attack(
        "thread_outlives_block",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        endless=True,
        statuses=("ok",),
    ),
    Attack(
        "atexit_lingers",
        "import atexit, time\natexit.register(time.sleep, 60)",
        endless=True,
        statuses=("ok",),
    ),
    Attack(
        "flush_lingers",
        """
import sys
class Stream:
    def write(self, text): pass
    def flush(self):
        while True: pass
sys.stdout = Stream()""",
        endless=True,
        statuses=("timeout",),
    ),
    Attack(
        "destructor_lingers",
        """
import sys
class Late:
    def __del__(self):
        while True: pass
sys.late = Late()""",
        endless=True,
        statuses=("ok",),
    ),
    Attack("raise_priority", "import os\nos.nice(-5)\nbreach('a higher priority')", may_be_denied=True),
    Attack(
        "real_time",
        "import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))\nbreach()",
        may_be_denied=True,
    ),
    Attack(
        "never_the_victim_of_oom",
        "open('/proc/self/oom_score_adj', 'w').write('-1000')\nbreach()",
        may_be_denied=True,
    ),
]

LOCK = """
import ctypes, fcntl, os, struct
libc, fd = ctypes.CDLL(None), os.open(os.__file__, os.O_RDONLY)
whole = struct.pack('hhqqi4x', 0, 0, 0, 0, 0)
"""

# what is shared with the host although it is read-only: locks on its files, news of them, its disk
HOST = [
    Attack("flock", LOCK + "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\nbreach('locked a library')"),
    Attack("flock_a_folder", LOCK + "fcntl.flock(os.open('/usr', os.O_RDONLY), fcntl.LOCK_EX)\nbreach('locked /usr')"),
    Attack("record_lock", LOCK + "fcntl.fcntl(fd, fcntl.F_SETLK, whole)\nbreach('nobody may lock it to write')"),
    Attack("record_lock_that_waits", LOCK + "fcntl.lockf(fd, fcntl.LOCK_SH)\nbreach('nobody may lock it to write')"),
    *(
        Attack(
            f"record_lock_{command:#x}",
            LOCK + f"if libc.syscall(ctypes.c_long($fcntl), fd, ctypes.c_ulong({command}), whole) == 0: breach()",
        )
        for command in (0x1_0000_0006, 37, 38)  # the kernel reads the lower half
    ),
    Attack("lease", LOCK + "fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)\nbreach('a lease')", may_be_denied=True),
    Attack("dnotify", LOCK + "fcntl.fcntl(os.open('/usr', os.O_RDONLY), fcntl.F_NOTIFY, 31)\nbreach('it tells')"),
    Attack(
        "inotify",
        RAW
        + """
for start in (libc.inotify_init, lambda: libc.inotify_init1(0)):
    fd = start()
    for path in (b'/', b'/usr', os.__file__.encode(), b'.'):
        if libc.inotify_add_watch(fd, path, 0xfff) >= 0: breach('a watch on', path)""",
    ),
    Attack(
        "fanotify",
        RAW
        + """
fd = libc.fanotify_init(0x200, 0)
if libc.fanotify_mark(fd, 1, ctypes.c_uint64(2), -100, b'/usr') == 0: breach('a mark on /usr')""",
        may_be_denied=True,
    ),
    *(
        Attack(f"flush_by_{name}", LOCK + f"if {flush} == 0: breach('the disk works')")
        for name, flush in (
            ("sync", "libc.syscall(ctypes.c_long($sync))"),
            ("syncfs", "libc.syncfs(fd)"),
            ("fsync", "libc.fsync(fd)"),
            ("fdatasync", "libc.fdatasync(fd)"),
            ("sync_file_range", "libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), 7)"),
        )
    ),
    Attack(
        "flush_by_msync",
        LOCK
        + """
libc.mmap.restype = ctypes.c_void_p
place = libc.mmap(None, ctypes.c_size_t(4096), 1, 1, fd, ctypes.c_long(0))
if libc.msync(ctypes.c_void_p(place), ctypes.c_size_t(4096), 4) == 0: breach('the disk works')""",
    ),
    Attack("drop_the_cache", LOCK + "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)\nbreach('read it again')"),
    Attack("read_ahead", LOCK + "if libc.readahead(fd, ctypes.c_int64(0), ctypes.c_size_t(4096)) == 0: breach()"),
]

NETWORK = [
    Attack("tcp", "import socket\nprint(socket.create_connection(('127.0.0.1', $tcp), 3).recv(100))"),
    Attack(
        "dns",
        """
import socket
asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asker.settimeout(3)
asker.sendto(b'a name?', ('127.0.0.1', $udp))
print(asker.recv(100))""",
    ),
    Attack(
        "tcp_by_shell",
        """
import subprocess
command = 'exec 3<>/dev/tcp/127.0.0.1/$tcp; head -c 20 <&3'
print(subprocess.run(['bash', '-c', command], capture_output=True, text=True).stdout)""",
    ),
    Attack(
        "raw_socket",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\nbreach('raw')",
        may_be_denied=True,
    ),
    Attack(
        "packet_socket",
        "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)\nbreach('packets')",
        may_be_denied=True,
    ),
    Attack(
        "netlink", "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nbreach('netlink')"
    ),
    Attack(
        "vsock",
        "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)\nbreach('the host')",
        may_be_denied=True,
    ),
    Attack(
        "crypto_socket",
        "import socket\nsocket.socket(38, socket.SOCK_SEQPACKET)\nbreach('kernel crypto')",
        may_be_denied=True,
    ),
    Attack(
        "abstract_socket",
        """
import socket
caller = socket.socket(socket.AF_UNIX)
caller.settimeout(3)
caller.connect('\\0$token')
print(caller.recv(100))""",
    ),
    Attack(
        "file_socket",
        """
import socket
caller = socket.socket(socket.AF_UNIX)
caller.settimeout(3)
caller.connect('$socket')
print(caller.recv(100))""",
    ),
]

KERNEL = [
    Attack("unshare", RAW + "if libc.unshare(0x10020000) == 0: breach('namespaces')"),
    Attack(
        "clone_namespace",
        RAW
        + """
child = libc.syscall(ctypes.c_long($clone), ctypes.c_ulong(0x10000000 | 17), 0, 0, 0, 0)
if child == 0: os._exit(0)
if child > 0: breach('a process in a namespace')""",
    ),
    Attack(
        "clone3",
        RAW
        + """
arguments = (ctypes.c_uint64 * 8)(0x10000000, 0, 0, 0, 17, 0, 0, 0)
child = libc.syscall(ctypes.c_long(435), arguments, ctypes.c_size_t(64))
if child == 0: os._exit(0)
if child > 0: breach('a process in a namespace')""",
    ),
    Attack(
        "setns",
        RAW
        + """
if libc.setns(os.open('/proc/1/ns/mnt', 0), 0) == 0: breach('the mounts of process 1')""",
        may_be_denied=True,
    ),
    Attack(
        "mount", RAW + "if libc.mount(b'x', b'.', b'tmpfs', 0, None) == 0: breach('a mount')", HARMS_MACHINE
    ),
    Attack(
        "remount_writable",
        RAW
        + """
if libc.mount(None, b'/usr', None, 32 | 4096, None) == 0: breach('/usr is writable')""",
        HARMS_MACHINE,
    ),
    Attack("umount", RAW + "if libc.umount2(b'/proc', 2) == 0: breach('no /proc')", HARMS_MACHINE),
    Attack("pivot_root", RAW + "if libc.pivot_root(b'.', b'.') == 0: breach('a new root')", HARMS_MACHINE),
    Attack(
        "chroot",
        """
import os
os.mkdir('jail')
os.chroot('jail')
for _ in range(50): os.chdir('..')
os.chroot('.')
breach(os.listdir('.'))""",
        may_be_denied=True,
    ),
    Attack(
        "keyctl",
        RAW
        + """
if libc.syscall(ctypes.c_long($add_key), b'user', b'x', b'y', ctypes.c_size_t(1), ctypes.c_int(-2)) > 0:
    breach('a key in the kernel')""",
        may_be_denied=True,
    ),
    Attack(
        "io_uring",
        RAW + "if libc.syscall(ctypes.c_long(425), 1, (ctypes.c_char * 200)()) >= 0: breach('a ring')",
        may_be_denied=True,
    ),
    Attack(
        "bpf",
        RAW
        + """
attributes = (ctypes.c_uint32 * 32)(2, 4, 4, 1)
if libc.syscall(ctypes.c_long($bpf), 0, attributes, 128) >= 0: breach('a map in the kernel')""",
        may_be_denied=True,
    ),
    Attack(
        "perf_event",
        RAW
        + """
attributes = (ctypes.c_uint32 * 32)(1, 112)
if libc.syscall(ctypes.c_long($perf_event_open), attributes, 0, -1, -1, 0) >= 0: breach('a counter')""",
        may_be_denied=True,
    ),
    Attack(
        "userfaultfd",
        RAW + "if libc.syscall(ctypes.c_long($userfaultfd), 1) >= 0: breach('faults')",
        may_be_denied=True,
    ),
    Attack(
        "kernel_log",
        RAW + "if libc.klogctl(3, ctypes.create_string_buffer(100), 100) >= 0: breach('the log')",
        may_be_denied=True,
    ),
    Attack(
        "become_root",
        """
import os
os.setresuid(0, 0, 0)
breach('root')""",
        may_be_denied=True,
    ),
    Attack(
        "device_node",
        """
import os, stat
os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(254, 0))
breach('a device')""",
        may_be_denied=True,
    ),
    Attack(
        "devices",
        """
import glob, os
for path in ['/dev/mem', '/dev/kmsg', '/dev/vda', '/dev/sda', '/dev/nvme0n1', '/dev/fuse', '/dev/net/tun', '/dev/kvm']:
    try: os.open(path, os.O_RDONLY); breach(path)
    except OSError: pass""",
        may_be_denied=True,
    ),
    Attack(
        "proc_sys",
        "import os\nos.open('/proc/sys/kernel/hostname', os.O_WRONLY)\nbreach('a setting')",
        may_be_denied=True,
    ),
    Attack(
        "sysrq",
        "import os\nos.open('/proc/sysrq-trigger', os.O_WRONLY)\nbreach('the big switch')",
        may_be_denied=True,
    ),
    Attack(
        "sys",
        """
import os
for folder, _, names in os.walk('/sys/kernel/mm'):
    for name in names:
        try: os.open(os.path.join(folder, name), os.O_WRONLY); breach(name)
        except OSError: pass""",
        may_be_denied=True,
    ),
    Attack(
        "cgroups", "import os\nos.mkdir('/sys/fs/cgroup/memory/$token')\nbreach('a group')", HARMS_MACHINE
    ),
    Attack(
        "set_clock",
        "import time\ntime.clock_settime(time.CLOCK_REALTIME, time.time())\nbreach('the clock')",
        HARMS_MACHINE,
    ),
    Attack("host_name", "import socket\nsocket.sethostname('$token')\nbreach('the name')", HARMS_MACHINE),
    Attack(
        "read_shared_memory",
        RAW
        + """
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget($shm_key, 0, 0)
if segment >= 0: print(ctypes.string_at(libc.shmat(segment, None, 0)))""",
    ),
    Attack("leave_shared_memory", RAW + "libc.shmget($shm_key + 1, 4096, 0o1666)"),
    Attack(
        "leave_semaphores",
        RAW + "if libc.semget($shm_key + 2, 1, 0o1666) >= 0: breach('a semaphore')",
        "it would leave one",
    ),
    Attack(
        "foreign_architecture",
        RAW
        + """
if libc.syscall(ctypes.c_long(0x40000000 | 272), 0x10000000) == 0: breach('x32 calls')""",
        may_be_denied=True,
    ),
]

RESULTS = [
    Attack(
        "fake_report",
        """
import os
for fd in range(64):
    try: os.write(fd, b'{"status": "ok"}\\n42')
    except OSError: pass
while True: pass""",
        HARMS_CALLER,
        endless=True,
        statuses=("timeout",),
    ),
    Attack(
        "patch_the_runner",
        """
import os, sys
frame = sys._getframe()
while frame.f_back:
    frame = frame.f_back
    for name in list(frame.f_globals):
        if name not in ('sys', 'os', '__builtins__'): frame.f_globals[name] = lambda *_, **__: 0
os._exit = lambda code: None
print('42')
while True: pass""",
        HARMS_CALLER,
        endless=True,
        statuses=("timeout",),
    ),
    Attack(
        "patch_builtins",
        """
import builtins, os, sys
print('42')
for name in ('open', 'len', 'exec', 'eval', 'compile', '__import__'): setattr(builtins, name, None)
sys.modules.clear()""",
        HARMS_CALLER,
    ),
    Attack("close_descriptors", "import os\nos.closerange(0, 64)", HARMS_CALLER),
    Attack(
        "pickle_in_output",
        """
import pickle, sys
class Trap:
    def __reduce__(self): return open, ('$outside/mark', 'w')
sys.stdout.buffer.write(pickle.dumps(Trap()))""",
        "it harms a caller who unpickles",
        statuses=("ok",),
    ),
    Attack(
        "control_characters",
        r"import os; os.write(1, b'\x1b]0;title\x07\x00\xff\x9b\r\n')",
        "it harms a terminal",
        statuses=("ok",),
    ),
    Attack("shadow_a_module", "open('json.py', 'w').write('print(42)')", HARMS_CALLER),
    Attack("stop_at_once", "import os\nos._exit(0)", HARMS_CALLER),
    Attack("exit_like_the_worker", "import os\nos._exit(70)", HARMS_CALLER, statuses=("error",)),
    Attack(
        "forged_marks",
        """
import os, time
for _ in range(10**6):
    for fd in range(3, 64):
        try: os.write(fd, b'.' * 1000)
        except OSError: pass
    time.sleep(0.01)""",
        HARMS_CALLER,
        endless=True,
        statuses=("timeout", "output_limit"),
    ),
]

ATTACKS = [*RESOURCES, *FILES, *PROCESSES, *HOST, *NETWORK, *KERNEL, *RESULTS]

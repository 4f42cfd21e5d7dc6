"""What the code of a solution may not do: the walls that worker.py puts up before it runs any.

Standard library and libseccomp (Debian: libseccomp2) only, because it runs in a bare interpreter. The walls,
outside in:

- namespaces of its own for users, mounts, processes, network, IPC and host name: no network device, no other
  process;
- a file tree of read-only system and Python directories, and FOLDER, an empty tmpfs of limited size, to write
  in;
- resource limits: memory of one process, processor time, processes, open files, file size, no core dumps;
- no capability, no way to gain one, and where the caller is root, the rights of nobody;
- a system-call filter: no namespaces, mounts, tracing, keys, sockets other than local ones, memory outside the
  accounts, and of the host's files no locks, news or flushes.

Bubblewrap puts up the first two walls instead of this file where runner.py starts it.
"""

import contextlib
import ctypes
import errno
import os
import resource
import signal

FOLDER = "/solution"
INSIDE_ID = 1000  # user and group of the code, inside its namespace
NOBODY = 65534
MIN_KERNEL = (5, 14)  # RLIMIT_NPROC counts within a user namespace; mount_setattr came with 5.12
OPEN_FILES = 64
# the worker and the process that waits for it may count as the code's own
OWN_PROCESSES = 2

# linux/sched.h, linux/mount.h, linux/prctl.h, linux/capability.h
NEW_NAMESPACES = {
    "mount": 0x00020000, "cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000,
    "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000,
}
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442  # one number on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CAPABILITY_VERSION_3 = 0x20080522

# seccomp.h
SCMP_ACT_ALLOW, SCMP_ACT_ERRNO = 0x7FFF0000, 0x00050000
SCMP_CMP_NE, SCMP_CMP_MASKED_EQ = 1, 7

LOWER_HALF = 0xFFFFFFFF  # of an argument, where the kernel reads an int: a filter that compares all is passed by
MAP_SHARED_ANONYMOUS = 0x21  # sys/mman.h
# fcntl.h: set a lock, and wait for it, of the process or of the file; a lease; a watch; a pipe's size; a delegation
DENIED_FCNTL = (6, 7, 37, 38, 1024, 1026, 1031, 1040)
SO_SNDBUF, SO_SNDBUFFORCE = 7, 32  # asm-generic/socket.h

# files that say whether one who is not root may make user namespaces, and what they say where not: Debian, Ubuntu
SWITCHES = {
    "/proc/sys/kernel/unprivileged_userns_clone": "0",
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1",
}

DENIED_CALLS = (
    # a new view of the system
    "unshare setns mount umount umount2 pivot_root chroot move_mount open_tree open_tree_attr fsopen fsconfig fsmount "
    "fspick mount_setattr name_to_handle_at open_by_handle_at "
    # other processes
    "ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd migrate_pages move_pages "
    # memory that no limit counts, or that outlives its maker
    "memfd_create memfd_secret shmget shmat shmctl shmdt msgget msgsnd msgrcv msgctl semget semop semctl semtimedop "
    "mq_open mq_unlink mq_timedsend mq_timedreceive vmsplice setxattr lsetxattr fsetxattr setxattrat "
    # what the host's files share with the host although they are read-only: locks, news of changes, the disk
    "flock inotify_init inotify_init1 inotify_add_watch fanotify_init fanotify_mark "
    "sync syncfs fsync fdatasync sync_file_range sync_file_range2 msync fadvise64 readahead "
    # keys, clocks, the kernel itself
    "keyctl add_key request_key settimeofday clock_settime clock_adjtime adjtimex personality "
    "bpf perf_event_open io_uring_setup io_uring_enter io_uring_register userfaultfd "
    "kexec_load kexec_file_load init_module finit_module delete_module reboot swapon swapoff syslog acct quotactl "
    "quotactl_fd vhangup iopl ioperm modify_ldt lookup_dcookie nfsservctl sethostname setdomainname"
).split()

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """A function of the C library. Raises OSError naming it when it returns -1."""
    ctypes.set_errno(0)
    result = getattr(libc, name)(*arguments)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def enter_namespaces() -> None:
    """Return in process 1 of new namespaces, the rights of their root in hand; the caller's process waits for it
    and ends as it ends."""
    map_users()
    for name in ("mount", "pid", "net", "ipc", "uts", "cgroup"):
        unshare(name)
    child = os.fork()
    if child:
        die_with_parent()  # again: new credentials clear it
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    die_with_parent()


def unshare(kind: str) -> None:
    """Enter a new namespace of this kind. Raises OSError with what the machine has against it."""
    try:
        call("unshare", NEW_NAMESPACES[kind])
    except OSError as problem:
        raise refusal(kind, problem) from None


def refusal(kind: str, problem: OSError) -> OSError:
    """Why there is no new namespace: the kernel says ENOSPC where their number is limited, and that may be to none."""
    limit = f"/proc/sys/user/max_{'mnt' if kind == 'mount' else kind}_namespaces"
    switches = {limit: "0"} if problem.errno == errno.ENOSPC else SWITCHES
    for path, off in switches.items():
        with contextlib.suppress(OSError), open(path) as file:
            if file.read().strip() == off:
                return OSError(f"{kind} namespaces are switched off here: {path} is {off}")
    if problem.errno == errno.ENOSPC:
        return OSError(f"no more {kind} namespaces are allowed here: {limit}, or that of a namespace around this one")
    return OSError(f"{kind} namespaces are not allowed here: {problem.strerror}")


def map_users() -> None:
    """A new user namespace in which INSIDE_ID is the caller, or nobody where the caller is root. Only a process outside
    may write root's map, and one that is not root gets no other map than itself."""
    user, group, target = os.getuid(), os.getgid(), os.getpid()
    go_read, go_write = os.pipe()
    writer = os.fork()
    if writer == 0:
        os.close(go_write)
        os.read(go_read, 1)
        os._exit(write_maps(target, user, group))
    os.close(go_read)
    try:
        unshare("user")
    finally:
        os.close(go_write)
        _, status = os.waitpid(writer, 0)
    if status:
        raise refusal("user", OSError(os.waitstatus_to_exitcode(status), "its map cannot be written"))


def write_maps(target: int, user: int, group: int) -> int:
    """Write the user and group map of a process; returns an errno, 0 if all went well."""
    pairs = [(INSIDE_ID, user, group)] if user else [(0, 0, 0), (INSIDE_ID, NOBODY, NOBODY)]
    try:
        if user:  # the kernel's condition for a group map by one who is not root
            write_file(f"/proc/{target}/setgroups", "deny")
        write_file(f"/proc/{target}/gid_map", "".join(f"{inside} {gid} 1\n" for inside, _, gid in pairs))
        write_file(f"/proc/{target}/uid_map", "".join(f"{inside} {uid} 1\n" for inside, uid, _ in pairs))
    except OSError as problem:
        return problem.errno or errno.EIO
    return 0


def write_file(path: str, text: str) -> None:
    """Write a file of /proc in one call."""
    with open(path, "w") as file:
        file.write(text)


def die_with_parent() -> None:
    """SIGKILL for this process when the one that started it is gone."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def build_tree(visible: list[str], disk_bytes: int, files: int) -> None:
    """Leave nothing of the file tree but the visible paths, read-only, a /proc of this namespace, and FOLDER.

    visible: absolute paths; a link is copied, a missing path is left out.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs")  # only a place for the two directories; what it hides comes back under /old
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    mount("tmpfs", "/new", "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for path in visible:
        show(path)
    for folder in ("/new/proc", f"/new{FOLDER}"):
        os.mkdir(folder)
    mount("proc", "/new/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    # struct mount_attr: set, clear, propagation, user namespace
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/new", AT_RECURSIVE, ctypes.byref(attributes), size)
    room = f"size={disk_bytes},nr_inodes={files},mode=700,uid={INSIDE_ID},gid={INSIDE_ID}"
    mount("tmpfs", f"/new{FOLDER}", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, room)
    os.chdir("/new")
    call("pivot_root", b".", b".")  # the old root now lies on top of the new one (pivot_root(2), NOTES)
    call("umount2", b".", MNT_DETACH)


def mount(source: str, target: str, kind: str | None, flags: int = 0, options: str | None = None) -> None:
    """mount(2); raises OSError naming the target."""
    try:
        call("mount", source.encode(), target.encode(), kind and kind.encode(), flags, options and options.encode())
    except OSError as problem:
        raise OSError(problem.errno, f"mount {target}: {os.strerror(problem.errno)}") from None


def show(path: str) -> None:
    """Make /old/path appear as /new/path."""
    source, target = f"/old{path}", f"/new{path}"
    if not os.path.lexists(source):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, target, None, MS_BIND | MS_REC)


def hide_memory() -> None:
    """No core dump of this process, and no way into its memory for others without privilege."""
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


def limit_resources(memory_bytes: int, disk_bytes: int) -> None:
    """Limits of each process that hold isolated or not."""
    for name, value in {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: disk_bytes,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 1,  # 0 would still start the program of a piped core_pattern, core(5)
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_RTPRIO: 0,
    }.items():
        _, hard = resource.getrlimit(name)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def drop_privileges(processes: int) -> None:
    """The code's own user, no capability, no program that gives one back, and a limited number of processes."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
        os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    call("capset", ctypes.byref(header), ctypes.byref(nothing))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    count = processes + OWN_PROCESSES
    resource.setrlimit(resource.RLIMIT_NPROC, (count, count))
    hide_memory()  # again: a change of user clears it


class Argument(ctypes.Structure):
    """struct scmp_arg_cmp: a condition on one argument of a system call."""

    _fields_ = [("index", ctypes.c_uint), ("operator", ctypes.c_int), ("first", ctypes.c_uint64),
                ("second", ctypes.c_uint64)]


def filter_calls() -> None:
    """Refuse DENIED_CALLS with EPERM from here on. Raises OSError without libseccomp."""
    seccomp = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    seccomp.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(seccomp.seccomp_init(SCMP_ACT_ALLOW))

    def deny(name: str, code: int = errno.EPERM, condition: Argument | None = None) -> None:
        """Answer a call with an error, or only where its argument meets a condition."""
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number == -1:  # a call younger than the library
            return
        given = None if condition is None else ctypes.byref(condition)
        failure = seccomp.seccomp_rule_add_array(rules, SCMP_ACT_ERRNO | code, number, condition is not None, given)
        if failure:
            raise OSError(-failure, f"seccomp rule for {name}: {os.strerror(-failure)}")

    for name in DENIED_CALLS:
        deny(name)
    # vsock, netlink and others reach past the network namespace
    deny("socket", condition=Argument(0, SCMP_CMP_NE, 1, 0))  # 1 = AF_UNIX
    deny("mmap", condition=Argument(3, SCMP_CMP_MASKED_EQ, MAP_SHARED_ANONYMOUS, MAP_SHARED_ANONYMOUS))
    for command in DENIED_FCNTL:
        deny("fcntl", condition=Argument(1, SCMP_CMP_MASKED_EQ, LOWER_HALF, command))
    for option in (SO_SNDBUF, SO_SNDBUFFORCE):
        deny("setsockopt", condition=Argument(2, SCMP_CMP_MASKED_EQ, LOWER_HALF, option))
    deny("prlimit64", condition=Argument(0, SCMP_CMP_NE, 0, 0))  # limits of another process: the worker's
    for flag in NEW_NAMESPACES.values():
        deny("clone", condition=Argument(0, SCMP_CMP_MASKED_EQ, flag, flag))
    deny("clone3", errno.ENOSYS)  # its flags lie in memory that a filter cannot see; the C library takes clone instead
    failure = seccomp.seccomp_load(rules)
    if failure:
        raise OSError(-failure, f"seccomp_load: {os.strerror(-failure)}")

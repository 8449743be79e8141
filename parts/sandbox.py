"""Run a command that may read what it is given and nothing else, without network.

    python -m parts.sandbox '{"read": ["artifact.bin", ...], "scratch": "/tmp/x", "secret": ["text.jsonl"], "status": 5}' COMMAND ...

Files: Landlock (Linux ≥ 5.13, no privileges needed), else, for root, another user who has no rights of ours. Network: a network namespace of its own,
and Landlock's TCP rules where the kernel has them. Which of these there are differs from machine to machine, so nothing is taken for granted: before the
command starts, the process tries to open the secrets and to reach an address, and writes what happened to the descriptor `status`:
{"files": true if every secret was refused, "network": true if nothing could be reached, "means": [...]}. What is not so is no sandbox.

The restrictions outlive exec and hold for every process that the command starts; Landlock also keeps them from looking into
processes outside (ptrace, /proc/PID/mem). Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import socket
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

# linux/landlock.h: rights over files, in the order of their bits.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = (1 << bit for bit in range(4))
READ = EXECUTE | READ_FILE | READ_DIR
ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # ABI 5's ioctl on devices stays free: a GPU is driven by it
IOCTL_FREE = 3  # the newest of them that says anything about files we restrict
CONNECT_AND_BIND_TCP = 0b11  # since ABI 4
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
NO_NEW_PRIVS, CLONE_NEWUSER, CLONE_NEWNET, NOBODY = 38, 0x10000000, 0x40000000, 65534
# Where each compiler keeps what it made, and the name of that folder under CACHE_DIR. Triton's holds what fla's autotuners found, too.
COMPILERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TILELANG_CACHE_DIR": "tilelang",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash_attn",
}
CACHES = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH", *COMPILERS)
DEVICES = ("null", "zero", "full", "random", "urandom", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-caps")


def own_caches(folder: str) -> dict[str, str]:
    """Environment in which a process unpacks, compiles and caches in `folder`, the one place where it may write."""
    return dict.fromkeys(CACHES, folder) | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # Inductor's pool of workers needs semaphores in /dev/shm


def python_paths() -> list[str]:
    """What a Python process with a GPU reads besides its own program: the interpreter, its packages, the system's libraries."""
    paths = {sys.prefix, sys.exec_prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))}
    for variable in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        paths |= {os.path.abspath(path) for path in os.environ.get(variable, "").split(os.pathsep) if path}
    if compiler := shutil.which(os.environ.get("CC") or "gcc"):  # Triton builds its launchers with it
        paths.add(os.path.dirname(os.path.dirname(os.path.realpath(compiler))))
    return [*sorted(paths), "/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/sys"]


def _landlock(read: Iterable[str], write: Iterable[str]) -> list[str]:
    """Restrict this process; the means used, empty where the kernel has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if abi < 1:
        return []
    handled = ALL_BY_ABI[min(abi, IOCTL_FREE)]
    attributes = struct.pack("=QQ", handled, CONNECT_AND_BIND_TCP if abi >= 4 else 0)[: 16 if abi >= 4 else 8]
    ruleset = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if ruleset < 0:
        return []
    for paths, rights in ((read, READ), (write, handled)):
        for path in paths:
            with contextlib.suppress(OSError):  # a path that is not there needs no rule
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
                mask = rights if os.path.isdir(path) else rights & (EXECUTE | READ_FILE | WRITE_FILE)
                rule = struct.pack("=Qi", mask & handled, descriptor)
                libc.syscall(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
                os.close(descriptor)
    libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    refused = libc.syscall(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)
    return [] if refused else [f"Landlock ABI {abi}"]


def _no_network() -> list[str]:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) == 0 or libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0:
        return ["network namespace"]
    return []


def _another_user(scratch: str) -> list[str]:
    if os.geteuid():
        return []
    os.chown(scratch, NOBODY, NOBODY)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    return ["another user"]


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY))
    except PermissionError:
        return False
    except OSError:
        return True  # not refused: merely not there, or not a file that can be opened
    return True


def _reaches_out() -> bool:
    """Whether TCP to this machine itself or UDP to another is let through (192.0.2.0/24 is nobody's: RFC 5737; UDP's connect sends nothing)."""
    for kind, address in ((socket.SOCK_STREAM, ("127.0.0.1", 9)), (socket.SOCK_DGRAM, ("192.0.2.1", 9))):
        try:
            with socket.socket(socket.AF_INET, kind) as probe:
                probe.connect(address)
        except OSError as error:
            if error.errno in (errno.ENETUNREACH, errno.EACCES, errno.EPERM, errno.EAFNOSUPPORT):
                continue
        return True
    return False


def enter(read: Sequence[str], scratch: str, secret: Sequence[str]) -> dict:
    """Shut this process in; what could be verified of it. secret: files that must then be out of reach."""
    devices = [f"/dev/{name}" for name in DEVICES] + [str(path) for path in Path("/dev").glob("nvidia[0-9]*")]
    # A GPU's driver names its threads through /proc/self, and reports no device at all where it may not.
    means = _no_network()  # first: neither another user nor a restricted process may
    files = _landlock([*python_paths(), *read], [scratch, "/proc/self", *devices]) or _another_user(scratch)
    return {"files": not any(map(_opens, secret)), "network": not _reaches_out(), "means": means + files}


def main() -> None:
    order, command = json.loads(sys.argv[1]), sys.argv[2:]
    try:
        status = enter(order["read"], order["scratch"], order["secret"])
    except OSError as error:
        status = {"files": False, "network": False, "means": [], "error": str(error)}
    os.write(order["status"], json.dumps(status).encode() + b"\n")
    os.close(order["status"])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()

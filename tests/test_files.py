"""parts/files.py: how every command ends, and how files come to be."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parts.files import UserError, atomic_write, cli, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent


def end(main, capsys) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli(main)
    return exit.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


def test_a_command_ends_in_one_line(capsys):
    assert end(lambda: None, capsys) == (0, "")
    assert end(lambda: 1, capsys) == (1, "")
    assert end(raising(UserError("two\nlines")), capsys) == (2, "error: two lines\n")
    assert end(raising(FileNotFoundError(2, "No such file", "a.bin")), capsys) == (2, "error: a.bin: No such file\n")
    assert end(raising(OSError(28, "No space left")), capsys) == (2, "error: No space left\n")
    assert end(raising(KeyboardInterrupt()), capsys) == (130, "error: interrupted\n")
    assert end(raising(UserError("caf\udce9.txt")), capsys) == (2, "error: caf\\udce9.txt\n")  # a file name that is not text
    with pytest.raises(ValueError):  # a fault of ours is no fault of input
        cli(raising(ValueError()))


def test_under_torchrun_one_rank_speaks_and_the_summary_names_the_others(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for rank, said in (("0", "error: no shards\n"), ("3", "")):
        monkeypatch.setenv("RANK", rank)
        assert end(raising(UserError("no shards")), capsys) == (2, said)
        assert json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["py_callstack"] == "no shards"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")  # another launcher, which shows nothing of its own
    assert end(raising(UserError("no shards")), capsys) == (2, "error: rank 3: no shards\n")


def test_a_lost_rank_is_one_line(capsys, monkeypatch):
    class DistError(RuntimeError):  # as torch.distributed's
        pass

    gloo = "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:60081. This is typically caused by"
    line = "error: rank 1: lost touch with another rank (Connection closed by peer), whose own message says why\n"
    monkeypatch.setenv("RANK", "1")
    assert end(raising(RuntimeError(gloo)), capsys) == (2, line)
    assert end(raising(DistError("NCCL error: remote process exited")), capsys)[0] == 2
    with pytest.raises(RuntimeError):  # a fault of ours
        cli(raising(RuntimeError("shapes do not match")))


def test_the_end_of_memory_is_one_line(capsys):
    for allocate in (
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.\nGPU 0")),
        lambda: torch.empty(1 << 55),
    ):
        code, said = end(allocate, capsys)
        assert code == 2 and said.count("\n") == 1 and "EVAL_BATCH_SEQS" in said and "enforce fail" not in said
        assert re.match(r"error: out of memory \((CUDA out of memory\. Tried|DefaultCPUAllocator: )", said), said
    assert end(raising(MemoryError()), capsys)[1].startswith("error: out of memory; lower MICRO_BATCH_TOKENS")


def test_help_where_the_terminal_is_not_unicode(monkeypatch):
    for encoding in ("latin-1", "ascii"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, ROOT / "data/prepare.py", "--help"], capture_output=True, env=environment)
        assert done.returncode == 0 and b"--val-fraction" in done.stdout, done.stderr
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as exit:
        cli(lambda: print("a → é"))
    stream.flush()
    assert exit.value.code == 0 and stream.buffer.getvalue() == "a \\u2192 é\n".encode("latin-1")


@pytest.mark.parametrize("buffered", [True, False])
def test_whoever_reads_may_leave(buffered):
    """A closed pipe ends a command without a word, as SIGPIPE would; a full disk, a pipe of its own and a fault of input keep their line."""

    def end_of(main: str, output: int) -> tuple[int, str]:
        code = f"import argparse, os, sys; from parts.files import UserError, cli\ndef main():\n    {main}\ncli(main)"
        environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.PIPE, text=True)
        return done.returncode, done.stderr

    reader, writer = os.pipe()
    os.close(reader)
    assert end_of("print('line')", writer) == (141, "")
    assert end_of("[print('line' * 1000) for _ in range(100)]", writer) == (141, "")
    assert end_of("argparse.ArgumentParser().parse_args(['--help'])", writer) == (141 if buffered else 0, "")  # argparse passes over it
    if buffered:
        assert end_of("print('line'); raise UserError('no')", writer) == (2, "error: no\n")
    os.close(writer)
    with open("/dev/full", "w") as full:
        assert end_of("print('line')", full) == (2, "error: No space left on device\n")
    pipe = "reader, writer = os.pipe(); os.close(reader); os.write(writer, b'to a process that has gone')"
    assert end_of(pipe, subprocess.DEVNULL) == (2, "error: Broken pipe\n")


def test_every_command_ends_that_way():
    commands = [path for path in [*ROOT.glob("*.py"), ROOT / "data/prepare.py"] if "__main__" in path.read_text(encoding="utf-8")]
    assert len(commands) >= 5
    for path in commands:
        assert path.read_text(encoding="utf-8").rstrip().endswith("cli(main)"), path


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder/value.json"
    write_json(path, {"name": "caf\udce9 é"})
    assert read_json(path) == {"name": "caf\udce9 é"} and "é" in path.read_text()
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(path):
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write to an open file says it
    assert caught.value.filename == str(path)
    assert read_json(path) == {"name": "caf\udce9 é"} and [p.name for p in path.parent.iterdir()] == ["value.json"]
    for damaged in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(damaged)
        assert read_json(path) is None


def test_a_file_is_on_the_disk_before_its_name_is_and_then_the_name(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("renamed") or replace(*paths))
    write_json(tmp_path / "value.json", {})
    assert done == [(tmp_path / "value.json").stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "a[1].json"
    names = {"old": ".a[1].json.77.tmp", "of a live process": ".a[1].json.78.tmp", "of another file": ".b.json.77.tmp"}
    for what, name in names.items():
        (tmp_path / name).write_text("half")
        if what != "of a live process":
            os.utime(tmp_path / name, (0, 0))
    write_json(path, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a[1].json", names["of a live process"], names["of another file"]])

"""A run's folder and its process: lock, logs, signals."""

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from parts import runs
from parts.files import UserError


def python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def test_a_folder_has_one_owner(tmp_path):
    folder = tmp_path / "run"
    code = f"from parts import runs; from pathlib import Path\nwith runs.run_lock(Path({str(folder)!r})): print('owned')"
    with runs.run_lock(folder):
        result = python(code)
        assert f"is in use by process {os.getpid()} on {socket.gethostname()} since " in result.stderr
    assert python(code).stdout == "owned\n", "free again"
    killed = python(code.replace("print('owned')", "import os; os.kill(os.getpid(), 9)"))
    assert killed.returncode == -9 and json.loads((folder / ".lock").read_text())["pid"]
    with runs.run_lock(folder):  # what a killed owner left is no lock
        pass


@pytest.mark.parametrize(("owner", "free"), [({"pid": os.getpid()}, False), ({"pid": 2**22 + 1}, True), ({"host": "elsewhere"}, False)])
def test_without_locks_in_the_file_system_the_name_decides(tmp_path, monkeypatch, owner, free):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": socket.gethostname(), "since": "then", **owner}))
    if free:
        with runs.run_lock(tmp_path):
            pass
    else:
        with pytest.raises(UserError, match=r"in use by process \d+ on .* since then"), runs.run_lock(tmp_path):
            pass


def test_log_lines_are_whole_or_missing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "a"}\n{"event": "to')
    log = runs.LogFile(path)  # mends what a killed writer left
    log.write('{"event": "b"}')
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limit[1]))  # a disk with room for five bytes
        log.write('{"event": "lost"}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    log.write('{"event": "c"}')
    log.close()
    assert path.read_text() == '{"event": "a"}\n{"event": "b"}\n{"event": "c"}\n' and log.lost == 1


def test_metrics_history_goes_back_with_a_resume(tmp_path):
    events = [("train", 5), ("train", 10), ("resume", 5), ("train", 10), ("train", 15), ("resume", 10), ("done", 20)]
    lines = [json.dumps({"event": "start"})] + [json.dumps({"event": event, "step": step}) for event, step in events]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:3], "[1]", "{torn", *lines[3:]]))
    history = [(event["event"], event.get("step")) for event in runs.read_metrics(tmp_path)]
    assert history == [("start", None), ("train", 5), ("resume", 5), ("train", 10), ("resume", 10), ("done", 20)]
    assert runs.read_metrics(tmp_path / "nowhere") == []


@pytest.mark.parametrize("number", runs.StopSignal.NUMBERS)
def test_a_signal_sent_twice_is_one_request(number, capfd):
    with runs.StopSignal() as stop:
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # as torchrun and SLURM do
        assert stop.received == number
    assert capfd.readouterr().err.count("saving, then leaving") == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with runs.StopSignal() as stop:
        stop.request(signal.SIGPIPE)
        signal.raise_signal(number)
        assert stop.received == signal.SIGPIPE


def test_asking_again_later_ends_the_process_at_once():
    code = (
        "import signal; from parts.runs import StopSignal\n"
        "StopSignal.IMPATIENT = 0.0\n"
        "with StopSignal() as stop:\n"
        "    signal.raise_signal(signal.SIGTERM); print('waits', flush=True); signal.raise_signal(signal.SIGTERM); print('never')"
    )
    result = python(code)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "waits\n")


def test_nohup_stays_deaf_to_hangup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runs.StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.received == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_at_once_stops_where_it_stands(capfd):
    with runs.StopSignal() as stop, pytest.raises(runs.Stopped) as caught, stop.at_once():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM
    with runs.StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(runs.Stopped), stop.at_once():
            raise AssertionError("a signal that came before is not forgotten")


def test_a_closed_pipe_is_noticed_and_no_line_fails():
    code = "from parts import files, runs\nwhile runs.print_line('line'): pass\nassert runs.print_line('into nothing'); files.flush_stdout(); raise SystemExit(7)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 7, process.stderr.read()


def test_a_rank_ends_when_its_launcher_is_gone(tmp_path):
    """The launcher is killed by SIGKILL; the rank, which handles SIGTERM, learns it and can save."""
    rank = (
        "import os, signal, sys, time; from parts import runs\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'w').write('saved'), os._exit(0)))\n"
        "runs.end_with_parent(poll_seconds=0.01)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}, sys.argv[1]])"
    process = subprocess.Popen([sys.executable, "-c", launcher, tmp_path / "out"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.stdout.read()  # until the rank, the pipe's other holder, has ended
    process.wait()
    assert (tmp_path / "out").read_text() == "saved"

"""The referee, its sandbox and its protocol, on an evaluator of another house and on cheats."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from bigram import Bigram
from conftest import ROOT, clean_environment

from parts import referee, sandbox
from parts.files import UserError
from parts.referee import FAIL, INCOMPLETE, PASS, judge
from parts.replica import Replica, Sandbox

HERE = Path(__file__).resolve().parent
VOCAB = 13


def text(n: int = 401) -> np.ndarray:
    """Tokens of which each follows its predecessor in one of three ways."""
    generator = np.random.default_rng(3)
    tokens = [1]
    while len(tokens) < n:
        tokens.append((5 * tokens[-1] + int(generator.choice([0, 1, 4], p=[0.7, 0.2, 0.1]))) % VOCAB)
    return np.array(tokens, np.int32)


def honest_nll(tokens: np.ndarray) -> float:
    model = Bigram(len(tokens) - 1, VOCAB)
    model.feed(tokens)
    return -sum(math.log(np.float32(model.row(t)[tokens[t + 1]])) for t in range(len(tokens) - 1))


def judged(monkeypatch, cheat: str, *arguments, sandboxed: bool = False, secret=(), block: int = 20, cuts: int = 2) -> referee.Judgement:
    """A cheat before the referee, whose cuts are drawn from a fixed seed here."""
    monkeypatch.setattr(referee.secrets, "randbelow", random.Random(0).randrange)
    command = [sys.executable, HERE / "cheats.py", cheat, *arguments]
    sandbox = Sandbox([HERE], secret) if sandboxed else None
    return judge(lambda: Replica(command, 400, VOCAB, block, sandbox), text(), block, cuts)


needs_sandbox = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and namespaces are Linux's")


def test_an_honest_evaluator_is_scored_as_it_would_score_itself(monkeypatch):
    result = judged(monkeypatch, "Evaluation", cuts=3)
    assert (result.disagreements, result.improper, result.failure) == ([], [], "") and result.scored == 400 and 50 < result.cuts <= 60
    assert result.nll == pytest.approx(honest_nll(text()), abs=1e-3)
    assert result.verdict == INCOMPLETE and "NO SANDBOX" in "\n".join(result.lines())  # what could have read the text proves nothing


@pytest.mark.parametrize("cheat,cuts", [
    ("LateOwnTarget", 2), ("RareOwnTarget", 16), ("HonestWhenAskedAlone", 2), ("BestTemperature", 2), ("BatchComposition", 2),
    ("CountsBeforeItScores", 2), ("MixesABlockInHindsight", 2), ("NoisyWithALeak", 2),
])  # fmt: skip
def test_a_look_ahead_makes_the_replicas_disagree(monkeypatch, cheat, cuts):
    result = judged(monkeypatch, cheat, cuts=cuts)
    assert result.disagreements and result.verdict == FAIL
    if cheat == "LateOwnTarget":
        assert min(result.disagreements) > 192


def test_rows_that_are_no_distributions_and_evaluators_that_die_fail(monkeypatch):
    result = judged(monkeypatch, "NotNormalized")
    assert len(result.improper) == 400 and result.verdict == FAIL and result.largest_sum_error == pytest.approx(0.5, abs=1e-6)
    result = judged(monkeypatch, "Stops")
    assert "stopped: no more" in result.failure and result.verdict == FAIL and result.scored == 100
    command = [sys.executable, "-c", "print('hello')"]
    assert "protocol" in judge(lambda: Replica(command, 400, VOCAB), text()).failure


@needs_sandbox
def test_in_the_sandbox_there_is_no_file_no_network_and_no_yesterday(monkeypatch, tmp_path):
    """Each cheat profits outside, and gets nothing inside: its score is the honest one, and the verdict stands."""
    tokens, honest = text(), honest_nll(text())
    (tmp_path / "text.bin").write_bytes(tokens.astype("<i4").tobytes())
    with socket.create_server(("127.0.0.1", 0)) as server:

        def help_out() -> None:
            while True:
                try:
                    with server.accept()[0] as caller:
                        caller.sendall(int(tokens[int.from_bytes(caller.recv(4), "little") + 1]).to_bytes(4, "little"))
                except OSError:
                    return

        threading.Thread(target=help_out, daemon=True).start()
        for cheat, argument in (
            ("ReadsTheFile", tmp_path / "text.bin"),
            ("AsksTheNetwork", server.getsockname()[1]),
            ("RemembersTheLastPass", tmp_path / "counts.bin"),
        ):
            runs = 1 + (cheat == "RemembersTheLastPass")
            loose = [judged(monkeypatch, cheat, argument) for _ in range(runs)][-1]
            assert loose.nll < 0.9 * honest and loose.verdict != PASS
            shut = [judged(monkeypatch, cheat, argument, sandboxed=True, secret=[tmp_path / "text.bin"]) for _ in range(runs)][-1]
            assert shut.nll == pytest.approx(honest, abs=1e-3) and shut.verdict == PASS, shut.lines()


@needs_sandbox
def test_what_does_not_hold_is_not_called_a_sandbox(tmp_path):
    """A secret that the evaluator may read, and a kernel without any of the means."""
    (tmp_path / "text.bin").write_bytes(b"secret")
    command = [sys.executable, "-c", ""]
    with Replica(command, 1, VOCAB, sandbox=Sandbox([tmp_path], secret=[tmp_path / "text.bin"])) as replica:
        assert not replica.sandboxed and not replica.sandbox_status["files"] and replica.sandbox_status["network"]
    bare = "import ctypes, json, sys; from parts import sandbox\n"
    bare += "sandbox._landlock = sandbox._another_user = lambda *a: []\nsandbox._no_network = lambda: []\n"
    bare += "print(json.dumps(sandbox.enter([], sys.argv[1], [sys.argv[2]])))"
    done = subprocess.run(
        [sys.executable, "-c", bare, tmp_path, tmp_path / "text.bin"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"files": False, "network": False, "means": []}


def test_a_secret_that_is_not_there_was_not_refused(tmp_path):
    """Nor is a process without files but with a network shut in."""
    assert sandbox._opens(str(tmp_path / "nothing"))
    replica = Replica.__new__(Replica)
    for files, network in itertools.product((False, True), repeat=2):
        replica.sandbox_status = {"files": files, "network": network}
        assert replica.sandboxed == (files and network)


class InProcess:
    """A replica as the referee sees one, that answers with fixed rows; `change(rows, first)` may touch them."""

    def __init__(self, sandboxed: bool = True, change=lambda rows, first: None):
        self.sandboxed, self.change, self.known, self.sandbox_status = sandboxed, change, 0, {"means": []}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def feed(self, tokens):
        self.known += len(tokens)

    def ask(self, first, last):
        assert self.known == last, "the last target's own token, and all beyond, are not told yet"
        self.asked = first, last

    def answer(self):
        first, last = self.asked
        rows = np.full((last - first, VOCAB), 1 / VOCAB, np.float32)
        self.change(rows, first)
        return rows

    def rows(self, first, last):
        self.ask(first, last)
        return self.answer()


def verdict(probe: InProcess, scorer: InProcess) -> referee.Judgement:
    both = iter((probe, scorer))
    return judge(lambda: next(both), text(), block=20, cuts=3)


def test_the_verdict_needs_both_sandboxes_every_bit_and_every_target():
    assert verdict(InProcess(), InProcess()).verdict == PASS
    for one in (True, False):
        assert verdict(InProcess(one), InProcess(not one)).verdict == INCOMPLETE

    def last_bit(rows, first):
        rows[:, 0] = np.nextafter(rows[:, 0], np.float32(1))

    result = verdict(InProcess(), InProcess(change=last_bit))
    assert len(result.disagreements) == result.cuts and not result.improper and result.verdict == FAIL

    def negative(rows, first):
        rows[:, :2] = -0.25, 2 / VOCAB + 0.25

    result = verdict(InProcess(change=negative), InProcess(change=negative))
    assert not result.disagreements and len(result.improper) == 400 and result.verdict == FAIL
    assert referee.Judgement(targets=2, scored=1, sandboxed=True).verdict == FAIL  # a part is no score of the text


def test_an_answer_of_another_size_breaks_the_protocol():
    script = "import sys; sys.stdin.readline(); print('{\"protocol\": 1}'); print('{\"bytes\": 4}', flush=True); sys.stdout.buffer.write(b'1234')"
    result = judge(lambda: Replica([sys.executable, "-c", script], 400, VOCAB), text())
    assert "answered 4 bytes" in result.failure and result.verdict == FAIL


# ---- raw text ----


def test_text_is_read_and_tokenized_without_loss(tmp_path, dataset):
    tokenizer = referee.load_tokenizer(dataset.tokenizer)
    (tmp_path / "raw.jsonl").write_text('{"text": "a  b\\n\\u00e9"}\n\n"second"\n')
    documents = referee.read_documents(tmp_path / "raw.jsonl")
    assert documents == ["a  b\n\u00e9", "second"]
    tokens, raw = referee.tokenize(documents, tokenizer)
    assert raw == sum(len(d.encode()) for d in documents) and (tokens == referee.BOS_ID).sum() == 2 and tokens[0] == referee.BOS_ID
    for content, message in ((b"{", "raw.jsonl:1 is not JSON"), (b'{"a": 1}', 'has no "text"'), (b"\xff", "not UTF-8")):
        (tmp_path / "raw.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            referee.read_documents(tmp_path / "raw.jsonl")

    class Lossy:
        def encode(self, text):
            return [5]

        def decode(self, ids):
            return "other"

    with pytest.raises(UserError, match="does not come back"):
        referee.tokenize(["text"], Lossy())


@needs_sandbox
def test_the_command_judges_a_foreign_evaluator(tmp_path, dataset):
    """The 40-line bigram model, from raw text to referee.json, in its sandbox."""
    raw = tmp_path / "raw.jsonl"
    raw.write_text(json.dumps({"text": "the referee has the text; " * 12}) + "\n" + json.dumps({"text": "nobody else does"}) + "\n")
    script = tmp_path / "submission" / "bigram.py"
    script.parent.mkdir()
    script.write_bytes((HERE / "bigram.py").read_bytes())
    command = [sys.executable, "-m", "parts.referee", raw, "--tokenizer", dataset.tokenizer, "--read", script, "--block", "32"]
    command += ["--out", tmp_path / "referee.json", "--", sys.executable, script]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "referee.json").read_text())
    assert result["verdict"] == PASS and f"val_bpb:{result['val_bpb']:.6f}" in done.stdout and "referee: PASS" in done.stdout
    tokens, size = referee.tokenize(referee.read_documents(raw), referee.load_tokenizer(dataset.tokenizer))
    model = Bigram(len(tokens) - 1, 512)
    model.feed(tokens)
    nll = -sum(math.log(np.float32(model.row(t)[tokens[t + 1]])) for t in range(len(tokens) - 1))
    assert result["val_bpb"] == pytest.approx(nll / math.log(2) / size, rel=1e-6)
    assert result["bytes_readable"] == os.path.getsize(script) + os.path.getsize(dataset.tokenizer)
    # Beside the submission the text is as good as handed over.
    command[command.index("--read") + 1] = tmp_path
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=clean_environment())
    assert "NO SANDBOX" in done.stdout and "referee: INCOMPLETE" in done.stdout

"""Shards, the training stream, byte accounting and window planning."""

import itertools

import numpy as np
import pytest
import torch

import train_gpt as T
from data import shards


def write_shard(path, tokens, magic=shards.SHARD_MAGIC, version=shards.SHARD_VERSION, claimed=None, tail=b""):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if claimed is None else claimed
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes() + tail)


def test_shard_faults_are_named(tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    faults = {
        "not a token shard": {"magic": 1},
        "version 9": {"version": 9},
        "truncated": {"claimed": 12},
        "over-long": {"tail": b"\0\0"},
        "holds no tokens": {"tokens": []},
    }
    for message, change in faults.items():
        write_shard(path, **{"tokens": list(range(10)), **change})
        with pytest.raises(T.UserError, match=message):
            T.load_shard(path)
    path.write_bytes(b"short")
    with pytest.raises(T.UserError, match="no room"):
        T.load_shard(path)
    write_shard(path, [1, 2, 600])
    with pytest.raises(T.UserError, match="token 600, beyond VOCAB_SIZE=512"):
        T.load_shard(path, vocab_size=512)
    assert T.load_shard(path, vocab_size=601).tolist() == [1, 2, 600]


def test_missing_folders_and_splits(tmp_path):
    with pytest.raises(T.UserError, match="is not a folder"):
        T.list_shards(tmp_path / "nowhere", "train")
    with pytest.raises(T.UserError, match="holds no fineweb_val"):
        T.list_shards(tmp_path, "val")


def test_only_exact_names_are_tokens(tmp_path):
    """A byte sidecar has a shard's header and sorts before the shard; a copy set aside has its contents."""
    for name in ("val_000000", "val_000001", "val_bytes_000000", "val_old", "val_1", "val_0000000", "val_000000.copy", "valid_000000"):
        write_shard(tmp_path / f"fineweb_{name}.bin", [1, 2, 3])
    assert [path.name for path in T.list_shards(tmp_path, "val")] == ["fineweb_val_000000.bin", "fineweb_val_000001.bin"]
    assert [path.name for path in T.list_shards(tmp_path, "val_bytes")] == ["fineweb_val_bytes_000000.bin"]
    assert len(T.load_tokens(tmp_path, "val", 512)) == 6
    others = ["val_000000.copy", "val_0000000", "val_1", "val_old", "valid_000000"]
    assert shards.unread_files(tmp_path) == [f"fineweb_{name}.bin" for name in others]
    write_shard(tmp_path / "fineweb_train_7.bin", [1])
    with pytest.raises(T.UserError, match=r"holds no fineweb_train_000000\.bin \(fineweb_train_7\.bin is not named like one\)"):
        T.list_shards(tmp_path, "train")


def test_stream_reads_on_over_shards_and_wraps(tmp_path):
    for index, (first, last) in enumerate([(0, 7), (7, 8), (8, 19)]):
        write_shard(tmp_path / f"fineweb_train_{index:06d}.bin", list(range(first, last)))
    stream = T.TokenStream(tmp_path, 512)
    assert stream.total_tokens == 19
    assert stream.read(5, 40).tolist() == [i % 19 for i in range(5, 45)]
    stream.position = 16
    inputs, targets = stream.sequences(1, 2, 4, torch.device("cpu"))
    assert inputs.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]] and targets.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]


def test_ranks_and_micro_batches_share_out_one_step(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", list(range(200)))
    stream, device = T.TokenStream(tmp_path, 512), torch.device("cpu")
    whole = stream.sequences(0, 8, 5, device)[0]
    pieces = [stream.sequences(first, 2, 5, device)[0] for first in (0, 2, 4, 6)]
    assert torch.equal(torch.cat(pieces), whole)


def test_a_step_reads_at_several_places(tmp_path):
    """Turns of 4 at 3 places of 40 tokens, 13 apart: BOS in place of each turn's first, the target after its last; every place goes on."""
    write_shard(tmp_path / "fineweb_train_000000.bin", list(range(100, 140)))
    stream, device = T.TokenStream(tmp_path, 512, places=3, turn=4), torch.device("cpu")
    stream.position = 12  # every place has had a turn
    inputs, targets = stream.sequences(0, 2, 6, device)
    assert inputs.tolist() == [[1, 105, 106, 107, 1, 118], [119, 120, 1, 131, 132, 133]]
    assert targets.tolist() == [[105, 106, 107, 108, 118, 119], [120, 121, 131, 132, 133, 134]]
    assert torch.equal(torch.cat([stream.sequences(first, 1, 3, device)[0] for first in range(4)]).view(2, 6), inputs)
    assert stream.boundaries(0, 2, 6, device).tolist()[:6] == [0, 4, 6, 8, 12, 12]
    with pytest.raises(T.UserError, match="TRAIN_PLACES=20"):
        T.TokenStream(tmp_path, 512, places=20, turn=4)


def test_stream_never_takes_validation(tmp_path):
    with pytest.raises(AssertionError, match="only training shards"):
        T.TokenStream(tmp_path, 512, split="val")


def test_byte_table_counts_the_raw_bytes_of_real_documents(dataset):
    """Table bytes == UTF-8 bytes of the decoded text, document by document."""
    tokenizer = T.load_tokenizer(dataset.tokenizer, 512)
    table = T.ByteTable.from_tokenizer(tokenizer).to("cpu")
    tokens = T.load_tokens(dataset.path, "val", 512)
    starts = [*(tokens == T.BOS_ID).nonzero().flatten().tolist(), len(tokens)]
    assert len(starts) > 2
    for first, last in itertools.pairwise(starts):
        text = tokenizer.decode(tokens[first + 1 : last].tolist())
        counted = table.count(tokens[first : last - 1], tokens[first + 1 : last]).sum()
        assert int(counted) == len(text.encode())


@pytest.mark.parametrize("text", [" leading", "  two", "tabs\t\tand\n\nlines", "ünï → 漢字 🎉", "a  b   c", "x" * 50])
def test_byte_table_on_awkward_text(dataset, text):
    tokenizer = T.load_tokenizer(dataset.tokenizer)
    ids = torch.tensor([T.BOS_ID, *tokenizer.encode(text)])
    assert tokenizer.decode(ids[1:].tolist()) == text
    assert int(T.ByteTable.from_tokenizer(tokenizer).to("cpu").count(ids[:-1], ids[1:]).sum()) == len(text.encode())


class PublishedStyleTokenizer:
    """The dummy-prefix convention of common vocabularies: every document starts with a space that its text does not have."""

    pieces = ("<unk>", "<s>", "</s>", "<0x41>", "▁", "▁the", "cat", "▁▁in", "<unused>")

    vocab_size = lambda self: len(self.pieces)
    id_to_piece = lambda self, i: self.pieces[i]
    piece_to_id = lambda self, piece: self.pieces.index(piece) if piece in self.pieces else 0
    is_control = lambda self, i: i in (1, 2)
    is_unknown = lambda self, i: i == 0
    is_unused = lambda self, i: i == 8
    is_byte = lambda self, i: i == 3
    encode = lambda self, text: [5]


def test_byte_table_by_the_formula():
    """len(piece without ▁) + 1 for a ▁ not at a document's start; inner spaces count one; byte pieces 1; control, unused, unknown 0."""
    table = T.ByteTable.from_tokenizer(PublishedStyleTokenizer())
    previous, target = torch.tensor([1, 6, 6, 6, 6, 6, 1, 6, 6]), torch.tensor([5, 5, 6, 3, 0, 8, 4, 4, 7])
    assert table.count(previous, target).tolist() == [3, 4, 3, 1, 0, 0, 0, 1, 4]


def test_tokenizer_without_a_space_piece_is_refused():
    class NoSpace(PublishedStyleTokenizer):
        pieces = tuple("_" if piece == "▁" else piece for piece in PublishedStyleTokenizer.pieces)

    with pytest.raises(T.UserError, match="no standalone"):
        T.ByteTable.from_tokenizer(NoSpace())


@pytest.mark.parametrize("targets", [1, 2, 63, 64, 65, 200, 257])
@pytest.mark.parametrize("seq_len,stride", [(64, 64), (64, 1), (64, 7), (64, 63), (1, 1)])
def test_windows_score_every_target_once(targets, seq_len, stride):
    coverage, length = np.zeros(targets, int), min(seq_len, targets)
    windows = T.plan_windows(targets, seq_len, stride)
    for index, (start, score_from, end) in enumerate(windows):
        assert end == start + length and 0 <= start <= score_from < start + length <= targets
        if index:
            assert score_from - start >= length - stride, "a later window gives at least length - stride tokens of context"
        coverage[score_from : start + length] += 1
    assert (coverage == 1).all()


def test_stride_beyond_the_window_is_refused():
    with pytest.raises(T.UserError, match="never be scored"):
        T.plan_windows(100, 10, 11)


def test_evaluate_equals_scoring_one_window_at_a_time(dataset):
    cfg = T.resolve_config({**dataset.settings, "EVAL_BATCH_SEQS": "3"})
    model, ctx = T.build_model(cfg), T.RunContext()
    tokens = T.load_tokens(dataset.path, "val", 512, limit=403)
    table = T.ByteTable.from_tokenizer(T.load_tokenizer(dataset.tokenizer))
    for seq_len, stride in ((64, 16), (64, 64), (64, 61), (500, 100)):
        result = T.evaluate(model, tokens, table, cfg.eval, ctx, seq_len, stride)
        nll = 0.0
        with torch.no_grad():
            for start, score_from, end in T.plan_windows(402, seq_len, stride):
                loss = model(tokens[None, start:end].long(), tokens[None, start + 1 : end + 1].long(), reduction="none")
                nll += loss[0, score_from - start :].double().sum().item()
        assert result.val_loss == pytest.approx(nll / 402, rel=1e-6)
        counted = int(table.count(tokens[:-1], tokens[1:]).sum())
        assert result.bytes_scored == counted and result.tokens_scored == 402
        assert result.val_bpb == pytest.approx(nll / np.log(2) / counted, rel=1e-6)


def document_stream(lengths, seed=0, vocabulary=512):
    """Documents of so many tokens each, BOS included."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocabulary, (sum(lengths),), generator=generator, dtype=torch.int32)
    tokens[np.cumsum([0, *lengths[:-1]])] = T.BOS_ID
    return tokens


@pytest.mark.parametrize("lengths", [[1], [2], [64, 65, 66, 1, 1, 200, 3], [500], [1, 63, 129]], ids=str)
@pytest.mark.parametrize("seq_len,stride", [(64, 64), (64, 16), (64, 63), (100, 1), (1, 1)])
def test_document_windows_score_every_target_once_and_cross_no_boundary(lengths, seq_len, stride):
    tokens = document_stream([*lengths, 5])
    document = (tokens == T.BOS_ID).cumsum(0)
    coverage = np.zeros(len(tokens) - 1, int)
    windows = T.document_windows(tokens, seq_len, stride)
    for start, score_from, end in windows:
        assert start <= score_from < end <= start + seq_len and document[start] == document[end - 1]
        assert tokens[start] == T.BOS_ID or score_from - start == seq_len - stride, "all its document, or the context that is due"
        coverage[score_from:end] += 1
    assert (coverage == 1).all()
    for first in {0, 1, min(40, len(tokens) - 2), len(tokens) - 2}:  # any stretch: the same windows, cut to it
        last = min(first + 90, len(tokens) - 1)
        cut = [
            w._replace(score_from=max(w.score_from, first), end=min(w.end, last)) for w in windows if w.end > first and w.score_from < last
        ]
        assert T.document_windows(tokens, seq_len, stride, first, last) == cut


def test_no_document_window_depends_on_what_comes_after_its_targets():
    tokens = document_stream([150, 30, 90])
    for place in (20, 100, 149, 150, 151, 200):
        other = tokens.clone()
        other[place:] = document_stream([7, 40] * 10, seed=1)[: len(tokens) - place]
        before = [
            {t: w.start for w in T.document_windows(x, 64, 24) for t in range(w.score_from, w.end) if t < place} for x in (tokens, other)
        ]
        assert before[0] == before[1]


def test_what_lies_behind_a_window_does_not_get_into_it():
    """A window shorter than its batch's width is filled up with a constant that starts no document."""
    tokens, seen = document_stream([5, 90, 3, 70]), []

    def forward(inputs, targets, **options):
        seen.append(inputs)
        return torch.zeros(inputs.size(0), options["score_last"])

    windows = T.document_windows(tokens, 64, 64)
    for _ in T.score_windows(forward, tokens, windows, 64, 64, 2, whole=True):
        pass
    rows = torch.cat(seen)
    assert len(rows) == len(windows) and {window.end - window.start for window in windows} > {64}
    for row, window in zip(rows, windows):
        size = window.end - window.start
        assert torch.equal(row[:size], tokens[window.start : window.end].long())
        assert (row[size:] == T.FILL_ID).all() and T.FILL_ID != T.BOS_ID


@pytest.mark.parametrize("pattern", ["GSTA", "AAAA"])
def test_evaluation_by_document_is_each_document_alone(dataset, pattern):
    """To the bit, whatever is batched with what and on however many ranks; and the documents' sum is the score."""
    cfg = T.resolve_config({**dataset.settings, "LAYER_PATTERN": pattern, "EVAL_BY_DOCUMENT": "1"})
    model, ctx = T.build_model(cfg), T.RunContext()
    with torch.no_grad():
        for param in model.parameters():
            if param.abs().max() == 0:
                param.normal_(std=0.1)
    tokens = document_stream([100, 7, 64, 65, 1, 500, 33, 2, 257])
    windows, scores = T.document_windows(tokens, 256, 64), []
    for batch, ranks in ((1, 1), (3, 1), (16, 1), (5, 2), (2, 3)):
        nll = torch.full((len(tokens) - 1,), torch.nan)
        for rank in range(ranks):
            for positions, values in T.score_windows(model, tokens, windows[rank::ranks], 256, 64, batch):
                nll[positions] = values
        scores.append(nll)
    assert all(torch.equal(scores[0], other) for other in scores[1:])
    starts = [*(tokens == T.BOS_ID).nonzero().flatten().tolist(), len(tokens) - 1]
    for start, end in itertools.pairwise(starts):
        if end > start:
            one = tokens[start : end + 1]
            with torch.no_grad():
                for at, score_from, until in T.document_windows(one, 256, 64):
                    alone = model(one[None, at:until].long(), one[None, at + 1 : until + 1].long(), reduction="none")[0, score_from - at :]
                    torch.testing.assert_close(scores[0][start + score_from : start + until], alone, rtol=1e-5, atol=1e-5)
    table = T.ByteTable.from_tokenizer(T.load_tokenizer(dataset.tokenizer))
    result = T.evaluate(model, tokens, table, cfg.eval, ctx, 256, 64)
    assert result.val_loss == scores[0].double().mean().item() and result.tokens_scored == len(tokens) - 1

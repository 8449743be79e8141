"""data/case_ops.py: the reversible case transform, and everything that reads text in it."""

import io
import itertools
import json
import random

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare, shards
from data.case_ops import ALLCAPS, CAPNEXT, ESCAPE, OPERATOR_BYTES, OPERATORS, TITLE, CaseTokenizer, decode, encode
from parts.files import UserError

MARKS = str.maketrans(dict(zip("TUNE", OPERATORS)))  # T title, U all capitals, N next, E escape

# Words in every case beside spaces, other letters, digits and the operators themselves.
texts = st.lists(st.one_of(st.sampled_from([" ", "  ", "\n", "é", "É", "7", "'", *OPERATORS]), st.text("abAB", max_size=5), st.text())).map(
    "".join
)


@pytest.mark.parametrize(
    ("raw", "written"),
    [
        ("all of the words", "all of the words"),
        ("of The", "ofT the"),
        ("The", "Tthe"),
        ("I am", "Ti am"),
        ("in  THE\nEND", "in U the\nUend"),
        ("iPhone, McCoy and ABc", "iNphone,T mcNcoy andT aNbc"),
        (" iPhone", " iNphone"),
        ("A B", "TaT b"),
        ("Été", "Été"),  # letters beyond ASCII keep their case
        ("éA", "éTa"),
        (f"{TITLE}The {ESCAPE} ", "E1Tthe E4 "),
    ],
)
def test_what_is_written(raw, written):
    assert encode(raw) == written.translate(MARKS)
    assert decode(encode(raw)) == raw


@settings(deadline=None)  # cores are shared
@given(st.one_of(st.text(), texts))
def test_any_text_comes_back(raw):
    written = encode(raw)
    assert decode(written) == raw
    assert not any(letter.isascii() and letter.isupper() for letter in written)


@settings(deadline=None)
@given(st.one_of(st.text(), texts))
def test_operators_and_characters_make_up_the_raw_bytes(raw):
    assert sum(OPERATOR_BYTES.get(character, len(character.encode("utf-8", "surrogatepass"))) for character in encode(raw)) == len(
        raw.encode("utf-8", "surrogatepass")
    )


def test_what_is_never_written_is_refused():
    """Every string of up to four of these characters is refused, or is exactly how its own reading is written."""
    accepted = 0
    for length in range(5):
        for characters in itertools.product("aA1 " + OPERATORS, repeat=length):
            written = "".join(characters)
            try:
                raw = decode(written)
            except ValueError:
                continue
            accepted += 1
            assert encode(raw) == written
    assert 150 < accepted < 200
    for wrong in ("A", "T", "U", "N", "E", "Ta!T", "T1", "Na", "aN", "aTb", " Ta", "T  a", "Ua", "UabNc", "TaNb", "E5", "E", "T Ta"):
        with pytest.raises(ValueError, match="character"):
            decode(wrong.translate(MARKS))


@settings(deadline=None)
@given(st.text("ab1 " + TITLE + ALLCAPS + CAPNEXT + ESCAPE, max_size=12))
def test_decoding_is_strict_at_any_length(written):
    try:
        raw = decode(written)
    except ValueError:
        return
    assert encode(raw) == written


# --- shards of transformed text


def cased_documents(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(150)]
    cases = [str.lower, str.lower, str.capitalize, str.upper, lambda w: w[:2] + w[2:].capitalize()]
    odd = ["\n", "  ", "12", "É", "日", *OPERATORS]
    return [
        f"{number} " + " ".join(rng.choice(odd) if rng.random() < 0.1 else rng.choice(cases)(rng.choice(words)) for _ in range(40))
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(dataset folder, tokenizer path, documents) of `prepare.py --case-ops`."""
    folder, documents = tmp_path_factory.mktemp("case"), cased_documents(120)
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    arguments = ["--case-ops", "--vocab-size", 500, "--val-fraction", 0.3, "--out", folder / "set", "--workers", 1]
    assert prepare.main([str(a) for a in (folder / "in.jsonl", *arguments)]) == 0
    return folder / "set", folder / "set.model", documents


def test_shards_of_transformed_text_hold_the_text_and_its_bytes(built):
    folder, model, documents = built
    manifest, tokenizer = shards.load_manifest(folder), shards.load_tokenizer(model)
    assert manifest["tokenizer"]["case_ops"] is True and isinstance(tokenizer, CaseTokenizer)
    table, found = shards.ByteTable.for_validation(tokenizer, folder), []
    for split in shards.SPLITS:
        tokens = np.concatenate([shards.load_shard(path) for path in shards.list_shards(folder, split)])
        texts = tokenizer.decode([part[1:].tolist() for part in np.split(tokens, np.flatnonzero(tokens == shards.BOS_ID))[1:]])
        raw = sum(len(text.encode()) for text in texts)
        assert table.targets(tokens).sum() == raw == manifest["splits"][split]["raw_bytes"]
        found += texts
    assert sorted(found) == sorted(documents)


def test_cases_of_a_word_share_their_tokens(built):
    tokenizer = shards.load_tokenizer(built[1])
    lower, title, capitals = (tokenizer.encode(f"x {word}") for word in ("hello", "Hello", "HELLO"))
    operators = {tokenizer.piece_to_id(operator) for operator in OPERATORS}
    assert [t for t in title if t not in operators] == [t for t in capitals if t not in operators] == lower != title != capitals
    with pytest.raises(UserError, match="no text"):
        tokenizer.decode([tokenizer.piece_to_id(TITLE)])


def test_a_tokenizer_without_operators_is_refused_where_they_are_wanted(built, tmp_path):
    folder, model, documents = built
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (tmp_path / "plain.model").write_bytes(prepare.train_tokenizer(documents, 500, 0.9995))
    command = [str(a) for a in (tmp_path / "in.jsonl", "--out", tmp_path / "set", "--val-fraction", 0.3, "--workers", 1)]
    with pytest.raises(UserError, match="no case operators"):
        prepare.main([*command, "--tokenizer", str(tmp_path / "plain.model"), "--case-ops"])
    assert prepare.main([*command, "--tokenizer", str(model)]) == 0  # the model says itself what its text is
    assert shards.load_manifest(tmp_path / "set")["tokenizer"]["case_ops"] is True
    for split in shards.SPLITS:
        assert (tmp_path / "set" / shards.shard_name(split, 0)).read_bytes() == (folder / shards.shard_name(split, 0)).read_bytes()


# --- the published exports, which have another transform and record their bytes


def write_shard(path, values):
    path.write_bytes(shards.shard_header(len(values)) + np.asarray(values, "<u2").tobytes())


@pytest.fixture(scope="module")
def published():
    """A tokenizer with the published operators as symbols of their own."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text.lower() for text in cased_documents(60)), model_writer=model, model_type="bpe", vocab_size=400, bos_id=1,
        unk_id=3, pad_id=0, eos_id=2, user_defined_symbols=list(shards.PUBLISHED_OPERATORS), byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return shards.parse_tokenizer(model.getvalue(), "published")


def test_recorded_bytes_are_the_published_exports_denominator(published, tmp_path):
    text = published.encode("the \ue001 end")
    tokens, counts = [[1, *text, 1], text], [[0, *range(5, 5 + len(text)), 0], [2] * len(text)]
    for index in range(2):
        write_shard(tmp_path / shards.shard_name("val", index), tokens[index])
        write_shard(tmp_path / shards.shard_name("val_bytes", index), counts[index])
    assert [path.name for path in shards.list_shards(tmp_path, "val")] == [shards.shard_name("val", index) for index in range(2)]
    table = shards.ByteTable.for_validation(published, tmp_path)
    stream = np.concatenate([np.array(part) for part in tokens])
    assert table.targets(stream).tolist() == [*counts[0][1:], *counts[1]]
    assert table.to("cpu").targets(stream[:7]).tolist() == counts[0][1:7]
    with pytest.raises(UserError, match="in their order alone"):
        table.count(stream[:-1], stream[1:])
    write_shard(tmp_path / shards.shard_name("val_bytes", 1), counts[1][:-1])
    with pytest.raises(UserError, match=f"records {len(text) - 1} tokens, .* has {len(text)}"):
        shards.ByteTable.for_validation(published, tmp_path)
    (tmp_path / shards.shard_name("val_bytes", 1)).unlink()
    with pytest.raises(UserError, match="no recorded bytes for fineweb_val_000001"):
        shards.ByteTable.for_validation(published, tmp_path)
    (tmp_path / shards.shard_name("val_bytes", 0)).unlink()
    with pytest.raises(UserError, match="do not tell their bytes: fineweb_val_bytes_000000"):
        shards.ByteTable.for_validation(published, tmp_path)


# --- what reads tokens as text


@settings(deadline=None)
@given(st.one_of(st.binary(), texts.map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_the_codec_spells_any_bytes(built, data):
    from codec import Spelling

    spelling = Spelling(shards.load_tokenizer(built[1]))
    assert spelling.decode(spelling.encode(data)) == data


def test_a_cut_text_is_decoded_as_far_as_it_goes(built):
    """Wherever EVAL_TOKENS cuts, decoded bytes and those of the unfinished tokens are the byte table's."""
    import torch

    from parts import audit

    tokenizer = shards.load_tokenizer(built[1])
    table = shards.ByteTable.from_tokenizer(tokenizer)
    tokens = torch.tensor([1, *tokenizer.encode("a McCoy IN THE ABc 日本 The"), 1, *tokenizer.encode("Of \ue011")])
    unfinished = []
    for length in range(2, len(tokens) + 1):
        part = tokens[:length]
        cut = audit.unfinished_tokens(part, tokenizer)
        counted = table.targets(part.numpy())
        decoded = sum(map(len, audit.decoded_documents(part[: length - cut], tokenizer)))
        assert decoded + counted[len(counted) - cut :].sum() == counted.sum()
        unfinished.append(cut)
    assert unfinished[-1] == 0 and 1 < max(unfinished) < 8

"""data/case_ops.py: the reversible case transform."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.case_ops import ALLCAPS, CAPNEXT, ESCAPE, OPERATOR_BYTES, OPERATORS, TITLE, decode, encode

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


@given(st.one_of(st.text(), texts))
def test_any_text_comes_back(raw):
    written = encode(raw)
    assert decode(written) == raw
    assert not any(letter.isascii() and letter.isupper() for letter in written)


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


@given(st.text("ab1 " + TITLE + ALLCAPS + CAPNEXT + ESCAPE, max_size=12))
def test_decoding_is_strict_at_any_length(written):
    try:
        raw = decode(written)
    except ValueError:
        return
    assert encode(raw) == written

"""Case operators: text without capital letters, and four characters that give them back. Lossless on every Unicode string.

A tokenizer spends a piece each on "the", "The" and "THE", and on each with a space in front. Here a capitalized word is written in small
letters behind an operator, so all cases of a word share their pieces (CaseOps, from the challenge's public record):

    word (maximal run of ASCII letters)      written
    the                                      the
    The, I                                   TITLE the, TITLE i
    THE                                      ALLCAPS the
    iPhone, McCoy                            i CAPNEXT phone, TITLE mc CAPNEXT coy

What differs from the published transform is the place of the space: an operator at the head of a word stands *before* the one space that
stands directly in front of it ("of The" -> of TITLE ␣the), so that "▁the" is one piece in every case and the space costs no token of its own.
An operator followed by a letter means that no space was there; both ways have one writing.

An operator character that the text itself holds is written ESCAPE and its number ("1" to "4"). So what a token stands for does not
depend on the tokens around it: operators are no bytes of the text, and ESCAPE is what the literal has more than its digit (`OPERATOR_BYTES`).
The characters lie beside, not on, those of the published exports (U+E001-U+E004): a tokenizer shows which transform its shards hold.
"""

from __future__ import annotations

import re

from parts.files import UserError

TITLE, ALLCAPS, CAPNEXT, ESCAPE = OPERATORS = "\ue011\ue012\ue013\ue014"
OPERATOR_BYTES = {TITLE: 0, ALLCAPS: 0, CAPNEXT: 0, ESCAPE: len(TITLE.encode()) - 1}

# Words with their space, in the order of the branches: from a capital on (all of the word, group 1, unless letters stand before it, as the
# P of iPhone, which is matched alone), and literal operators.
_RAW = re.compile(rf" ?[A-Z](?:(?<![A-Za-z].)([A-Za-z]*))?|[{OPERATORS}]")
_CAPITAL = re.compile("[A-Z]")

# What `encode` can write where an operator stands, and last, for all that it cannot, one character.
_WRITTEN = re.compile(
    rf"{ESCAPE}([1-4])"
    rf"|{ALLCAPS}(?: |(?<![a-z ].))([a-z]{{2,}})(?![a-z{CAPNEXT}])"
    rf"|{TITLE}(?: |(?<![a-z ].))([a-z]+(?:{CAPNEXT}[a-z]+)*)(?!{CAPNEXT})"
    rf"|(?<=[a-z]){CAPNEXT}([a-z])"
    rf"|[A-Z{OPERATORS}]"
)


def _lower(match: re.Match) -> str:
    found = match[0]
    if found in OPERATOR_BYTES:
        return f"{ESCAPE}{OPERATORS.index(found) + 1}"
    rest = match[1]
    if rest is None:
        return CAPNEXT + found.lower()
    if rest.isupper():
        return ALLCAPS + found.lower()
    head = found[: len(found) - len(rest)].lower()
    return TITLE + head + _CAPITAL.sub(lambda capital: CAPNEXT + capital[0].lower(), rest)


def encode(text: str) -> str:
    """The text in small letters and operators."""
    return _RAW.sub(_lower, text)


def _raise(match: re.Match) -> str:
    found = match[0]
    space = " " if found[1:2] == " " else ""
    if match[1]:
        return OPERATORS[int(match[1]) - 1]
    if match[2]:
        return space + match[2].upper()
    if match[3]:
        first, *later = match[3].split(CAPNEXT)
        if later and all(len(part) == 1 for part in (first, *later)):
            raise ValueError(f"character {match.start()}: a word of capitals is not written with ALLCAPS")
        return space + "".join(part[0].upper() + part[1:] for part in (first, *later))
    if match[4]:
        return match[4].upper()
    raise ValueError(f"character {match.start()}: misplaced {found!r}, which the transform never writes there")


def decode(text: str) -> str:
    """The inverse of `encode`. Raises ValueError for what `encode` never makes: decode(x) exists only where encode(decode(x)) == x."""
    return _WRITTEN.sub(_raise, text)


class CaseTokenizer:
    """A SentencePieceProcessor whose pieces are those of transformed text, and which takes and gives the text itself.

    transformed: the processor, for whoever transforms alone
    """

    def __init__(self, processor):
        self.transformed = processor

    def __getattr__(self, name: str):
        return getattr(self.transformed, name)

    def encode(self, text: str | list[str], **options):
        """Tokens of a text, or of each of a list."""
        return self.transformed.encode(encode(text) if isinstance(text, str) else list(map(encode, text)), **options)

    def decode(self, tokens: list[int] | list[list[int]]):
        """The text of tokens, or of each list of a list. Raises UserError for tokens that no text has."""
        written = self.transformed.decode(tokens)
        try:
            return decode(written) if isinstance(written, str) else list(map(decode, written))
        except ValueError as error:
            raise UserError(f"these tokens are no text: {error}") from None


FIRST_OPERATOR_ID = 4  # behind the control pieces and, here, the newline: symbols that were asked for precede all that are learned


def has_operators(tokenizer, operators: str = OPERATORS) -> bool:
    """Whether a tokenizer was made with these operators; one that merely met the characters in its text has them among its last pieces."""
    ids = range(FIRST_OPERATOR_ID, FIRST_OPERATOR_ID + len(operators))
    return tokenizer.vocab_size() >= ids.stop and [tokenizer.id_to_piece(i) for i in ids] == list(operators)

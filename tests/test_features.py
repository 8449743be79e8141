"""The FEATURES table of records/README.md is true: every setting is the preset's, every off is off, every named test exists."""

import re

import pytest
from conftest import ROOT

import train_gpt as T

PRESETS = dict(zip("ABCDE", ("gdn_hybrid", "gdn3_fa8", "legal_ttt", "token_shift", "ngram_hedge")))
OFF, ALWAYS = "–", "always"


def table() -> list[dict[str, str]]:
    """Rows of the table by column name; section headings (rows without cells) left out."""
    text = (ROOT / "records" / "README.md").read_text().split("## FEATURES")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    header, _, *rows = cells
    assert header == ["technique", "cards", *PRESETS, "test"] and all(len(row) == len(header) for row in rows)
    return [dict(zip(header, row)) for row in rows if row[-1]]


ROWS = table()


def holds(setting: str, preset: str) -> bool:
    """Is `NAME=value` (or `x in NAME`) what the preset resolves to?"""
    cfg = T.resolve_config({"PRESET": preset})
    if match := re.fullmatch(r"(\w+) in ([A-Z_]+)", setting):
        return match[1] in cfg[match[2].lower()].split(",")
    name, equals, value = setting.partition("=")
    assert equals and name.lower() in T.PART_OF, f"{setting!r} is not a setting"
    if name.startswith("TTT_") and name != "TTT_MODE" and cfg.eval.ttt_mode == "off":
        return False  # a default that nothing reads
    try:
        changed = T.resolve_config({"PRESET": preset, name: value})
    except T.UserError:
        return False  # does not even fit this preset's layers
    return changed[name.lower()] == cfg[name.lower()]


def settings_of(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["technique"])
def test_cells_say_what_the_presets_do(row):
    cells = {letter: row[letter] for letter in PRESETS}
    for letter, cell in cells.items():
        assert cell in (OFF, ALWAYS) or (settings_of(cell) and not re.sub(r"`[^`]+`", "", cell).strip()), f"{letter}: {cell!r}"
        for setting in settings_of(cell):
            assert holds(setting, PRESETS[letter]), f"{PRESETS[letter]} has another value than {setting}"
        if cell == OFF:
            for other in filter(settings_of, cells.values()):
                assert not all(holds(setting, PRESETS[letter]) for setting in settings_of(other)), f"{letter} is not without {other}"
    named = row["cards"].split()
    assert set(named) <= set(PRESETS) and all(cells[letter] != OFF for letter in named), "what a card names is on in its preset"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["technique"])
def test_named_tests_exist(row):
    for reference in row["test"].split(", "):
        file, test = reference.split("::")
        assert re.search(rf"^def {re.escape(test)}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), reference


def test_the_page_of_faults_names_tests_that_exist():
    named = re.findall(r"\b([a-z_]+)::([a-z0-9_]+)", (ROOT / "records" / "house" / "FAULTS.md").read_text(encoding="utf-8"))
    assert len(named) > 50
    for file, test in set(named) - {("file", "name")}:
        assert f"\ndef test_{test}(" in (ROOT / "tests" / f"test_{file}.py").read_text(encoding="utf-8"), f"{file}::{test}"


# Sizes, budgets, and constants that no card names.
UNLISTED = {
    "VOCAB_SIZE", "DATA_PATH", "TOKENIZER_PATH", "MODEL_DIM", "TRAIN_BATCH_TOKENS", "GPTQ_RESERVE_SECONDS", "REFERENCE_STEPS",
    "GPTQ_BLOCK_SIZE", "EMBED_WD", "ADAM_WD", "GRAD_CLIP_NORM", "GDN_A_MIN", "INVALID_CACHE",
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS.values())
def test_the_table_forgets_nothing_that_a_preset_sets(preset):
    cells = " ".join(row[letter] for row in ROWS for letter in PRESETS)
    shown = {name for setting in settings_of(cells) for name in re.findall(r"^[A-Z][A-Z0-9_]+|(?<= in )[A-Z]+", setting)}
    assert {name.upper() for name in T.read_preset(preset)} <= shown | UNLISTED

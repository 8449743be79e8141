"""Settings: resolution, checks, presets."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT

import codec
import eval_ttt
import quantize
import train_gpt as T
from parts.sandbox import own_caches

PRESETS = sorted(path.parent.name for path in (ROOT / "records").glob("*/config.env"))


def test_resolution_order_and_origins(tmp_path, monkeypatch):
    cfg = T.resolve_config({"PRESET": "legal_ttt/one_gpu", "MATRIX_LR": "0.5", "SEED": ""})
    assert cfg.train.matrix_lr == 0.5 and cfg.origins["matrix_lr"] == "env"
    assert cfg.train.train_batch_tokens == 65536 and cfg.origins["train_batch_tokens"] == "preset:legal_ttt/one_gpu"
    assert cfg.run.seed == 1337 and cfg.origins["seed"] == "default"


def test_the_word_none_empties_a_presets_list():
    assert T.resolve_config({"PRESET": "legal_ttt"}).model.xsa_layers == "all"
    assert T.resolve_config({"PRESET": "legal_ttt", "XSA_LAYERS": ""}).model.xsa_layers == "all", "empty counts as not set"
    assert T.resolve_config({"PRESET": "legal_ttt", "XSA_LAYERS": "none"}).model.xsa_layers == ""


@pytest.mark.parametrize(
    "environment,message",
    [
        ({"NUM_LAYERS": "nine"}, "NUM_LAYERS='nine' (env) is not a whole number"),
        ({"NUM_LAYERS": "4.5"}, "is not a whole number"),
        ({"MATRIX_LR": "nan"}, "is not a finite number"),
        ({"MATRIX_LR": "-1"}, "below its least value"),
        ({"MUON_MOMENTUM": "1.5"}, "above its greatest value"),
        ({"SMEAR_GATE": "maybe"}, "is not 0 or 1"),
        ({"COMPRESSOR": "rar"}, "is not one of brotli"),
        ({"LAYER_PATTERN": "AAX"}, "unknown mixer 'X'; known: A (attention), S (sliding window), G (GDN), T (token shift)"),
        ({"LAYER_PATTERN": "AA", "NUM_LAYERS": "3"}, "has 2 layers but NUM_LAYERS=3"),
        ({"MODEL_DIM": "100"}, "does not divide into NUM_HEADS=8"),
        ({"NUM_KV_HEADS": "3"}, "not a multiple of NUM_KV_HEADS=3"),
        ({"GDN_QK_HEADS": "3"}, "not a multiple of GDN_QK_HEADS=3"),
        ({"ROPE_DIMS": "7"}, "must be even"),
        ({"XSA_LAYERS": "1-99"}, "outside 0-8"),
        ({"XSA_LAYERS": "a"}, "is not 'all' or a list"),
        ({"VE_LAYERS": "0", "LAYER_PATTERN": "GA"}, "names no attention layer"),
        ({"SHARED_LAYERS": "0,1", "LAYER_PATTERN": "GA"}, "differ in kind"),
        ({"NUM_LOOPS": "1", "LOOP_START": "3", "LOOP_END": "20"}, "not within the 9 layers"),
        ({"SHARED_LAYERS": "0,1;1,2"}, "layer 1 is in two groups"),
        ({"SHARED_LAYERS": "0,1", "VE_LAYERS": "1"}, "VE_LAYERS names only one of the layers 0 and 1"),
        ({"MLP_MULT": "0.1", "MODEL_DIM": "8", "ROPE_DIMS": "0", "NUM_HEADS": "1", "NUM_KV_HEADS": "1"}, "leaves the MLP no width"),
        ({"RUN_ID": "../escaped"}, "is not a plain folder name"),
        ({"SEED": str(2**64)}, "above its greatest value"),
        ({"TTT_HASH_BUCKETS": "300000000"}, "above its greatest value"),
        ({"REFERENCE_STEPS": "9" * 400}, "above its greatest value"),
        ({"TRIGRAM_HASH": "1"}, "needs BIGRAM_VOCAB_SIZE"),
        ({"BIGRAM_VOCAB_SIZE": "1"}, "leaves no bucket"),
        ({"QAT_TARGETS": "("}, "not a regular expression"),
        ({"PARALLEL_LANES": "2"}, "needs PARALLEL_START"),
        (
            {"PARALLEL_LANES": "2", "PARALLEL_START": "4", "NUM_LOOPS": "1", "LOOP_START": "3", "LOOP_END": "5"},
            "inside the recurrent segment",
        ),
        ({"TRAIN_ROW_TOKENS": "4096"}, "needs DOCUMENT_MASK=1"),
        ({"TRAIN_SEQ_SCHEDULE": "512@0.5,256@0.2"}, "rising fractions"),
        ({"TRAIN_SEQ_SCHEDULE": "512@1"}, "ends with another length than TRAIN_SEQ_LEN=1024"),
        ({"GPTQ_RESERVE_SECONDS": "600"}, "leaves nothing"),
        ({"PRESET": "nope"}, "PRESET=nope"),
        ({"PRESET": "legal_ttt/nope"}, "no legal_ttt/nope.env"),
        ({"PRESET": "nope"}, "legal_ttt, legal_ttt/one_gpu"),
    ],
)
def test_bad_settings_are_refused_with_their_reason(environment, message):
    with pytest.raises(T.UserError, match=re.escape(message)):
        T.resolve_config(environment)


@pytest.mark.parametrize(("arguments", "shown"), [
    (["--preset", "base"], "PRESET=base python train_gpt.py"),
    (["TTT_LR=0.1"], "TTT_LR=0.1 python train_gpt.py"),
    (["--matrix-lr=0.02"], "MATRIX_LR=0.02 python train_gpt.py"),
    (["base"], "see --print-config"),
])  # fmt: skip
def test_an_argument_is_answered_with_the_variable(arguments, shown, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_gpt.py", *arguments])
    with pytest.raises(T.UserError, match=re.escape(shown)):
        T.main()


def test_a_log_shows_chosen_settings_by_origin():
    cfg = T.resolve_config({"PRESET": "demo", "RUN_ID": "a", "TTT_LR": "0.5", "XSA_LAYERS": "none"})
    lines = T.chosen_settings(cfg, "run", "model", "train")
    assert lines[0].startswith("preset:demo: ") and lines[-1] == "env: RUN_ID=a XSA_LAYERS=none" and len(lines) < 7
    assert "TTT_LR" not in "".join(lines) and "TTT_LR=0.5" in "".join(T.chosen_settings(cfg, "eval"))


def test_unknown_setting_in_a_preset_is_refused(tmp_path):
    (tmp_path / "odd").mkdir()
    path = tmp_path / "odd" / "config.env"
    path.write_text("MODEL_DIMM=3\n")
    with pytest.raises(T.UserError, match=re.escape("unknown setting MODEL_DIMM (preset:odd); did you mean MODEL_DIM?")):
        T._build_config(T.read_preset("odd", tmp_path))
    path.write_text("MODEL_DIM: 3\n")
    with pytest.raises(T.UserError, match="line 1 is not NAME=value"):
        T.read_preset("odd", tmp_path)


def test_near_misses_are_warned_about():
    assert T.near_misses({"MODEL_DIMS": "1", "PATH": "/", "HOME": "x", "SEED": "1", "WARMDOWN_FRACS": "2"}) == [
        "environment variable MODEL_DIMS is not a setting; did you mean MODEL_DIM?",
        "environment variable WARMDOWN_FRACS is not a setting; did you mean WARMDOWN_FRAC?",
    ]


def test_foreign_names_are_answered_with_their_substitute(capsys, monkeypatch):
    """What other code bases call their settings is neither a setting here nor silently ignored, by whichever command."""
    assert not set(T.FOREIGN) & {name.upper() for name in T.PART_OF}
    for substitute in T.FOREIGN.values():
        assert {word for word in re.findall(r"[A-Z][A-Z0-9_]{3,}", substitute)} <= {name.upper() for name in T.PART_OF}, substitute
    with pytest.raises(T.UserError, match=r"unknown setting WARMDOWN_ITERS \(run\): use WARMDOWN_FRAC"):
        T.Config.from_dict({"warmdown_iters": 3000})
    monkeypatch.setenv("WARMDOWN_ITERS", "3000")
    for argument in ("--describe", "--print-config"):
        monkeypatch.setattr("sys.argv", ["train_gpt.py", argument])
        assert T.main() == 0
        assert "WARMDOWN_ITERS is not a setting here: use WARMDOWN_FRAC, a fraction of the budget" in capsys.readouterr().err
    for command in (eval_ttt, quantize, codec):
        monkeypatch.setattr("sys.argv", ["x.py", "nowhere"])
        with pytest.raises(T.UserError):
            command.main()
        assert "use WARMDOWN_FRAC" in capsys.readouterr().err


def test_print_config_filters_and_explains(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_gpt.py", "--print-config", "warmdown"])
    monkeypatch.setenv("WARMDOWN_FRAC", "0.5")
    assert T.main() == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.split() == ["WARMDOWN_FRAC", "0.5", "env"] and second.endswith("[0 to 1]")
    lines = "\n".join(T.config_lines(T.Config(), "kneser"))
    assert "[one of kneser_ney, witten_bell]" in "\n".join(T.config_lines(T.Config(), "ngram_smoothing")) and not lines
    monkeypatch.setattr("sys.argv", ["train_gpt.py", "--print-config", "no such thing"])
    with pytest.raises(T.UserError, match="no setting has"):
        T.main()


def test_the_vocabulary_follows_a_tokenizer_that_is_named_above_it(dataset):
    tokenizer = {"TOKENIZER_PATH": str(dataset.tokenizer)}
    for preset in ({}, {"PRESET": "base"}):
        cfg = T.resolve_config({**tokenizer, **preset})
        assert cfg.model.vocab_size == 512 and cfg.origins["vocab_size"] == "tokenizer"
    assert T.resolve_config({**tokenizer, "VOCAB_SIZE": "256"}).model.vocab_size == 256, "said outright, it stays (and is refused later)"
    assert T.resolve_config({"PRESET": "base"}).model.vocab_size == 8192
    base = T.resolve_config({"VOCAB_SIZE": "300"}).to_dict()
    assert T.resolve_config(tokenizer, base).model.vocab_size == 300, "a finished run has its own"


def test_a_finished_model_fixes_its_own_settings():
    base = T.resolve_config({"MODEL_DIM": "256"}).to_dict()
    assert T.resolve_config({"EVAL_STRIDE": "8", "MODEL_DIM": "256"}, base).eval.eval_stride == 8
    assert T.resolve_config({"PRESET": "legal_ttt"}, base).model.model_dim == 256, "a preset cannot change a finished run"
    assert T.resolve_config({}, {**base, "gone_since": 3}) == T.resolve_config({}, base), "a setting that is gone is in older runs"
    with pytest.raises(T.UserError, match="MODEL_DIM=128 contradicts the trained model"):
        T.resolve_config({"MODEL_DIM": "128"}, base)


def test_round_trip_through_a_dictionary():
    cfg = T.resolve_config({"PRESET": "gdn3_fa8"})
    assert T.Config.from_dict(cfg.to_dict()) == cfg
    with pytest.raises(T.UserError, match="unknown setting"):
        T.Config.from_dict({"colour": 3})


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_and_variant_resolves(preset):
    for path in sorted((ROOT / "records" / preset).glob("*.env")):
        name = preset if path.name == "config.env" else f"{preset}/{path.stem}"
        assert T.resolve_config({"PRESET": name}).model.pattern


# The cards' models (published parameter counts in millions), within 3 %.
CARDS = {"gdn_hybrid": 33.9, "gdn3_fa8": 35.9, "legal_ttt": 35.9, "token_shift": 27.0, "ngram_hedge": 33.3, "frontier": 35.9}


@pytest.mark.parametrize("preset", CARDS)
def test_parameter_counts_are_the_cards(preset):
    import torch

    cfg = T.resolve_config({"PRESET": preset})
    with torch.device("meta"):
        model = T.GPT(cfg.model)
    assert T.count_params(model) == pytest.approx(CARDS[preset] * 1e6, rel=0.03)
    text = "\n".join(T.describe(model, cfg))
    assert cfg.model.pattern in text and f"{T.count_params(model):,} parameters" in text


@pytest.mark.parametrize("preset", CARDS)
def test_estimated_size_is_within_the_limit(preset):
    import torch

    cfg = T.resolve_config({"PRESET": preset})
    with torch.device("meta"):
        model = T.GPT(cfg.model)
    assert T.estimate_bytes(model, cfg.quant) < T.SIZE_LIMIT_BYTES


@pytest.mark.parametrize(
    "environment,world,message",
    [
        ({"TRAIN_BATCH_TOKENS": "1000", "TRAIN_SEQ_LEN": "64"}, 1, "960 or 1024 would be"),
        ({"TRAIN_BATCH_TOKENS": "512", "TRAIN_SEQ_LEN": "64"}, 3, "times 3 rank(s); 384 or 576 would be"),
        ({"TRAIN_BATCH_TOKENS": "512", "TRAIN_SEQ_LEN": "64", "MICRO_BATCH_TOKENS": "192"}, 1, "sizes that do: 64, 128, 256, 512"),
        ({"TRAIN_BATCH_TOKENS_PER_GPU": "100", "TRAIN_SEQ_LEN": "64"}, 2, "64 or 128 would be"),
        ({"TRAIN_BATCH_TOKENS": "1024", "TRAIN_SEQ_LEN": "64", "TRAIN_ROW_TOKENS": "768", "DOCUMENT_MASK": "1"}, 1, "TRAIN_ROW_TOKENS=768"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_sizes_that_would(environment, world, message):
    with pytest.raises(T.UserError, match=re.escape(message)):
        T.plan_batch(T.resolve_config(environment).train, T.RunContext(world_size=world))


def test_accumulation_is_derived():
    cfg = T.resolve_config({"TRAIN_BATCH_TOKENS": "4096", "TRAIN_SEQ_LEN": "64", "MICRO_BATCH_TOKENS": "256"})
    plan = T.plan_batch(cfg.train, T.RunContext(world_size=2))
    assert (plan.sequences, plan.per_rank, plan.per_micro, plan.accumulation) == (64, 32, 4, 8)
    cfg = T.resolve_config({"TRAIN_BATCH_TOKENS_PER_GPU": "4096", "TRAIN_SEQ_LEN": "64"})
    assert T.plan_batch(cfg.train, T.RunContext(world_size=8)).sequences == 512


@pytest.mark.parametrize("preset,tokens", [("frontier", 98304), ("frontier/one_gpu", 65536)])
def test_a_preset_with_rows_of_documents_runs_on_any_number_of_gpus(preset, tokens):
    """A row is as long as the preset says where every rank gets one, else a rank's share of the step."""
    cfg = T.resolve_config({"PRESET": preset}).train
    for world in (1, 2, 4, 8, 16):
        for length, _ in cfg.sequence_lengths:
            plan = T.plan_batch(cfg, T.RunContext(world_size=world), length)
            assert plan.tokens == cfg.train_batch_tokens and plan.seq_len == length
            assert plan.row_tokens == min(tokens, cfg.train_batch_tokens // world)
    with pytest.raises(T.UserError, match=r"TRAIN_ROW_TOKENS=.* times 7 rank"):
        T.plan_batch(cfg, T.RunContext(world_size=7))
    assert T.plan_batch(dataclasses.replace(cfg, train_batch_tokens_per_gpu=12288), T.RunContext(world_size=7)).row_tokens == 12288


def test_sequence_lengths_follow_the_budget():
    cfg = T.resolve_config({"TRAIN_SEQ_SCHEDULE": "64@0.1,128@0.5", "TRAIN_SEQ_LEN": "256", "NUM_LOOPS": "1", "LOOP_END": "1"})
    assert [T.sequence_length(cfg.train, p) for p in (0, 0.09, 0.1, 0.49, 0.5, 1)] == [64, 64, 128, 128, 256, 256]
    assert T.training_graphs(cfg) == [(64, False), (128, False), (128, True), (256, True)]  # recurrence from 0.35 on
    assert cfg.replace(train_seq_schedule="64@0.1,128@0.5,256@1").train.sequence_lengths == cfg.train.sequence_lengths
    assert T.training_graphs(T.resolve_config({})) == [(1024, False)]
    risen = cfg.replace(train_seq_rewarmup_frac=0.02, warmdown_frac=0.0)
    assert [T.lr_scale(risen.train, p) for p in (0, 0.05, 0.1, 0.12, 0.5, 0.9)] == pytest.approx([1, 1, 0, 1, 0, 1])
    assert T.lr_scale(risen.train, 0.11) == pytest.approx(0.5)


def test_schedules():
    cfg = T.resolve_config({"WARMDOWN_FRAC": "0.5", "MIN_LR": "0.1", "MUON_MOMENTUM_WARMUP_FRAC": "0.2"})
    assert [round(T.lr_scale(cfg.train, p), 3) for p in (0, 0.5, 0.75, 0.96, 1, 1.2)] == [1, 1, 0.5, 0.1, 0.1, 0.1]
    assert T.muon_momentum(cfg.train, 0.1) == pytest.approx((0.85 + 0.95) / 2) and T.muon_momentum(cfg.train, 0.9) == pytest.approx(0.95)
    cooled = cfg.replace(muon_momentum_cooldown_frac=0.1)
    assert T.muon_momentum(cooled.train, 0.9) == pytest.approx(0.95) and T.muon_momentum(cooled.train, 0.95) == pytest.approx(
        (0.85 + 0.95) / 2
    )
    assert T.muon_momentum(cooled.train, 1.1) == pytest.approx(0.85)
    tapered = cfg.replace(muon_wd_taper_start=0.7, muon_wd_taper_end=0.5)
    assert [T.wd_scale(tapered.train, p) for p in (0, 0.7, 0.85, 1, 1.2)] == pytest.approx([1, 1, 0.75, 0.5, 0.5])
    assert T.wd_scale(cfg.train, 1.0) == 1
    late = T.resolve_config({"LATE_QAT_THRESHOLD": "0.15", "WARMDOWN_FRAC": "0.5"})
    assert not T.qat_active(late.train, 0.9) and T.qat_active(late.train, 0.93)
    last = T.resolve_config({"QAT_LAST_FRAC": "0.05", "MIN_LR": "0.1"})
    assert not T.qat_active(last.train, 0.94) and T.qat_active(last.train, 0.95)


@pytest.mark.parametrize("steps", [60, 4900])
def test_ema_keeps_its_share_of_a_run_of_any_length(steps):
    cfg = T.resolve_config({"EMA_DECAY": "0.997", "REFERENCE_STEPS": "4900"})
    weight_of_first_half = 1.0
    for _ in range(steps // 2):
        weight_of_first_half *= T.ema_decay(cfg.train, 1 / steps)
    assert weight_of_first_half == pytest.approx(0.997**2450, rel=1e-6)
    assert T.ema_decay(cfg.train, 1 / 4900) == pytest.approx(0.997)


def test_progress_follows_whichever_budget_ends_first():
    cfg = T.resolve_config({"MAX_WALLCLOCK_SECONDS": "110", "GPTQ_RESERVE_SECONDS": "10", "ITERATIONS": "1000"})
    assert T.training_progress(cfg.train, 100, 50) == 0.5 and T.training_progress(cfg.train, 900, 50) == 0.9
    assert T.training_progress(cfg.replace(max_wallclock_seconds=0, gptq_reserve_seconds=0).train, 100, 5000) == 0.1


def test_a_run_too_short_for_its_constants_is_warned_about():
    cfg = T.resolve_config({"EMA_DECAY": "0.99", "NUM_LOOPS": "1", "LOOP_END": "1"})
    text = " ".join(T.length_warnings(cfg, 12))
    for part in ("12 steps fit the budget", "EMA averages over 0.2 steps", "MUON_MOMENTUM_WARMUP_FRAC", "depth recurrence"):
        assert part in text
    assert T.length_warnings(T.resolve_config({}), 4900) == []
    assert "disagree" in " ".join(T.length_warnings(T.resolve_config({"EMA_DECAY": "0.9995"}), 4900))


def test_attention_plan_says_why_not():
    import torch

    cfg, cpu = T.resolve_config({}), torch.device("cpu")
    plan = T.plan_kernels(cfg, cpu, compiled=False)
    assert (plan.full, plan.windowed) == ("flash", "plain") and any("fa3: needs a Hopper GPU" in reason for reason in plan.refused)
    assert T.plan_kernels(cfg.replace(document_mask=True), cpu, False).full == "plain"
    assert T.plan_kernels(cfg.replace(attention_backend="plain"), cpu, False).full == "plain"
    for backend in ("fa3", "cudnn"):
        with pytest.raises(T.UserError, match=f"ATTENTION_BACKEND={backend}"):
            T.plan_kernels(cfg.replace(attention_backend=backend), cpu, False)


def test_every_compiler_keeps_its_work_in_one_folder(monkeypatch, tmp_path):
    """CACHE_DIR, or a variable that was set for one of them; whoever is shut off from both keeps to the folder it may write to."""

    def caches(**environment: str) -> dict[str, str]:
        monkeypatch.setattr(os, "environ", environment)
        T.keep_compiled(str(tmp_path / "cache"))
        return {name: value for name, value in os.environ.items() if name.endswith("_CACHE_DIR")}

    kept = caches(TRITON_CACHE_DIR="elsewhere")
    assert kept.keys() >= {"TORCHINDUCTOR_CACHE_DIR", "TILELANG_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"}
    assert kept.pop("TRITON_CACHE_DIR") == "elsewhere" and all(Path(path).parent == tmp_path / "cache" for path in kept.values())
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1", "it keeps nothing unless asked"
    assert set(caches(**own_caches("scratch")).values()) == {"scratch"}


def test_gdn_backend_on_the_cpu():
    import torch

    assert T.choose_gdn_backend(T.RunConfig(), torch.device("cpu")) == "torch"
    with pytest.raises(T.UserError, match="needs a CUDA device"):
        T.choose_gdn_backend(T.RunConfig(gdn_backend="fla"), torch.device("cpu"))


@pytest.mark.parametrize(
    "triton,capability,tilelang,refused",
    [("3.6.0", (9, 0), False, True), ("3.7.0", (9, 0), False, True), ("3.7.1", (9, 0), False, False), ("3.6.0", (9, 0), True, False),
     ("3.6.0", (8, 0), False, False), ("3.3.1", (9, 0), False, False)],
)  # fmt: skip
def test_the_miscompiling_triton_is_refused_on_hopper(monkeypatch, triton, capability, tilelang, refused):
    import sys
    from types import SimpleNamespace

    import torch

    faults = {T.fla_functions: "", T._fla_tilelang: "" if tilelang else "it needs nvcc"}
    monkeypatch.setattr(T.kernels, "missing", faults.get)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cfg, device = T.resolve_config({}), torch.device("cuda")
    if refused:
        with pytest.raises(T.UserError, match=r"install triton>=3\.7\.1, or tilelang \(it needs nvcc"):
            T.choose_gdn_backend(cfg.run, device)
    else:
        assert T.choose_gdn_backend(cfg.run, device) == "fla"
    faults[T.fla_functions] = "no module"
    with pytest.raises(T.UserError, match="needs flash-linear-attention"):
        T.choose_gdn_backend(cfg.run, device)

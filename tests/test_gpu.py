"""What only a CUDA device can show: kernels against their naive twins, the compiled model against the eager one. `make test-gpu`."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

import train_gpt as T
from parts import kernels
from parts.adapters import repeatable_gradients
from parts.document_ttt import DocumentTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DEVICE = torch.device("cuda")


def relative_error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12)).item()


def gradients(function, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, device=DEVICE, dtype=torch.float32).to(out.dtype))
    return [out.detach()] + [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("heads", [(8, 8), (2, 4)])
@pytest.mark.parametrize("length", [257, 1024])
def test_fla_matches_the_recurrence(heads, length):
    """Through our custom op, in bf16: outputs and every gradient within 1.5 % of the float32 recurrence."""
    pytest.importorskip("fla")
    torch.manual_seed(0)
    qk_heads, v_heads = heads
    q, k = (F.normalize(torch.randn(2, length, qk_heads, 64, device=DEVICE), dim=-1) for _ in range(2))
    v = torch.randn(2, length, v_heads, 64, device=DEVICE)
    g, beta = -torch.rand(2, length, v_heads, device=DEVICE) * 0.5, torch.rand(2, length, v_heads, device=DEVICE)
    halved = [x.bfloat16() for x in (q, k, v)]
    ours = gradients(lambda q, k, v, g, b: T.gated_delta_rule(q, k, v, g, b, backend="fla")[0], [*halved, g, beta])
    twin = gradients(lambda q, k, v, g, b: T.naive_gated_delta_rule(q, k, v, g, b)[0], [*[x.float() for x in halved], g, beta])
    for name, a, b in zip(("o", "dq", "dk", "dv", "dg", "dbeta"), ours, twin):
        error = relative_error(a, b)
        print(f"fla heads {heads} length {length} {name}: {error:.2%}")
        assert error < 0.015, f"{name}: {error:.2%}"


def attention_case(case):
    """(settings, kind of layer) of a case."""
    cfg = T.resolve_config({**TINY, "DOCUMENT_MASK": str(int(case == "documents")), "ATTN_SINK": str(int("sink" in case))})
    return cfg, "windowed" if "window" in case else "full"


MASKED = ("fa4", "flex", "plain")  # kernels that take documents, or a sink outside the window
ANY = ("fa4", "fa3", "fa2", "cudnn", "flash", "flex", "plain")
SERVED = {"full": ANY, "sink": ANY, "window": ("fa4", "fa3", "fa2", "flex", "plain"), "window+sink": MASKED, "documents": MASKED}


@pytest.mark.parametrize("backend,case", [(backend, case) for case, backends in SERVED.items() for backend in backends])
def test_attention_backends_match_naive(backend, case):
    """Every kernel in every case that it serves. Skipped: kernels that need another GPU or a package that is not there."""
    cfg, kind = attention_case(case)
    try:
        plan = T.plan_kernels(cfg.replace(attention_backend=backend), DEVICE, compiled=True)
    except T.UserError as error:
        pytest.skip(str(error))
    assert getattr(plan, kind) == backend
    torch.manual_seed(0)
    length, window = 515, 100 if "window" in case else 0
    shapes = [(2, length, 8, 64), (2, length, 4, 64), (2, length, 4, 64)]
    inputs = [torch.randn(shape, device=DEVICE).bfloat16() for shape in shapes]
    inputs += [torch.randn(4, 64, device=DEVICE).bfloat16()] if "sink" in case else []
    begins = torch.rand(2, length, device=DEVICE) < 0.02
    documents = begins.int().cumsum(1) if case == "documents" else None
    boundaries = kernels.document_boundaries(begins) if case == "documents" and backend == "fa4" else None
    how = {"window": window, "documents": documents}

    def ours(q, k, v, sink=None):
        return T.attention(q, k, v, sink=sink, backend=backend, boundaries=boundaries, **how)

    def twin(q, k, v, sink=None):
        return T.naive_attention(q, k, v, sink=sink, **how)

    forward = torch.compile(ours, fullgraph=True, dynamic=False) if backend == "flex" else ours
    for a, b in zip(gradients(forward, inputs), gradients(twin, [x.float() for x in inputs])):
        assert relative_error(a, b) < 0.015


@pytest.mark.parametrize("preset", ["gdn_hybrid", "gdn3_fa8", "legal_ttt", "token_shift", "ngram_hedge"])
def test_compiled_model_matches_eager_float32(preset):
    """Two layers' worth of each preset, compiled in bf16, against the same weights run eagerly in float32 on the CPU."""
    small = {"MODEL_DIM": "128", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "GDN_QK_HEADS": "2", "GDN_V_HEADS": "2", "WINDOW_SIZE": "64"}
    cfg = T.resolve_config({"PRESET": preset, **small, "VOCAB_SIZE": "1024"})
    model, reference = T.build_model(cfg, DEVICE), T.build_model(cfg.replace(device="cpu"))
    torch.manual_seed(2)
    with torch.no_grad():
        for a, b in zip(model.parameters(), reference.parameters()):
            b.add_(torch.randn_like(b) * 0.02)
            a.copy_(b)
    forward = T.maybe_compile(model, cfg.run)
    ids = torch.randint(0, 1024, (2, 200))
    for looping in {False, bool(cfg.model.num_loops)}:
        model.looping = reference.looping = looping
        with torch.no_grad():
            ours, twin = forward(ids.cuda()).cpu(), reference(ids)
        assert (ours - twin).abs().mean() < 0.03 * twin.abs().mean() + 0.01


def test_training_steps_compile_two_graphs_at_most():
    """No recompilation per layer index, step or batch: the forward is traced once a graph."""
    from torch._dynamo.utils import counters

    small = {"MODEL_DIM": "128", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "VOCAB_SIZE": "1024"}
    cfg = T.resolve_config({"PRESET": "gdn3_fa8", "COMPILE": "whole", **small})
    torch._dynamo.reset()
    counters.clear()
    model = T.build_model(cfg, DEVICE)
    forward = T.maybe_compile(model, cfg.run)
    for step in range(8):
        model.looping = step >= 4
        ids = torch.randint(0, 1024, (2, 257), device=DEVICE)
        forward(ids[:, :-1], ids[:, 1:]).backward()
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def small_model(preset):
    """(model, configuration) of a preset at small width, every path carrying signal."""
    small = {"MODEL_DIM": "128", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "GDN_QK_HEADS": "2", "GDN_V_HEADS": "2", "WINDOW_SIZE": "64"}
    cfg = T.resolve_config({"PRESET": preset, **small, "VOCAB_SIZE": "1024", "TTT_MODE": "document", "TTT_DOC_LANES": "4"})
    model = T.build_model(cfg, DEVICE).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            if not param.any():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.05)
    model.looping = True
    return model, cfg


@pytest.mark.parametrize("preset", ["frontier", "legal_ttt", "token_shift", "gdn_hybrid"])  # the last one tunes its kernels for minutes
def test_documents_read_and_learned_from_by_recorded_graphs_are_those_of_the_eager_loop(preset):
    model, cfg = small_model(preset)
    cfg = cfg.replace(ttt_doc_chunks="8@16,24", ttt_doc_lr=3e-3, ttt_doc_rank=8)
    generator = torch.Generator().manual_seed(1)
    batches = [
        [torch.randint(2, 1024, (n,), generator=generator, dtype=torch.int32) for n in lengths] for lengths in ([90, 70, 70, 9], [55, 30])
    ]
    seen = {}
    with repeatable_gradients(DEVICE):
        for rate in (3e-3, 0.0):
            for graphs in (True, False):
                trainer = DocumentTrainer(model, cfg.replace(ttt_doc_lr=rate).eval, 0, 64, DEVICE, graphs)
                documents = [[document.to(DEVICE).long() for document in batch] for batch in [*batches, batches[0]]]
                seen[rate, graphs] = [[logits.clone() for _, logits in trainer.read(batch)] for batch in documents]
                first, _, again = seen[rate, graphs]
                assert all(torch.equal(a, b) for a, b in zip(first, again)), "what other documents taught has to be forgotten"
        for recorded, eager in zip(seen[3e-3, True], seen[3e-3, False]):
            assert all(relative_error(a, b) < 2e-3 for a, b in zip(recorded, eager))
    assert relative_error(seen[3e-3, True][0][-1][0], seen[0.0, True][0][-1][0]) > 0.01, "nothing was learned"

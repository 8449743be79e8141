"""The model: causality, document boundaries, state, each part against a naive twin, the parameter table."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from test_ops import assert_same_with_gradients

import train_gpt as T

EVERYTHING = {**TINY, "LAYER_PATTERN": "GSTAAG", "NUM_LOOPS": "2", "LOOP_START": "2", "LOOP_END": "3", "UNET_SKIPS": "1", "ATTN_SINK": "1"}
EVERYTHING |= {
    "PARALLEL_START": "4",
    "ATTN_GATE_WIDTH": "6",
    "VE_LAYERS": "3-4",
    "VE_DIM": "8",
    "SHARED_LAYERS": "0,5",
    "LOOP_LN_SCALE": "0.6",
}


FRONTIER = {"PARALLEL_LANES": 2, "SMEAR_FORM": "lambda", "ATTN_GATE_SCALE": 0.5, "ATTN_GATE_MAX": 1}


def make(environment, looping=True, **settings):
    """A model in which every parameter matters: zero-initialised ones are filled, so that no path is cut off."""
    cfg = T.resolve_config({**environment, **{name: str(value) for name, value in settings.items()}})
    model = T.build_model(cfg)
    T.attach_fake_quantize(model, cfg)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.abs().max() == 0 or ".lane_" in name:  # the lanes' ones would hide an exchange of their indices
                param.normal_(std=0.3)
    model.looping = looping
    return model


def tokens(length, batch=1, seed=0, starts=()):
    torch.manual_seed(seed)
    ids = torch.randint(3, 512, (batch, length))
    ids[:, list(starts)] = T.BOS_ID
    return ids


VARIANTS = {
    "everything": {},
    "attention": {"LAYER_PATTERN": "AA", "SHARED_LAYERS": "", "NUM_LOOPS": 0, "VE_LAYERS": "", "PARALLEL_START": -1},
    "gdn form B": {"LAYER_PATTERN": "GGA", "GDN_QK_HEADS": 1, "GDN_V_HEADS": 2, "GDN_CONV_SIZE": 2, "GDN_FEATURE_MAP": "elu1",
                   "GDN_OUTPUT_NORM": 0, "SHARED_LAYERS": "", "NUM_LOOPS": 0, "VE_LAYERS": "", "PARALLEL_START": -1},
    "documents": {"DOCUMENT_MASK": 1},
    "frontier": FRONTIER,
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_changing_a_token_leaves_every_earlier_logit_alone(variant):
    model, ids = make(EVERYTHING, **VARIANTS[variant]), tokens(150, starts=(0, 40, 90))
    with torch.no_grad():
        before = model(ids)
        for position in (1, 40, 64, 90, 127, 128, 149):  # document starts and GDN chunk edges among them
            changed = ids.clone()
            changed[0, position] = 2 + (ids[0, position] + 7) % 500
            after = model(changed)
            assert torch.equal(after[:, :position], before[:, :position]), f"token {position} leaks into the past"
            assert not torch.equal(after[:, position], before[:, position])


@pytest.mark.parametrize("parts", [{}, FRONTIER], ids=["cards", "frontier"])
def test_documents_are_independent_under_the_mask(parts):
    model = make(EVERYTHING, DOCUMENT_MASK=1, **parts)
    ids, changed = tokens(100, starts=(0, 37)), tokens(100, seed=1, starts=(0,))
    changed[:, 37:] = ids[:, 37:]
    with torch.no_grad():
        a, b = model(ids)[:, 37:], model(changed)[:, 37:]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        unmasked = make(EVERYTHING)
        assert (unmasked(ids)[:, 37:] - unmasked(changed)[:, 37:]).abs().max() > 1e-2


def test_a_row_of_documents_is_each_piece_alone():
    """Documents are cut every `span` of their tokens, and no mixer, shift, hash or convolution sees over a cut or a BOS."""
    model, ids = make(EVERYTHING, DOCUMENT_MASK=1, **FRONTIER), tokens(131, starts=(0, 40, 41, 100))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    pieces = [(0, 16), (16, 32), (32, 40), (40, 41), (41, 57), (57, 73), (73, 89), (89, 100), (100, 116), (116, 130)]
    with torch.no_grad():
        row = model(inputs, targets, reduction="none", span=16)
        alone = [model(inputs[:, a:b], targets[:, a:b], reduction="none") for a, b in pieces]
    torch.testing.assert_close(row, torch.cat(alone, 1), rtol=1e-3, atol=1e-3)  # GDN sums decays of -50 over the cuts of a chunk
    starts = T.document_starts(ids, 16)[0].nonzero().flatten().tolist()
    assert starts == [a for a, _ in pieces] and T.document_starts(ids)[0].nonzero().flatten().tolist() == [0, 40, 41, 100]


@pytest.mark.parametrize("part", ["smear", "lambda smear", "bigram", "shift", "conv"])
def test_neighbours_of_another_document_are_never_seen(part):
    """Smear, hash, token shift and convolution stop at a BOS even without the document mask."""
    model = make(EVERYTHING, SMEAR_FORM="lambda" if part == "lambda smear" else "lerp")
    ids, changed = tokens(20, starts=(0, 11)), tokens(20, seed=1, starts=(0,))
    changed[:, 11:] = ids[:, 11:]
    outputs = []
    torch.manual_seed(2)
    stream, other = torch.randn(1, 20, 32), torch.randn(1, 20, 32)
    other[:, 11:] = stream[:, 11:]
    for batch, x in ((ids, stream), (changed, other)):
        ctx, previous = model._context(batch, None, None)
        if part.endswith("smear"):
            outputs.append(model.smear(x, ctx))
        elif part == "bigram":
            outputs.append(model.bigram(batch, previous, ctx.continues, torch.float32))
        elif part == "shift":
            outputs.append(model.blocks[2].mixer(x, ctx))
        else:
            outputs.append(torch.cat(ctx.shifted(x, 3, "conv"), -1))
    assert torch.equal(outputs[0][:, 11:], outputs[1][:, 11:])
    assert not torch.equal(outputs[0][:, :11], outputs[1][:, :11])


@pytest.mark.parametrize("documents", [0, 1])
@pytest.mark.parametrize("looping", [False, True])
def test_stream_in_pieces_equals_one_forward(documents, looping):
    model, ids = (
        make(EVERYTHING, looping=looping, DOCUMENT_MASK=documents, **(FRONTIER if looping else {})),
        tokens(120, batch=2, starts=(0, 30, 75)),
    )
    state, pieces = T.DecodeState(2, 120, piece=44), []
    with torch.no_grad():
        for first, last in ((0, 1), (1, 2), (2, 33), (33, 74), (74, 76), (76, 120)):
            if first == 33:
                state = state.clone()  # a saved state goes on like the original
            pieces.append(model(ids[:, first:last], state=state))
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids), rtol=2e-4, atol=2e-4)
    window_layer = state.slots[(1, "k")]
    assert window_layer.size(2) == 15 + 44, "a windowed layer keeps its window's keys only"


def test_score_last_and_reductions_agree():
    model, ids = make(EVERYTHING), tokens(41, batch=3)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        each = model(inputs, targets, reduction="none")
        by_hand = -F.log_softmax(model(inputs), -1).gather(-1, targets[..., None])[..., 0]
        torch.testing.assert_close(each, by_hand)
        torch.testing.assert_close(model(inputs, targets), each.mean())
        torch.testing.assert_close(model(inputs, targets, reduction="none", score_last=7), each[:, -7:])


def test_softcap_bounds_the_logits():
    model = make(EVERYTHING, LOGIT_SOFTCAP=3)
    with torch.no_grad():
        model.tok_emb.weight.mul_(1000)
        assert model(tokens(9)).abs().max() <= 3


# --- parts against their twins


def context(model, ids):
    return model._context(ids, None, None)


def test_token_shift_matches_a_loop():
    model, ids = make(EVERYTHING), tokens(13, batch=2, starts=(0, 6))
    mixer = model.blocks[2].mixer
    weights = [mixer.mu_r, mixer.mu_k, mixer.w_r.weight, mixer.w_k.weight, mixer.w_v.weight]

    def loop(x, mu_r, mu_k, w_r, w_k, w_v):
        rows = []
        for t in range(x.size(1)):
            before = torch.zeros_like(x[:, 0]) if t in (0, 6) else x[:, t - 1]
            xr = mu_r.sigmoid() * x[:, t] + (1 - mu_r.sigmoid()) * before
            xk = mu_k.sigmoid() * x[:, t] + (1 - mu_k.sigmoid()) * before
            rows.append((xr @ w_r.T).sigmoid() * ((xk @ w_k.T).relu() ** 2 @ w_v.T))
        return torch.stack(rows, 1)

    def ours(x, *params):
        names = ["mu_r", "mu_k", "w_r.weight", "w_k.weight", "w_v.weight"]
        return torch.func.functional_call(mixer, dict(zip(names, params)), (x, context(model, ids)[0]))

    torch.manual_seed(0)
    assert_same_with_gradients(ours, loop, [torch.randn(2, 13, 32), *[w.detach() for w in weights]])


def test_smear_gate_matches_a_loop():
    model, ids = make(EVERYTHING), tokens(11, starts=(4,))

    def loop(x, gate):
        rows = []
        for t in range(11):
            weight = gate.sigmoid() if t not in (0, 4) else torch.zeros_like(gate)
            rows.append((1 - weight) * x[:, t] + weight * x[:, max(0, t - 1)])
        return torch.stack(rows, 1)

    ours = lambda x, gate: torch.func.functional_call(model.smear, {"gate": gate}, (x, context(model, ids)[0]))
    torch.manual_seed(0)
    assert_same_with_gradients(ours, loop, [torch.randn(1, 11, 32), torch.randn(32)])


def test_lambda_smear_gate_matches_a_loop():
    model, ids = make(EVERYTHING, SMEAR_FORM="lambda"), tokens(11, starts=(4,))

    def loop(x, gate, scale):
        rows = [x[:, t] + scale * (gate @ x[0, t, :12]).sigmoid() * (x[:, t - 1] if t not in (0, 4) else 0) for t in range(11)]
        return torch.stack(rows, 1)

    def ours(x, gate, scale):
        return torch.func.functional_call(model.smear, {"gate": gate, "scale": scale}, (x, context(model, ids)[0]))

    torch.manual_seed(0)
    assert_same_with_gradients(ours, loop, [torch.randn(1, 11, 32), torch.randn(12), torch.tensor(0.7)])


def test_hash_embedding_matches_a_loop():
    model, ids = make(EVERYTHING), tokens(17, starts=(0, 8))
    ctx, previous = context(model, ids)
    row, buckets = ids[0].tolist(), 128

    def loop(table, proj, scale):
        out = []
        for t, token in enumerate(row):
            known = 0 if t in (0, 8) else 1 if t in (1, 9) else 2
            bigram = ((36313 * token) ^ (27191 * row[t - 1])) % (buckets - 1) if known >= 1 else buckets - 1
            trigram = ((36313 * token) ^ (27191 * row[t - 1]) ^ (51497 * row[t - 2])) % (buckets - 1) if known >= 2 else buckets - 1
            out.append((table[bigram] + table[trigram]) @ proj.T * scale)
        return torch.stack(out)[None]

    def ours(table, proj, scale):
        params = {"table.weight": table, "proj.weight": proj, "scale": scale}
        return torch.func.functional_call(model.bigram, params, (ids, previous, ctx.continues, torch.float32))

    torch.manual_seed(0)
    assert_same_with_gradients(ours, loop, [torch.randn(128, 16), torch.randn(32, 16), torch.tensor(0.7)])


@pytest.mark.parametrize("form", ["A", "B"])
def test_gated_delta_net_matches_a_loop(form):
    """The whole mixer (convolution, feature maps, gates, norm) against position-by-position code."""
    settings = VARIANTS["gdn form B"] if form == "B" else {"LAYER_PATTERN": "G", "VE_LAYERS": "", "SHARED_LAYERS": "", "NUM_LOOPS": 0}
    settings = {**settings, "PARALLEL_START": -1, "XSA_LAYERS": ""}
    model, ids = make({**EVERYTHING, "LAYER_PATTERN": "G"}, **{**settings, "LAYER_PATTERN": "G"}), tokens(10, starts=(0, 5))
    mixer = model.blocks[0].mixer
    names = [name for name, _ in mixer.named_parameters()]
    qk, vh, dim, taps = mixer.qk_heads, mixer.v_heads, mixer.head_dim, mixer.taps

    def loop(x, *params):
        p = dict(zip(names, params))
        raw = torch.cat([x @ p[f"{n}_proj.weight"].T for n in "qkv"], -1)
        conv = []
        for t in range(x.size(1)):
            start = 5 if t >= 5 else 0
            conv.append(sum(raw[:, t - n] * p["conv"][:, 0, taps - 1 - n] for n in range(taps) if t - n >= start))
        q, k, v = torch.stack(conv, 1).split((qk * dim, qk * dim, vh * dim), -1)
        feature = F.silu if form == "A" else lambda y: F.elu(y) + 1
        q, k = (F.normalize(feature(y).unflatten(-1, (qk, dim)), dim=-1) for y in (q, k))
        beta = (x @ p["b_proj.weight"].T).sigmoid()
        g = -p["A_log"].exp() * F.softplus(x @ p["a_proj.weight"].T + p["dt_bias"])
        o, _ = T.naive_gated_delta_rule(q, k, F.silu(v).unflatten(-1, (vh, dim)), g, beta)
        if form == "A":
            o = o / (o.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
        return (o.flatten(-2) * F.silu(x @ p["g_proj.weight"].T)) @ p["o_proj.weight"].T

    ours = lambda x, *params: torch.func.functional_call(mixer, dict(zip(names, params)), (x, context(model, ids)[0]))
    torch.manual_seed(0)
    inputs = [torch.randn(1, 10, 32), *[param.detach() for param in mixer.parameters()]]
    assert_same_with_gradients(ours, loop, inputs, tolerance=1e-3)


@pytest.mark.parametrize("gate", [(1, 2), (0.5, 1)], ids=["double", "sparse"])
def test_attention_layer_matches_a_loop(gate):
    """QK norm, gain, partial RoPE, value embedding, sink, XSA and output gate, head by head."""
    gate_scale, gate_max = gate
    model, ids = make(EVERYTHING, ATTN_GATE_SCALE=gate_scale, ATTN_GATE_MAX=gate_max), tokens(9)
    mixer = model.blocks[3].mixer
    names = [name for name, _ in mixer.named_parameters()]
    ve = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(4))

    def rope(x):  # [B,T,D], the first 4 of 8 dims
        out = x.clone()
        for t in range(x.size(1)):
            for pair in range(2):
                angle = t * 10000 ** (-2 * pair / 4)
                a, b = x[:, t, pair], x[:, t, pair + 2]
                out[:, t, pair] = a * math.cos(angle) + b * math.sin(angle)
                out[:, t, pair + 2] = b * math.cos(angle) - a * math.sin(angle)
        return out

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def loop(x, *params):
        p = dict(zip(names, params))
        q, k = (x @ p["c_q.weight"].T).unflatten(-1, (4, 8)), (x @ p["c_k.weight"].T).unflatten(-1, (2, 8))
        v = (x @ p["c_v.weight"].T + 0.1 * p["ve_scale"] * ve).unflatten(-1, (2, 8))
        heads = []
        for h in range(4):
            qh, kh, vh = rope(norm(q[:, :, h])) * p["q_gain"][h], rope(norm(k[:, :, h // 2])), v[:, :, h // 2]
            scores = (qh @ kh.mT / math.sqrt(8)).masked_fill(~torch.ones(9, 9).tril().bool(), -math.inf)
            sink = (qh * p["sink"][h // 2]).sum(-1, keepdim=True) / math.sqrt(8)
            o = torch.cat((sink, scores), -1).softmax(-1)[..., 1:] @ vh
            unit = vh / vh.norm(dim=-1, keepdim=True)
            o = o - (o * unit).sum(-1, keepdim=True) * unit
            heads.append(o * gate_max * (gate_scale * (x[..., :6] @ p["gate"][h])).sigmoid()[..., None])
        return torch.cat(heads, -1) @ p["proj.weight"].T

    def ours(x, *params):
        ctx, _ = context(model, ids)
        ctx.value_embedding = ve
        return torch.func.functional_call(mixer, dict(zip(names, params)), (x, ctx))

    torch.manual_seed(0)
    assert_same_with_gradients(ours, loop, [torch.randn(1, 9, 32), *[param.detach() for param in mixer.parameters()]], tolerance=1e-3)


# --- depth, sharing, switches


def test_layer_order_is_the_cards():
    loops = {"LAYER_PATTERN": "A" * 11, "NUM_LOOPS": "2", "LOOP_START": "3", "LOOP_END": "5", "UNET_SKIPS": "1"}
    model = T.GPT(T.resolve_config({**TINY, **loops}).model)
    assert model.layer_order(False) == list(range(11))
    assert model.layer_order(True) == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert len(model.skip_weights) == 8


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("looping", [False, True])
def test_forward_matches_a_straight_line_reading(looping, lanes):
    """Residual mixing, LN scale, parallel residuals in one lane and in two, U-Net skips and recurrence, written out call by call."""
    model, ids = make(EVERYTHING, looping=looping, **(FRONTIER if lanes == 2 else {})), tokens(21)
    ctx, previous = context(model, ids)
    ctx.call = -1
    norm = T.rms_norm
    x0 = model.tok_emb(ids) + model.bigram(ids, previous, ctx.continues, torch.float32)
    x0 = norm(model.smear(x0, ctx)) if lanes == 2 else model.smear(norm(x0), ctx)
    ctx.value_embedding = model.value_embed(ids, torch.float32)
    order = [0, 1, 2, 3, 2, 3, 2, 3, 4, 5] if looping else [0, 1, 2, 3, 4, 5]
    x, other, stack, half = x0, None, [], len(order) // 2
    for call, layer in enumerate(order):
        other = x if lanes == 2 and layer == 4 else other  # the lanes part here, before the skip, which enters the first one only
        if call >= half and stack:
            gate = model.skip_gates[call - half].sigmoid()
            x = (1 - gate) * model.skip_weights[call - half] * stack.pop() + gate * x
        block, scale = model.blocks[layer], (layer + 1) ** -0.5 * (0.6 if looping and layer in (2, 3) else 1)
        x_in = block.resid_mix[0] * x + block.resid_mix[1] * x0
        mixed = block.mixer_scale * block.mixer(norm(x_in) * scale, ctx)
        mlp_input = other if other is not None else x_in if layer >= 4 else x_in + mixed
        hidden = F.leaky_relu(norm(mlp_input) * scale @ block.mlp.fc.weight.T, 0.5) ** 2
        hidden = block.mlp_scale * (hidden @ block.mlp.proj.weight.T)
        if other is None:
            x = x_in + mixed + hidden
        else:
            r, p = block.lane_keep, block.lane_write
            x, other = r[0] * x + p[0, 0] * mixed + p[1, 0] * hidden, r[1] * other + p[0, 1] * mixed + p[1, 1] * hidden
        if call < half:
            stack.append(x)
    x = x if other is None else (x + other) / 2
    expected = 30 * torch.tanh(norm(x) @ model.tok_emb.weight.T / 30)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)


def test_shared_layers_hold_one_set_of_weights():
    model = make(EVERYTHING)
    assert model.blocks[0].mixer is model.blocks[5].mixer
    assert model.blocks[0].mlp is not model.blocks[5].mlp
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.startswith("blocks.5.mixer.") for name in names)
    assert sum(p.numel() for p in model.parameters()) == T.count_params(model)


@pytest.mark.parametrize("mode", ["fake", "noise"])
@pytest.mark.parametrize("compiled", [False, True])
def test_qat_switch_changes_the_output(mode, compiled):
    """The classic dead code is a Python flag folded into the graph: the switch must act on a forward already compiled."""
    qat = {"LATE_QAT_THRESHOLD": 0.5, "QAT_MODE": mode, "QAT_BITS": 3, "QAT_TARGETS": "mlp|mixer", "QAT_NOISE_SCALE": 2}
    model = make(TINY, looping=False, **qat, **({"LAYER_PATTERN": "TA"} if compiled else {}))  # half the layers compile in half the time
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    ids, switches = tokens(16), [m for m in model.modules() if isinstance(m, T.FakeQuantize)]
    assert len(switches) > 10
    with torch.no_grad():
        off, again = forward(ids), forward(ids)
        for switch in switches:
            switch.strength.fill_(1)
        on = forward(ids)
    assert torch.equal(off, again) and (on - off).abs().max() > 1e-3


def test_fake_quantize_passes_gradients_through():
    layer = T.FakeQuantize(4, 10.0, "fake", 0.05)
    layer.strength.fill_(1)
    weight = torch.randn(6, 9, requires_grad=True)
    out = layer(weight)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    step = 10.0 / 7 * weight.std(dim=1, keepdim=True)
    torch.testing.assert_close((out / step).round() * step, out)


def test_model_compiles_whole():
    """No graph break anywhere, with recurrence off and on; the two graphs are all there is."""
    from torch._dynamo.testing import CompileCounter

    smaller = {"LAYER_PATTERN": "GSTAG", "SHARED_LAYERS": "0,4", "VE_LAYERS": "3", "NUM_LOOPS": 1}
    model, ids, counter = make(EVERYTHING, **smaller), tokens(40), CompileCounter()
    torch._dynamo.reset()
    forward = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for looping in (False, True, False, True):
        model.looping = looping
        with torch.no_grad():
            torch.testing.assert_close(forward(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


def test_blocks_of_one_kind_share_a_graph(monkeypatch):
    """COMPILE=blocks: one graph a kind of block and one for the head, whatever the depth, the recurrence or the layer's index."""
    from torch._dynamo.testing import CompileCounter

    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options, **how: compile_(function, backend=counter, **how))
    torch._dynamo.reset()
    model, ids = (
        make({**EVERYTHING, "LAYER_PATTERN": "GGGTAAAG", "PARALLEL_START": "6", "VE_LAYERS": "", "SHARED_LAYERS": ""}),
        tokens(40),
    )
    forward = T.maybe_compile(model, T.RunConfig(compile="blocks"))
    for looping in (False, True):
        model.looping = looping
        with torch.no_grad():
            torch.testing.assert_close(forward(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 9  # embedding, G, T, the same with a skip, A, parallel A, parallel G with a skip, head


# --- parameters


def test_parameter_table_is_complete_and_exclusive():
    model = make(EVERYTHING)
    table = T.parameter_table(model)
    assert [spec.name for spec in table] == [name for name, _ in model.named_parameters()]
    roles = {spec.name: (spec.role, spec.optimizer) for spec in table}
    assert roles["tok_emb.weight"] == ("embed", "adam")
    assert roles["blocks.0.mixer.conv"] == ("control", "adam"), "3-D convolution weights are no matrices"
    assert roles["blocks.0.mixer.a_proj.weight"] == ("gdn", "muon")
    optimizers = T.Optimizers(model, T.TrainConfig(), T.RunContext())
    muon = [spec.name for specs, _ in optimizers.muon.groups for spec in specs]
    adam = [p for group in optimizers.adam.param_groups for p in group["params"]]
    assert len(muon) + len(adam) == len(table) == len(set(muon)) + len({id(p) for p in adam})


def test_unlisted_parameter_is_refused():
    model = make(TINY, looping=False)
    model.blocks[0].novelty = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="novelty"):
        T.parameter_table(model)


def test_crown_q_adds_the_gradient_of_its_penalty():
    model = make(TINY, looping=False)
    optimizers = T.Optimizers(model, T.TrainConfig(crown_q_lambda=0.5), T.RunContext())
    matrices = [spec.param for spec in optimizers.table if spec.optimizer == "muon"]
    penalty = sum((p.square() * (p.detach().abs().amax(1, keepdim=True) / 15).square()).mean() for p in matrices) * 0.5 / 12
    expected = torch.autograd.grad(penalty, matrices)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizers.add_crown_q()
    for param, gradient in zip(matrices, expected):
        torch.testing.assert_close(param.grad, gradient)


@pytest.mark.parametrize("parts", [{}, FRONTIER], ids=["cards", "frontier"])
def test_every_parameter_gets_a_gradient(parts):
    """With the projections in place nothing is stuck at zero gradient (the both-zero hash embedding was)."""
    cfg = T.resolve_config({**EVERYTHING, **{name: str(value) for name, value in parts.items()}})
    model = T.build_model(cfg)
    model.looping = True
    optimizers = T.Optimizers(model, cfg.train, T.RunContext())
    ids = tokens(65, batch=4)
    touched = set()
    for _ in range(3):
        model(ids[:, :-1], ids[:, 1:]).backward()
        touched |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizers.step(1.0, 0.9)
    missing = {name for name, _ in model.named_parameters()} - touched
    assert not missing


def test_muon_step_is_the_textbook_one():
    model = make(TINY, looping=False)
    optimizers = T.Optimizers(model, T.TrainConfig(muon_wd=0.2, matrix_lr=0.02), T.RunContext())
    param = model.blocks[0].mlp.fc.weight
    before, momentum = param.detach().clone(), torch.zeros_like(param)
    expected = before.clone()
    for step in range(3):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        grad = param.grad.clone()
        optimizers.step(0.5, 0.9, 0.5)
        momentum = 0.9 * momentum + 0.1 * grad
        nesterov = 0.1 * grad + 0.9 * momentum
        update = T.newton_schulz(nesterov[None])[0] * math.sqrt(max(1, param.size(0) / param.size(1)))
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * update
    torch.testing.assert_close(param.detach(), expected, rtol=1e-4, atol=1e-5)

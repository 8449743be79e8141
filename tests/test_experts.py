"""Experts: n-gram counts and smoothing against naive twins, normalization, causality, mixers, and the invalid formula shown up."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict

import pytest
import torch

from parts.experts import (
    EXPERTS,
    MIXERS,
    SMOOTHINGS,
    ContextMixer,
    ExpertMixture,
    HedgeMixer,
    InvalidTargetKeyedCache,
    KeyIndex,
    NgramHistory,
    Tilt,
    context_rows,
    order_adaptive_alpha,
)
from train_gpt import ExpertConfig, settings


def stream(n: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """Tokens with repeats at every order: random phrases drawn again and again."""
    g = torch.Generator().manual_seed(seed)
    phrases = [torch.randint(2, vocab, (int(torch.randint(1, 9, (1,), generator=g)),), generator=g) for _ in range(12)]
    picks = torch.randint(0, len(phrases), (n,), generator=g)
    return torch.cat([phrases[i] for i in picks])[:n]


def feed(history: NgramHistory, tokens: torch.Tensor, block: int) -> None:
    for start in range(0, tokens.numel() - 1, block):
        at = torch.arange(start, min(start + block, tokens.numel() - 1))
        history.update(context_rows(tokens, at, history.max_order - 1, history.vocab_size), tokens[at + 1])


# ---- the index ----


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_key_index_equals_a_dict(batch):
    g = torch.Generator().manual_seed(batch)
    index, twin = KeyIndex(capacity=10**9), {}
    for _ in range(60):
        keys = torch.unique(torch.randint(0, 1 << 40, (batch,), generator=g) % 5003 * (1 << 35))
        ids = index.insert(keys)
        for key, i in zip(keys.tolist(), ids.tolist()):
            assert twin.setdefault(key, i) == i
    assert sorted(twin.values()) == list(range(len(twin)))
    probe = torch.randint(0, 5003, (400,), generator=g) * (1 << 35)
    assert index.lookup(probe).tolist() == [twin.get(key, -1) for key in probe.tolist()]
    assert index.lookup(torch.tensor([-5, 3])).tolist() == [-1, -1]


def test_key_index_stops_at_its_capacity_and_says_so():
    index = KeyIndex(capacity=5)
    assert index.insert(torch.arange(8)).tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert index.refused == 3
    assert index.insert(torch.tensor([2, 9])).tolist() == [2, -1]


# ---- counts and smoothing ----


class NaiveNgrams:
    """Counts in dictionaries keyed by tuples; the formulas as the papers write them."""

    def __init__(self, tokens, vocab, order):
        self.vocab, self.order = vocab, order
        self.raw, self.left = defaultdict(Counter), defaultdict(lambda: defaultdict(set))
        padded = [vocab] * order + tokens
        for i in range(order + 1, len(padded)):
            for k in range(order):
                context, w = tuple(padded[i - k : i]), padded[i]
                self.raw[context][w] += 1
                self.left[context][w].add(padded[i - k - 1])
        self.cont = {h: Counter({w: len(s) for w, s in row.items()}) for h, row in self.left.items()}

    def discount(self, k):
        table = self.raw if k == self.order - 1 else self.cont
        counts = Counter(c for h, row in table.items() if len(h) == k for c in row.values())
        return min(max((counts[1] + 1) / (counts[1] + 2 * counts[2] + 2), 0.1), 0.95)

    def prob(self, history, w, k, smoothing):
        lower = 1 / self.vocab if k == 0 else self.prob(history, w, k - 1, smoothing)
        h = tuple(history[len(history) - k :])
        if h not in self.raw:
            return lower
        if smoothing == "witten_bell":
            row = self.raw[h]
            return (row[w] + len(row) * lower) / (sum(row.values()) + len(row))
        row, d = (self.raw if k == self.order - 1 else self.cont)[h], self.discount(k)
        return (max(row[w] - d, 0) + d * len(row) * lower) / sum(row.values())


@pytest.mark.parametrize("smoothing", ["kneser_ney", "witten_bell"])
@pytest.mark.parametrize("order,block", [(1, 13), (3, 1), (5, 37)])
def test_ngram_probabilities_equal_the_naive_twin(order, block, smoothing):
    vocab, tokens = 17, stream(230, 17)
    history = NgramHistory(vocab, order)
    feed(history, tokens, block)
    twin = NaiveNgrams(tokens.tolist(), vocab, order)
    at = torch.tensor([0, 2, 57, 101, 229])
    nodes = history.nodes(context_rows(tokens, at, order - 1, vocab))
    got = history.probs(nodes, torch.arange(vocab).expand(len(at), -1), smoothing)
    assert torch.equal(history.probs(nodes, None, smoothing), got), "read token by token or as ranges of the index"
    padded = [vocab] * order + tokens.tolist()
    for row, t in enumerate(at.tolist()):
        for k in range(order):
            want = [twin.prob(padded[: t + order + 1], w, k, smoothing) for w in range(vocab)]
            assert got[row, k].tolist() == pytest.approx(want, abs=2e-6)
    assert torch.allclose(got.sum(-1), torch.ones(len(at), order), atol=1e-5)


def test_counts_do_not_depend_on_the_block_size():
    tokens, tables = stream(300, 11), []
    for block in (1, 64, 299):
        history = NgramHistory(11, 4)
        feed(history, tokens, block)
        nodes = history.nodes(context_rows(tokens, torch.arange(299), 3, 11))
        tables.append((history.pair_counts(nodes, tokens[1:, None]), history.hint(nodes), history.counts_of_counts))
    for other in tables[1:]:
        assert torch.equal(tables[0][0], other[0]) and torch.equal(tables[0][2], other[2])
        assert torch.equal(tables[0][1][0], other[1][0]) and torch.equal(tables[0][1][1], other[1][1])


@pytest.mark.parametrize("smoothing", ["kneser_ney", "witten_bell"])
def test_a_full_table_still_gives_distributions_and_keeps_counting(smoothing):
    vocab, tokens = 13, stream(400, 13)
    history = NgramHistory(vocab, 5, max_contexts=40, max_entries=90)
    feed(history, tokens, 50)
    assert history.contexts.next_id <= 40 and history.pairs.next_id <= 90 and history.contexts.refused > 0
    nodes = history.nodes(context_rows(tokens, torch.arange(300, 399), 4, vocab))
    sums = history.probs(nodes, None, smoothing).sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    assert history.node_stats[0, 0] == 399  # the root goes on counting


def test_hint_is_the_most_frequent_successor():
    tokens = torch.tensor([1, 5, 2, 5, 3, 5, 3, 5, 2, 5, 3])
    history = NgramHistory(8, 2)
    feed(history, tokens, 4)
    node = history.nodes(torch.tensor([[5], [7]]))
    token, count = history.hint(node[:, 1])
    assert (token[0], count[0], count[1]) == (3, 3, 0)


# ---- the mixture ----


def run_mixture(config, tokens, vocab, logits, block=16, keep=()):
    """Score-then-update; returns the record [N, C] and the distributions at the positions in `keep`."""
    mixture, records, rows = ExpertMixture(config, vocab), [], {}
    for start in range(0, tokens.numel() - 1, block):
        at = torch.arange(start, min(start + block, tokens.numel() - 1))
        contexts, targets = context_rows(tokens, at, mixture.context_length, vocab), tokens[at + 1]
        prediction = mixture.predict(logits[at], contexts)
        for t in set(at.tolist()) & set(keep):
            rows[t] = prediction.distribution(torch.tensor([t - start]))[0]
        records.append(prediction.record(targets))
        mixture.update(prediction.block_contexts, prediction.block_nodes, targets, records[-1], prediction.statistics(targets))
    return mixture, torch.cat(records), rows


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("names", [EXPERTS, ("tilt",), ("ngram", "entropy"), ()])
def test_mixture_is_a_distribution_and_scores_what_it_shows(mixer, names):
    vocab, tokens = 23, stream(260, 23, seed=1)
    logits = torch.randn(260, vocab, generator=torch.Generator().manual_seed(2)) * 2
    keep = (0, 15, 16, 100, 258)
    config = ExpertConfig(experts=",".join(names), expert_mixer=mixer, ngram_order=5, tilt_order=0)
    mixture, record, rows = run_mixture(config, tokens, vocab, logits, keep=keep)
    assert torch.isfinite(record).all() and len(mixture.series) + 1 == record.size(1)
    for t in keep:
        assert rows[t].min() >= 0 and abs(rows[t].sum().item() - 1) < 1e-5
        assert rows[t][tokens[t + 1]].log().item() == pytest.approx(record[t, 0].item(), abs=1e-5)


def test_future_tokens_change_no_earlier_score():
    vocab, tokens = 19, stream(200, 19, seed=3)
    logits = torch.randn(200, vocab, generator=torch.Generator().manual_seed(4))
    config = ExpertConfig(experts=",".join(EXPERTS), ngram_order=4)
    _, before, rows = run_mixture(config, tokens, vocab, logits, keep=(121,))
    changed = tokens.clone()
    changed[122:] = (changed[122:] + 5) % vocab
    _, after, changed_rows = run_mixture(config, changed, vocab, logits, keep=(121,))
    assert torch.equal(before[:121], after[:121]) and torch.equal(rows[121], changed_rows[121])
    assert not torch.equal(before[121:], after[121:])


def test_prediction_refuses_to_score_after_its_block_was_counted():
    mixture = ExpertMixture(ExpertConfig(experts="ngram", ngram_order=3), 9)
    contexts, targets = torch.full((4, 2), 9), torch.tensor([1, 2, 3, 4])
    prediction = mixture.predict(torch.zeros(4, 9), contexts)
    mixture.update(prediction.block_contexts, prediction.block_nodes, targets, prediction.record(targets), prediction.statistics(targets))
    with pytest.raises(RuntimeError, match="counted"):
        prediction.probs(targets[:, None])


def test_no_experts_is_the_model_itself():
    vocab, tokens = 12, stream(80, 12)
    logits = torch.randn(80, vocab, generator=torch.Generator().manual_seed(5))
    _, record, _ = run_mixture(ExpertConfig(), tokens, vocab, logits)
    want = logits[:79].log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)
    assert torch.allclose(record[:, 0].float(), want, atol=1e-6)


def test_repetitive_text_gains_from_the_experts():
    vocab, tokens = 40, stream(3000, 40, seed=7)
    logits = torch.zeros(3000, vocab)
    for mixer in MIXERS:
        mixture, record, _ = run_mixture(
            ExpertConfig(experts="tilt,ngram,cache,bigram", expert_mixer=mixer, ngram_order=6), tokens, vocab, logits, block=64
        )
        nll = dict(zip(mixture.series, (-record.mean(0)).tolist()))
        assert nll["final"] < nll["neural_raw"] - 0.5


def test_calibration_and_tilt_move_towards_what_was_scored():
    """A model that never believes in the token that always comes: both corrections must raise that token."""
    vocab, tokens = 10, torch.full((600,), 7)
    logits = torch.zeros(600, vocab)
    logits[:, 7] = -3.0
    for name in ("calibration", "tilt"):
        mixture, record, _ = run_mixture(ExpertConfig(experts=name, ngram_order=2), tokens, vocab, logits)
        column = mixture.series.index(f"+{name}")
        assert record[-1, column] > record[0, column] + 1.0


def test_temperature_follows_the_cards_formula():
    logits = torch.tensor([[4.0, 0.0, -1.0, 0.5]])
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum()
    want = (logits / (1 - 0.15 * (1 - entropy / math.log(4)))).softmax(-1)
    mixture = ExpertMixture(ExpertConfig(experts="temperature", ngram_order=2), 4)
    got = mixture.predict(logits, torch.tensor([[4]])).ladder[-1].exp()
    assert torch.allclose(got, want, atol=1e-6)


def test_fixed_tilt_is_the_closed_form():
    """q'_h = q_h e^b / (1 + q_h (e^b - 1)), everything else divided by the same Z."""
    mixture = ExpertMixture(ExpertConfig(experts="tilt", ngram_order=2, tilt_beta=0.7), 5)
    contexts, targets = torch.tensor([[3], [3], [3]]), torch.tensor([2, 2, 4])
    first = mixture.predict(torch.zeros(3, 5), contexts)
    assert torch.allclose(first.ladder[-1].exp(), torch.full((3, 5), 0.2))  # nothing scored yet, no hint
    mixture.update(first.block_contexts, first.block_nodes, targets, first.record(targets), first.statistics(targets))
    got = mixture.predict(torch.zeros(1, 5), torch.tensor([[3]])).ladder[-1].exp()[0]
    z = 1 + 0.2 * (math.exp(0.7) - 1)
    assert got.tolist() == pytest.approx([0.2 / z, 0.2 / z, 0.2 * math.exp(0.7) / z, 0.2 / z, 0.2 / z], abs=1e-6)


def test_a_tilt_that_takes_nearly_everything_from_a_nearly_certain_token_stays_normalized():
    """p(h) near 1 and a boost near -LIMIT: what is left is a small difference of large numbers."""
    history = NgramHistory(50, 2)
    feed(history, torch.tensor([3, 2] * 20), 8)
    tilt = Tilt(history, 2, 0.0, torch.device("cpu"))
    tilt.weights[:] = -8.0
    logits = torch.zeros(6, 50)
    logits[:, 2] = torch.arange(12.0, 24.0, 2.0)
    log_p = logits.log_softmax(-1)
    nodes = history.nodes(torch.full((6, 1), 3))
    got = tilt.apply(log_p, tilt.hints(nodes, log_p)).double()
    assert (got.exp().sum(1) - 1).abs().max() < 1e-6 and (got[:3, 2] < log_p[:3, 2] - 0.01).all()


def test_tilt_of_all_orders_is_a_softmax_and_learns_by_its_own_derivatives():
    """Against a dense twin: features of every token of the vocabulary, softmax(log p + features . weights), autograd's derivatives."""
    vocab, tokens = 11, stream(200, 11, seed=3)
    history = NgramHistory(vocab, 4)
    feed(history, tokens, 50)
    tilt = Tilt(history, 0, 0.0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    tilt.weights = torch.randn(len(tilt.weights), generator=generator, dtype=torch.float64) * 0.3
    at = torch.arange(100, 140)
    nodes = history.nodes(context_rows(tokens, at, 3, vocab))
    nodes[7] = torch.tensor([0, -1, -1, -1])  # nothing known: no hint
    targets, log_p = tokens[at + 1], torch.randn(40, vocab, generator=generator).log_softmax(-1)

    dense = torch.zeros(40, vocab, len(tilt.weights), dtype=torch.float64)
    for row in range(40):
        for i, length in enumerate((1, 2, 3)):
            if (node := int(nodes[row, length])) < 0:
                continue
            token, count = (int(x) for x in history.hint(nodes[row, length]))
            total, types, _ = history.node_stats[node].tolist()
            bin_of_count, share = (count >= 2) + (count >= 4), count / total
            kind = i * 3 + bin_of_count
            dense[row, token, kind * 4 + (share >= 0.3) + (share >= 0.6) + (share >= 0.95)] += 1
            dense[row, token, 36 + kind] += math.log(count / (total + types)) - log_p[row, token].item()

    def likelihood(weights):
        return (log_p.double() + dense @ weights).log_softmax(-1).gather(1, targets[:, None]).sum()

    hints = tilt.hints(nodes, log_p)
    got = tilt.apply(log_p, hints)
    assert torch.allclose(got.double(), (log_p.double() + dense @ tilt.weights).log_softmax(-1), atol=2e-6)
    assert torch.equal(got[7], log_p[7]) and dense.abs().sum() > 0
    gradient, curvature = tilt.statistics(got, hints, targets).split((len(tilt.weights), len(tilt.weights) ** 2))
    assert torch.allclose(gradient, torch.autograd.functional.jacobian(likelihood, tilt.weights), atol=1e-4)
    assert torch.allclose(-curvature.view(45, 45), torch.autograd.functional.hessian(likelihood, tilt.weights), atol=1e-4)


def test_order_adaptive_alpha_is_the_cards():
    for order, entropy in ((2, 1.0), (5, 3.0), (9, 0.2), (9, 6.0)):
        f = (order - 2) / 7
        want = (0.05 + 0.9 / (1 + math.exp(-2 * (entropy - (5 - 3 * f))))) * (0.3 + 1.7 * f)
        got = order_adaptive_alpha(torch.tensor([entropy]), torch.tensor([order]))
        assert got.item() == pytest.approx(min(want, 0.99), abs=1e-6)
    assert order_adaptive_alpha(torch.tensor([3.0]), torch.tensor([1])).item() == 0


# ---- mixers ----


def test_hedge_is_exponential_weights():
    hedge = HedgeMixer(3, eta=0.5)
    losses = torch.tensor([[1.0, 2.0, 0.5], [0.1, 0.3, 4.0]])
    hedge.update(-losses[None], torch.zeros(2, dtype=torch.int64))
    assert torch.allclose(hedge.weights(torch.zeros(1, dtype=torch.int64))[0, 0], (-0.5 * losses.sum(0)).softmax(0), atol=1e-6)


def test_fixed_share_comes_back():
    g = torch.zeros(1, dtype=torch.int64)
    mixers = HedgeMixer(2, eta=1.0), HedgeMixer(2, eta=1.0, share=0.01)
    for mixer in mixers:
        mixer.update(torch.tensor([[[-1.0, -30.0]]]), g)
    assert mixers[1].weights(g)[0, 0].tolist() == pytest.approx([0.99 + 0.005, 0.005]), "the share is spread over the members"
    for mixer in mixers:
        mixer.update(torch.tensor([[[-8.0, -1.0]]]), g)
    assert mixers[0].weights(g)[0, 0, 1] < 1e-6 < 0.5 < mixers[1].weights(g)[0, 0, 1]


def test_context_mixer_finds_each_bins_best_combination():
    """Targets of bin 0 come from member 0 three times in four; bin 1 is member 1's alone."""
    mixer = ContextMixer(2, bins=2, prior=4.0)
    good, bad = math.log(0.9), math.log(0.01)
    for i in range(400):
        first = [good, bad] if i % 4 else [bad, good]
        mixer.update(torch.tensor([[first, [bad, good]]]), torch.tensor([0, 1]))
    weights = mixer.weights(torch.tensor([0, 1]))[0]
    assert torch.allclose(weights.sum(1), torch.ones(2)) and abs(weights[0, 0] - 0.75) < 0.05 and weights[1, 1] > 0.9


# ---- the formula that is not a probability ----


def test_target_keyed_cache_claims_more_than_there_is():
    vocab, tokens = 64, torch.randint(0, 64, (4000,), generator=torch.Generator().manual_seed(8))
    cache = InvalidTargetKeyedCache(vocab, low=2, high=4, buckets=256)
    at = torch.arange(3999)
    contexts = context_rows(tokens, at, 8, vocab)
    cache.update(contexts, tokens[1:])
    neural, entropy = torch.full((5, vocab), 1 / vocab), torch.full((5,), math.log(vocab))
    claims = cache.claim(neural, entropy, contexts[-5:], torch.arange(vocab).expand(5, -1))
    assert claims.sum(1).min() > 3
    assert claims.gather(1, tokens[-5:, None]).log().mean() > math.log(1 / vocab) + 1  # and looks wonderful on random tokens


def test_the_settings_table_knows_every_expert():
    limits = {spec.name: spec.metadata for spec in settings("eval")}
    assert set(limits["experts"]["several"]) == set(EXPERTS)
    assert limits["expert_mixer"]["choices"] == MIXERS and limits["ngram_smoothing"]["choices"] == SMOOTHINGS


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "names,mixer",
    [
        (("temperature", "calibration", "cache", "unigram", "bigram", "trigram", "entropy"), "hedge"),
        (("tilt", "calibration", "ngram"), "context"),
    ],
    ids=["card", "best"],
)
def test_cuda_gives_the_cpus_scores(names, mixer):
    """Card E's whole mixture and the one that gains most, at a vocabulary of 1024. Prints the rate."""
    vocab, block, blocks = 1024, 2048, 96
    # Skewed noise: hardly a context of three tokens comes twice, which is the most that the tables can be made to hold.
    tokens = (torch.rand(block * blocks, generator=torch.Generator().manual_seed(11)) ** 3 * (vocab - 2)).long() + 2
    logits = torch.randn(block, vocab, generator=torch.Generator().manual_seed(1)) * 2
    config = ExpertConfig(experts=",".join(names), expert_mixer=mixer, tilt_order=0, expert_report=False)
    scores = {}
    for device, count in (("cpu", 12), ("cuda", 12), ("cuda", blocks - 1)):
        mixture, text, rows, began = ExpertMixture(config, vocab, device), tokens.to(device), logits.to(device), time.perf_counter()
        kept = []
        for start in range(0, count * block, block):
            at = torch.arange(start, start + block, device=device)
            contexts, targets = context_rows(text, at, mixture.context_length, vocab), text[at + 1]
            prediction = mixture.predict(rows, contexts)
            record = prediction.record(targets)
            kept.append(record[:, 0])
            mixture.update(prediction.block_contexts, prediction.block_nodes, targets, record, prediction.statistics(targets))
        scores[device, count] = torch.cat(kept).cpu()
        rate = count * block / (time.perf_counter() - began)
    print(f"\n{','.join(names)} on {torch.cuda.get_device_name()}: {rate:,.0f} tokens/s, {mixture.history.nbytes / 1e6:.0f} MB of tables")
    assert torch.allclose(scores["cpu", 12], scores["cuda", 12], atol=1e-3)

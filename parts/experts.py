"""Experts: full next-token distributions made from already-scored tokens, and mixers that combine them validly.

    mixture = ExpertMixture(ExpertConfig(experts="tilt,ngram,entropy"), vocab_size=1024)
    for block in blocks:                                     # left to right
        prediction = mixture.predict(logits, contexts)       # sees the strict past only; nothing is updated
        p = prediction.probs(targets[:, None])               # score ... `probs(all tokens)` is the full distribution
        seen = prediction.block_contexts, prediction.block_nodes
        mixture.update(*seen, targets, prediction.record(targets), prediction.statistics(targets))   # ... then update

What makes a score valid is structural here: `predict` receives no target, a `Prediction` is a frozen function from candidate
tokens to probabilities, and the score of the target and the full distribution come from that one function. Every expert is
normalized over the vocabulary, a mixture is a convex combination whose weights depend on the past only.

The n-gram counts are exact. A context is a node of a trie over reversed contexts, and a trie edge is the 64-bit integer
`parent_node * (V + 1) + token`: no hashing, no collision, and no target in any context's key. Counts live in flat arrays
indexed by dense ids; the keys live in a log-structured sorted index (`KeyIndex`), so that lookups and updates of a whole block
are a handful of `searchsorted` calls on CPU and GPU alike.

Shapes: n positions, m candidates a position, K = max_order, V vocabulary, E members of a mixture. A context row is [K-1] token
ids, most recent first, padded with V before the stream's start. Probabilities are float32, log-probabilities in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from parts.adapters import repeatable_gradients
from train_gpt import ExpertConfig

# ----------------------------------------------------------------------------------------------------------------------
# Sorted key index: int64 key -> dense id
# ----------------------------------------------------------------------------------------------------------------------

_SENTINEL = torch.iinfo(torch.int64).max  # ends every run, so that a searchsorted slot is always inside it


class KeyIndex:
    """An exact, growing map from non-negative int64 keys to dense ids 0, 1, 2, ... in order of insertion.

    Two sorted runs, a large one and a small recent one (a log-structured merge tree of depth two): an insertion rewrites the
    small run only, and the small run is merged into the large one when it reaches about sqrt(large * inserted) keys, which
    balances the two costs. Runs are merged by rank (two searchsorted), never re-sorted.

    At `capacity` ids the index is full: unknown keys then get id -1 and are counted in `refused`; known keys go on working.
    """

    def __init__(self, capacity: int, device: torch.device | str = "cpu", first_id: int = 0):
        self.capacity = capacity
        self.next_id = first_id
        self.refused = 0
        self.device = torch.device(device)
        self._runs = [self._empty_run(), self._empty_run()]

    def _empty_run(self) -> tuple[Tensor, Tensor]:
        return (torch.tensor([_SENTINEL], device=self.device), torch.tensor([-1], device=self.device))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for run in self._runs for t in run)

    def lookup(self, keys: Tensor) -> Tensor:
        """Ids of `keys` (any shape, int64), -1 where a key is unknown. Negative keys are never known."""
        found: Tensor | int = -1
        for run_keys, run_ids in self._runs:
            if run_keys.numel() > 1:
                slot = torch.searchsorted(run_keys, keys)
                found = torch.where(run_keys[slot] == keys, run_ids[slot], found)
        return found if isinstance(found, Tensor) else torch.full_like(keys, found)

    def ranges(self, first: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every known key within `width` of first [n], run by run: (which of them, the key less it, id), all [found]. Negative ones have none."""
        for run_keys, run_ids in self._runs:
            begin = torch.searchsorted(run_keys, first)
            count = torch.where(first >= 0, torch.searchsorted(run_keys, first + width) - begin, 0)
            ends, total = count.cumsum(0), int(count.sum())
            which = torch.repeat_interleave(torch.arange(len(first), device=self.device), count, output_size=total)
            at = torch.arange(total, device=self.device) + (begin - ends + count)[which]
            yield which, run_keys[at] - first[which], run_ids[at]

    def insert(self, unique_keys: Tensor) -> Tensor:
        """Ids of sorted, distinct `unique_keys`, unknown ones inserted; -1 for negative keys and what no longer fits."""
        ids = self.lookup(unique_keys)
        missing = ((ids < 0) & (unique_keys >= 0)).nonzero().squeeze(1)
        first, fits = self.reserve(missing.numel())
        missing = missing[:fits]
        ids[missing] = torch.arange(first, first + fits, device=self.device)
        self.add(unique_keys[missing], ids[missing])
        return ids

    def reserve(self, count: int) -> tuple[int, int]:
        """The first of the next ids, and how many of `count` still fit."""
        first, fits = self.next_id, min(count, self.capacity - self.next_id)
        self.refused += count - fits
        self.next_id += fits
        return first, fits

    def add(self, keys: Tensor, ids: Tensor) -> None:
        """Store sorted, distinct, unknown keys under reserved ids."""
        if keys.numel():
            large, small = self._runs
            small = _merge_runs(small, (keys, ids))
            if small[0].numel() > max(1 << 12, math.isqrt(large[0].numel() * keys.numel())):
                large, small = _merge_runs(large, (small[0][:-1], small[1][:-1])), self._empty_run()
            self._runs = [large, small]


def _merge_runs(run: tuple[Tensor, Tensor], extra: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge sorted `extra` (no sentinel, disjoint from `run`) into sorted `run` (with its sentinel)."""
    (keys_a, ids_a), (keys_b, ids_b) = run, extra
    to_a = torch.arange(keys_a.numel(), device=keys_a.device) + torch.searchsorted(keys_b, keys_a)
    to_b = torch.arange(keys_b.numel(), device=keys_a.device) + torch.searchsorted(keys_a, keys_b)
    keys = keys_a.new_empty(keys_a.numel() + keys_b.numel())
    ids = torch.empty_like(keys)
    keys[to_a], keys[to_b] = keys_a, keys_b
    ids[to_a], ids[to_b] = ids_a, ids_b
    return keys, ids


def _grown(values: Tensor, size: int) -> Tensor:
    """`values` with room for `size` entries along dim 0 (doubling, new entries zero)."""
    if size <= values.size(0):
        return values
    grown = values.new_zeros((max(size, 2 * values.size(0)), *values.shape[1:]))
    grown[: values.size(0)] = values
    return grown


# ----------------------------------------------------------------------------------------------------------------------
# n-gram counts of the scored past
# ----------------------------------------------------------------------------------------------------------------------

SMOOTHINGS = ("kneser_ney", "witten_bell")


class NgramHistory:
    """Counts of every n-gram of orders 1..max_order among the tokens given to `update`, with exact contexts.

    Per node (= context) it keeps the total count, the number of distinct successors and the most frequent successor; per
    (node, token) pair the raw count and the continuation count (how many distinct one-token-longer contexts the pair was seen
    in: the count Kneser-Ney uses below the highest order). A node is unknown (-1) until it was seen in an update.

    Memory is bounded by `max_contexts` nodes and `max_entries` pairs (default 3/2 of it); beyond, new contexts are ignored and
    known ones go on counting. An update of all orders costs about 28 bytes a node and 24 a pair.
    """

    def __init__(
        self, vocab_size: int, max_order: int = 9, max_contexts: int = 1 << 25, max_entries: int = 0, device: torch.device | str = "cpu"
    ):
        if not 1 <= max_order <= 16:
            raise ValueError(f"max_order {max_order} is not in 1..16")
        self.vocab_size, self.max_order, self.base = vocab_size, max_order, vocab_size + 1
        self.device = torch.device(device)
        self.contexts = KeyIndex(max_contexts, device, first_id=1)  # node 0 is the root, the empty context
        self.pairs = KeyIndex(max_entries or max_contexts + max_contexts // 2, device)
        self.node_stats = torch.zeros(1 << 12, 3, dtype=torch.int32, device=device)  # raw total, types, continuation total
        self.node_best = torch.zeros(1 << 12, dtype=torch.int64, device=device)  # max over w of count*base + (V - w)
        self.pair_stats = torch.zeros(1 << 12, 2, dtype=torch.int32, device=device)  # raw count, continuation count
        # Discounts per order from the counts of counts (n1, n2): D = n1 / (n1 + 2 n2), Ney, Essen, Kneser (1994).
        self.counts_of_counts = torch.zeros(2, max_order, 2, dtype=torch.int64, device=device)  # raw|cont., order, n1|n2
        self.tokens = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory the tables hold."""
        flat = sum(t.numel() * t.element_size() for t in (self.node_stats, self.node_best, self.pair_stats))
        return flat + self.contexts.nbytes + self.pairs.nbytes

    # -- reading (never changes anything) --

    def nodes(self, contexts: Tensor) -> Tensor:
        """Nodes [n, K] of context rows [n, >=K-1]: column k is the context of the last k tokens, -1 where unknown."""
        node = torch.zeros(contexts.size(0), dtype=torch.int64, device=contexts.device)
        columns = [node]
        for k in range(self.max_order - 1):
            # An unknown parent gives a negative key, which is never found: the chain stays unknown.
            node = self.contexts.lookup(node * self.base + contexts[:, k])
            columns.append(node)
        return torch.stack(columns, dim=1)

    def hint(self, nodes: Tensor, min_count: int = 1) -> tuple[Tensor, Tensor]:
        """Most frequent successor of each node (any shape): (token, count); count 0 where there is none. Ties: lowest id."""
        key = torch.where(nodes >= 0, self.node_best[nodes.clamp_min(0)], 0)
        count = torch.div(key, self.base, rounding_mode="floor")
        known = count >= min_count
        return torch.where(known, self.vocab_size - key % self.base, 0), torch.where(known, count, 0)

    def matched_order(self, nodes: Tensor, min_count: int = 1) -> Tensor:
        """Longest known context length [n] (0 = only the empty context) whose total count is at least `min_count`."""
        total = torch.where(nodes >= 0, self.node_stats[nodes.clamp_min(0), 0], 0)
        return ((total >= min_count) * torch.arange(nodes.size(1), device=nodes.device)).amax(1)

    def pair_counts(self, nodes: Tensor, candidates: Tensor) -> Tensor:
        """(raw, continuation) counts [n, K, m, 2] of candidates [n, m] after nodes [n, K]."""
        ids = self.pairs.lookup(nodes[:, :, None] * self.base + candidates[:, None, :])
        return torch.where((ids >= 0)[..., None], self.pair_stats[ids.clamp_min(0)], 0)

    def all_counts(self, nodes: Tensor) -> Tensor:
        """`pair_counts` [n, K, V, 2] of the whole vocabulary: a node's pairs are neighbours in the index, and mostly few."""
        counts = self.pair_stats.new_zeros(nodes.numel(), self.vocab_size, 2)
        for which, token, ids in self.pairs.ranges(nodes.reshape(-1) * self.base, self.vocab_size):
            counts[which, token] = self.pair_stats[ids]
        return counts.view(*nodes.shape, self.vocab_size, 2)

    def probs(self, nodes: Tensor, candidates: Tensor | None, smoothing: str = "kneser_ney") -> Tensor:
        """Interpolated n-gram probabilities [n, K, m]: slice k uses contexts up to k tokens; slice 0 is the unigram model. candidates None:
        of the whole vocabulary, m = V.

        Each slice sums to 1 over the vocabulary: an order's missing mass goes to the order below, and the unigram's to the
        uniform distribution. Witten-Bell: lambda = types / (types + total). Kneser-Ney: absolute discounting with
        continuation counts below the highest order (Kneser & Ney 1995; Chen & Goodman 1999).
        """
        counts = (self.all_counts(nodes) if candidates is None else self.pair_counts(nodes, candidates)).float()
        stats = torch.where((nodes >= 0)[..., None], self.node_stats[nodes.clamp_min(0)], 0).float()
        total, types, continued = (column[..., None] for column in stats.unbind(-1))
        count = counts[..., 0]
        if smoothing == "kneser_ney":  # below the highest order, continuation counts
            total = torch.cat((continued[:, :-1], total[:, -1:]), 1)
            count = torch.cat((counts[:, :-1, :, 1], count[:, -1:]), 1)
            discount = self._discounts()[:, None]
            # Every pair seen at all has a continuation count >= 1 > d, so the discounted mass is exactly d * types.
            seen, passed_on, scale = (count - discount).clamp_min(0), discount * types, total
        else:
            seen, passed_on, scale = count, types, total + types
        scale = scale.clamp_min(1)
        known = total > 0  # an unknown context passes everything on to the order below
        seen, passed_on = torch.where(known, seen / scale, 0.0), torch.where(known, passed_on / scale, 1.0)
        p = torch.full_like(seen[:, 0], 1.0 / self.vocab_size)
        slices = []
        for k in range(self.max_order):
            p = torch.addcmul(seen[:, k], passed_on[:, k], p)
            slices.append(p)
        return torch.stack(slices, dim=1)

    def _discounts(self) -> Tensor:
        """Absolute discount [K] of each order, in (0, 1): of raw counts for the highest, of continuation counts below."""
        n1, n2 = torch.cat((self.counts_of_counts[1, :-1], self.counts_of_counts[0, -1:])).float().unbind(-1)
        return ((n1 + 1) / (n1 + 2 * n2 + 2)).clamp(0.1, 0.95)

    # -- writing --

    def update(self, contexts: Tensor, targets: Tensor, nodes: Tensor | None = None) -> None:
        """Count scored `targets` [n] after their context rows [n, >=K-1]. Call it only once these targets were scored.

        `nodes`: what `nodes(contexts)` gives, if the caller has it.
        """
        if targets.numel() == 0:
            return
        self.tokens += targets.numel()
        nodes = self._insert_nodes(contexts, self.nodes(contexts) if nodes is None else nodes)
        n, width = nodes.shape
        keys = torch.where(nodes >= 0, nodes * self.base + targets[:, None], -1).reshape(-1)
        unique, inverse, repeats = torch.unique(keys, return_inverse=True, return_counts=True)
        before = self.pairs.next_id
        ids = self.pairs.insert(unique)
        self.pair_stats = _grown(self.pair_stats, self.pairs.next_id)

        # Any one occurrence of each distinct pair tells its node, its order and the pair one order below.
        occurrence = torch.zeros_like(unique).scatter_(0, inverse, torch.arange(n * width, device=self.device))
        kept = (ids >= 0).nonzero().squeeze(1)
        ids_kept, where, repeats = ids[kept], occurrence[kept], repeats[kept].int()
        order, node = where % width, nodes.reshape(-1)[where]
        is_new = ids_kept >= before

        old = self.pair_stats[ids_kept, 0]
        self.pair_stats[ids_kept, 0] = old + repeats
        self._count_counts(0, order, old, old + repeats)
        self.node_stats[:, 0].index_add_(0, node, repeats)
        self.node_stats[:, 1].index_add_(0, node, is_new.int())
        # Counts only grow, so the running maximum over touched pairs is the maximum over all pairs.
        rank = (old + repeats).long() * self.base + (self.vocab_size - unique[kept] % self.base)
        self.node_best.scatter_reduce_(0, node, rank, "amax")

        # A pair first seen after a longer context adds one to the continuation count of the pair below it. So does every
        # occurrence whose longer context could not be stored: it counts as one never seen before.
        ids_at = ids[inverse].view(n, width)
        lost = ((ids_at[:, 1:] < 0) & (ids_at[:, :-1] >= 0)).nonzero()
        source = torch.cat([where[is_new & (order > 0)] - 1, lost[:, 0] * width + lost[:, 1]])
        touched, slot, growth = torch.unique(ids_at.view(-1)[source], return_inverse=True, return_counts=True)
        old, growth = self.pair_stats[touched, 1], growth.int()
        self.pair_stats[touched, 1] = old + growth
        self.node_stats[:, 2].index_add_(0, nodes.view(-1)[source], torch.ones_like(source, dtype=torch.int32))
        self._count_counts(1, torch.zeros_like(touched).scatter_(0, slot, source % width), old, old + growth)

    def _count_counts(self, kind: int, order: Tensor, old: Tensor, new: Tensor) -> None:
        """Move pairs between the counts of counts as their count goes from `old` to `new`."""
        for column, value in enumerate((1, 2)):
            change = (new == value).long() - (old == value).long()
            self.counts_of_counts[kind, :, column].index_add_(0, order, change)

    def _insert_nodes(self, contexts: Tensor, nodes: Tensor) -> Tensor:
        """As `nodes`, but unknown contexts are made known while there is room: all orders at once.

        With the rows sorted by context, most recent token first, the rows of one context of any length are neighbours, and the first row of
        each such group is known from the common prefix with the row above. New ids are given out row by row, shorter contexts
        first, so a context never gets one without its parent (the context one token shorter).
        """
        depth = self.max_order - 1
        if depth:
            contexts = contexts[:, :depth]
            order = self._sorted_rows(contexts)
            rows, known = contexts[order], nodes[order]
            common = (rows[1:] == rows[:-1]).cumprod(1)
            is_first = torch.cat((torch.ones_like(rows[:1], dtype=torch.bool), common == 0))
            at = torch.arange(len(rows), device=self.device)[:, None]
            leader = torch.where(is_first, at, 0).cummax(0).values  # row of the first member of each row's group, per length
            wanted = (is_first & (known[:, 1:] < 0)).view(-1).nonzero().squeeze(1)
            first, fits = self.contexts.reserve(wanted.numel())
            wanted = wanted[:fits]
            new_ids = torch.arange(first, first + fits, device=self.device)
            known[:, 1:] = known[:, 1:].reshape(-1).scatter(0, wanted, new_ids).view(-1, depth).gather(0, leader)
            keys, by_key = (known[:, :-1] * self.base + rows).view(-1)[wanted].sort()
            self.contexts.add(keys, new_ids[by_key])
            nodes = torch.empty_like(nodes).index_copy_(0, order, known)
        self.node_stats = _grown(self.node_stats, self.contexts.next_id)
        self.node_best = _grown(self.node_best, self.contexts.next_id)
        return nodes

    def _sorted_rows(self, contexts: Tensor) -> Tensor:
        """Permutation that sorts context rows lexicographically: stable sorts of packed columns, the last ones first."""
        per_key = 63 // self.base.bit_length()
        order = torch.arange(len(contexts), device=self.device)
        for start in reversed(range(0, contexts.size(1), per_key)):
            packed = torch.zeros_like(order)
            for k in range(start, min(start + per_key, contexts.size(1))):
                packed = packed * self.base + contexts[:, k]
            order = order[packed[order].sort(stable=True).indices]
        return order


def context_rows(tokens: Tensor, positions: Tensor, length: int, vocab_size: int) -> Tensor:
    """Context rows [n, length] of target positions: tokens[t], tokens[t-1], ... for target t (which is tokens[t + 1]).

    Most recent first; `vocab_size` stands for "before the stream". The target itself is never read.
    """
    index = positions[:, None] - torch.arange(length, device=positions.device)
    return torch.where(index >= 0, tokens[index.clamp_min(0)].long(), vocab_size)


# ----------------------------------------------------------------------------------------------------------------------
# Mixers: convex weights fixed before the target is seen
# ----------------------------------------------------------------------------------------------------------------------


class HedgeMixer:
    """Hedge over E members (Freund & Schapire 1997; card E, eta 0.1): log_w -= eta * nll after scoring.

    `share` > 0 is fixed-share (Herbster & Warmuth 1998): after each update that part of the weight is spread evenly, so a member
    that was bad early can come back. eta 1, share 0 is the Bayes mixture. G independent mixtures run side by side.
    """

    def __init__(self, members: int, eta: float = 0.1, share: float = 0.0, groups: int = 1, device: torch.device | str = "cpu"):
        self.eta, self.share = eta, share
        self.log_weights = torch.zeros(groups, members, dtype=torch.float64, device=device)

    def weights(self, bins: Tensor) -> Tensor:
        """Weights [G, n, E] for rows with context bins [n] (unused here); each row sums to 1."""
        return self.log_weights.softmax(1).float()[:, None].expand(-1, bins.numel(), -1)

    def update(self, log_probs: Tensor, bins: Tensor) -> None:
        """`log_probs` [G, n, E]: what each member gave the scored targets."""
        log_w = (self.log_weights + self.eta * log_probs.double().sum(1)).log_softmax(1)
        if self.share:
            log_w = torch.log((1 - self.share) * log_w.exp() + self.share / log_w.size(1))
        self.log_weights = log_w


class ContextMixer:
    """Mixing weights per context bin, learned by online expectation maximization (as in deleted interpolation, Jelinek & Mercer
    1980): a bin's weights are its members' shares of the responsibility for the targets scored in it.

    Unlike Hedge, which converges to the best single member, this converges to the best convex combination, and separately for each
    kind of position (how long a context matched, how sure its counts and the neural model are). A bin with few scored tokens leans
    on the weights over all bins, and those on a prior that favours the first member (the neural model). G mixtures run side by side.
    """

    def __init__(
        self,
        members: int,
        bins: int,
        prior: float = 16.0,
        first: float = 0.9,
        decay: float = 1.0,
        groups: int = 1,
        device: torch.device | str = "cpu",
    ):
        start = torch.full((members,), (1 - first) / max(members - 1, 1), dtype=torch.float64)
        start[0] = first if members > 1 else 1.0
        self.prior, self.decay, self.start = prior, decay, start.to(device)
        self.responsibility = torch.zeros(groups, bins, members, dtype=torch.float64, device=device)

    def _table(self) -> Tensor:
        everywhere = self.responsibility.sum(1, keepdim=True) + self.prior * self.start
        table = self.responsibility + self.prior * everywhere / everywhere.sum(2, keepdim=True)
        return table / table.sum(2, keepdim=True)

    def weights(self, bins: Tensor) -> Tensor:
        """Weights [G, n, E] for rows with context bins [n]; each row sums to 1."""
        return self._table().float()[:, bins]

    def update(self, log_probs: Tensor, bins: Tensor) -> None:
        """`log_probs` [G, n, E]: what each member gave the scored targets."""
        posterior = (self._table()[:, bins].log() + log_probs.double()).softmax(2)
        with repeatable_gradients(bins.device):  # the one scatter of the experts that adds fractions: whole numbers add up in any order
            self.responsibility.mul_(self.decay).index_add_(1, bins, posterior)


MIXERS = ("context", "hedge", "fixed_share")


# ----------------------------------------------------------------------------------------------------------------------
# Tilt: a log-linear correction at the tokens that came before
# ----------------------------------------------------------------------------------------------------------------------


class Hints:
    """What the history suggests at n positions: tokens [n, M] with features [n, M, F]. Equal tokens of a row are one hint: the first of
    them carries the sum of their features, `first` [n, M] marks it."""

    def __init__(self, tokens: Tensor, known: Tensor, features: Tensor):
        same = (tokens[:, :, None] == tokens[:, None, :]) & known[:, :, None] & known[:, None, :]
        earlier = same & torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril(-1)
        self.tokens, self.first = tokens, known & ~earlier.any(2)
        self.features = same.to(features.dtype) @ features


class Tilt:
    """p'(w) = p(w) e^b(w) / Z: the most frequent successors h of the contexts that end here gain b(h) = weights . features, every other token
    nothing (card A: one hint, one fixed b).

    A hint's features: a constant for each context length, count and share (count / total) of the successor; and, for each length and count,
    log(its frequency / p(h)), which makes the tilt a geometric mixture of both. The weights are learned online: the loss is convex in
    them, and each block is followed by a Newton step: its gradient, over the curvature of all blocks so far. b is bounded.
    """

    COUNTS, SHARES = (2, 4), (0.3, 0.6, 0.95)
    LIMIT = 8.0  # of b, nats
    RIDGE = 8.0  # curvature of the prior that says all weights are 0

    def __init__(self, history: NgramHistory, order: int, beta: float, device: torch.device):
        """order: the one n-gram order that hints, 0 for all from 2 on. beta: fixed boost a hinting order, 0 to learn."""
        longest = history.max_order - 1
        self.history, self.fixed = history, beta > 0
        self.lengths = torch.tensor([min(order - 1, longest)] if order else range(1, longest + 1), device=device, dtype=torch.int64)
        counts, shares = len(self.COUNTS) + 1, len(self.SHARES) + 1
        self.constants = len(self.lengths) * counts * shares
        size = self.constants + len(self.lengths) * counts
        self.weights = torch.zeros(size, dtype=torch.float64, device=device)
        self.weights[: self.constants] = beta
        self.curvature = self.RIDGE * torch.eye(size, dtype=torch.float64, device=device)
        self.edges = torch.tensor(self.COUNTS, device=device), torch.tensor(self.SHARES, device=device)

    def hints(self, nodes: Tensor, log_p: Tensor) -> Hints:
        """Of contexts' nodes [n, K], for a distribution of log-probabilities [n, V]."""
        nodes = nodes[:, self.lengths]
        tokens, count = self.history.hint(nodes)
        known = count > 0
        total, types = torch.where(known[..., None], self.history.node_stats[nodes.clamp_min(0), :2], 1).unbind(-1)
        at = torch.arange(len(self.lengths), device=nodes.device) * (len(self.COUNTS) + 1) + torch.bucketize(
            count, self.edges[0], right=True
        )
        share = at * (len(self.SHARES) + 1) + torch.bucketize(count / total, self.edges[1], right=True)
        ratio = torch.log(count.clamp_min(1) / (total + types)) - log_p.gather(1, tokens)
        features = torch.zeros(*tokens.shape, len(self.weights), device=nodes.device)
        features.scatter_(2, share[..., None], 1.0)
        features.scatter_(2, at[..., None] + self.constants, ratio.clamp(-6, 6)[..., None])
        return Hints(tokens, known, features)

    def apply(self, log_p: Tensor, hints: Hints) -> Tensor:
        """log p' [n, V]."""
        boost = (hints.features @ self.weights.float()).clamp(-self.LIMIT, self.LIMIT) * hints.first
        # Not by 1 + sum over h of p(h) (e^b(h) - 1): where p(h) is near 1 and b near -LIMIT that sum is a small difference of large numbers.
        return log_p.scatter_add(1, hints.tokens, boost).log_softmax(-1)

    def statistics(self, tilted: Tensor, hints: Hints, targets: Tensor) -> Tensor:
        """Gradient [F] and curvature [F, F] of the positions' log-likelihood, flattened: a sum over positions."""
        q = tilted.gather(1, hints.tokens).double().exp() * hints.first
        hit = hints.first & (hints.tokens == targets[:, None])
        features = hints.features.double()
        mean = torch.einsum("nm,nmf->nf", q, features)
        gradient = torch.einsum("nm,nmf->f", hit.double(), features) - mean.sum(0)
        weighted = (q[..., None] * features).flatten(0, 1)
        return torch.cat((gradient, (weighted.T @ features.flatten(0, 1) - mean.T @ mean).flatten()))

    def learn(self, statistics: Tensor) -> None:
        """One Newton step on a scored block's statistics."""
        gradient, curvature = statistics.split((len(self.weights), self.curvature.numel()))
        self.curvature += curvature.view_as(self.curvature)
        factor, _ = torch.linalg.cholesky_ex(self.curvature)  # positive definite: the ridge plus covariances
        self.weights += torch.cholesky_solve(gradient[:, None], factor).squeeze(1).clamp(-0.5, 0.5)


# ----------------------------------------------------------------------------------------------------------------------
# The mixture
# ----------------------------------------------------------------------------------------------------------------------

TRANSFORMS = ("tilt", "temperature", "calibration")  # re-shape the neural distribution, in this order
MEMBERS = ("ngram", "cache", "unigram", "bigram", "trigram", "entropy")  # stand beside it in the mixture
EXPERTS = TRANSFORMS + MEMBERS
CACHE_MIN_COUNT = 2  # times the gated cache must have seen a context to use it (card E)
CALIBRATION_PRIOR = 16.0  # pseudo-observations of each token that say f_emp = f_pred

# What makes two positions alike to the mixer.
ORDER_GROUPS = (0, 1, 2, 3, 4, 4, 5, 5, 5)  # by length of the longest context seen
BIN_EDGES = {
    "count": (2, 4),  # times that context was seen
    "entropy": (0.02, 0.06, 0.12, 0.2, 0.3, 0.42),  # of the model, as a fraction of ln V
    "belief": (0.05, 0.3, 0.7),  # the model's probability of that context's most frequent successor
}


def order_adaptive_alpha(entropy: Tensor, order: Tensor, low: int = 2, high: int = 9) -> Tensor:
    """Card E's gate: weight of the cache given the neural entropy H [n] (nats) and the matched n-gram order [n].

    f = (order - 2)/7; theta = 5 - 3f; alpha = clip((0.05 + 0.9 sigmoid(2(H - theta))) (0.3 + 1.7f), 0, 0.99); 0 below order 2.
    """
    f = (order.float() - low) / (high - low)
    alpha = (0.05 + 0.9 * torch.sigmoid(2 * (entropy - (5 - 3 * f)))) * (0.3 + 1.7 * f)
    return torch.where(order >= low, alpha.clamp(0, 0.99), 0.0)


class ExpertMixture:
    """Neural distribution + experts -> one distribution; all state comes from `update`, that is, from scored tokens.

    The result depends neither on how positions are spread over ranks nor on the candidates asked for. State is the same on every
    rank as long as every rank calls `update` with the same block.
    """

    def __init__(self, cfg: ExpertConfig, vocab_size: int, device: torch.device | str = "cpu"):
        self.cfg, self.vocab_size, self.device = cfg, vocab_size, torch.device(device)
        self.transforms = tuple(name for name in TRANSFORMS if name in cfg.expert_names)
        # The untouched model stays a member, so that a transform that hurts can be voted down.
        untouched = ("model",) if self.transforms else ()
        self.members = ("neural", *untouched, *[name for name in MEMBERS if name in cfg.expert_names])
        self.history = NgramHistory(vocab_size, cfg.ngram_order, cfg.ngram_max_contexts, device=device)
        self.updates = 0
        self.num_bins = (max(ORDER_GROUPS) + 1) * math.prod(len(BIN_EDGES[name]) + 1 for name in ("count", "entropy", "belief"))
        self.mixer = self._make_mixer(len(self.members))
        # What one member alone would gain: a two-member mixture of the same kind, neural + it.
        self.pairs = self.members[1:] if cfg.expert_report else ()
        self.pair_mixer = self._make_mixer(2, len(self.pairs)) if self.pairs else None
        self.order_groups = torch.tensor(ORDER_GROUPS, device=device)
        self.edges = {name: torch.tensor(edges, device=device) for name, edges in BIN_EDGES.items()}
        self.tilt = Tilt(self.history, cfg.tilt_order, cfg.tilt_beta, self.device)
        self.empirical = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        self.predicted = torch.zeros(vocab_size, dtype=torch.float64, device=device)

    @property
    def context_length(self) -> int:
        return self.cfg.ngram_order - 1

    @property
    def series(self) -> tuple[str, ...]:
        """Names of the log-probability series of `Prediction.record`, the final mixture first."""
        ladder = ("neural_raw", *(f"+{name}" for name in self.transforms))
        return ("final", *ladder, *self.members, *(f"neural|{name}" for name in self.pairs))

    def _make_mixer(self, members: int, groups: int = 1) -> HedgeMixer | ContextMixer:
        if self.cfg.expert_mixer == "context":
            return ContextMixer(members, self.num_bins, groups=groups, device=self.device)
        share = self.cfg.hedge_share if self.cfg.expert_mixer == "fixed_share" else 0.0
        return HedgeMixer(members, self.cfg.hedge_eta, share, groups, device=self.device)

    def calibration_bias(self) -> Tensor:
        """Logit bias [V]: clamp(ln(f_emp / f_pred)) of exponentially averaged frequencies, shrunk towards 0 for rare tokens."""
        cfg = self.cfg
        bias = torch.log((self.empirical + CALIBRATION_PRIOR) / (self.predicted + CALIBRATION_PRIOR))
        return bias.clamp(-cfg.calibration_clamp, cfg.calibration_clamp).float()

    @torch.no_grad()
    def predict(self, logits: Tensor, contexts: Tensor, rows: Tensor | None = None) -> Prediction:
        """The distribution at the positions of a block, from neural logits [n, V] and context rows [n, K-1]. Changes nothing.

        With several ranks each predicts a share: `rows` [r] says which positions of the block its logits [r, V] are of.
        """
        return Prediction(self, logits, contexts, rows)

    @torch.no_grad()
    def update(self, contexts: Tensor, nodes: Tensor, targets: Tensor, record: Tensor, statistics: Tensor) -> None:
        """Learn from a scored block: its contexts [n, K-1] and their nodes [n, K] (a prediction, any rank's, has those), targets [n], the whole
        block's `Prediction.record` [n, C] (float64) and the sum over the block of `Prediction.statistics`."""
        if targets.numel() == 0:
            return
        columns = {name: record[:, i] for i, name in enumerate(self.series)}
        bins = record[:, -1].long()
        self.mixer.update(torch.stack([columns[name] for name in self.members], 1)[None], bins)
        if self.pair_mixer:
            others = torch.stack([columns[name] for name in self.pairs])
            self.pair_mixer.update(torch.stack((columns["neural"].expand_as(others), others), 2), bins)
        mass, tilted = statistics[: self.vocab_size], statistics[self.vocab_size :]
        if len(tilted):
            self.tilt.learn(tilted)
        if "calibration" in self.transforms:
            decay = self.cfg.calibration_momentum ** (targets.numel() / 64)  # the momentum is one of 64-token strides
            seen = torch.zeros_like(self.empirical).index_add_(0, targets, torch.ones_like(targets, dtype=torch.float64))
            self.empirical.mul_(decay).add_(seen)
            self.predicted.mul_(decay).add_(mass)
        if self.cfg.expert_names:
            self.history.update(contexts, targets, nodes)
        self.updates += 1


class Prediction:
    """A frozen distribution at n positions; made by `ExpertMixture.predict` without any target.

    `probs(candidates)` is the one way to its values: scoring asks it for the targets, the audit for the whole vocabulary.
    """

    def __init__(self, mixture: ExpertMixture, logits: Tensor, contexts: Tensor, rows: Tensor | None = None):
        cfg, history = mixture.cfg, mixture.history
        self.mixture = mixture
        self.updates_before = mixture.updates
        self.block_contexts, self.block_nodes = contexts, history.nodes(contexts)
        self.nodes = self.block_nodes if rows is None else self.block_nodes[rows]
        log_p = logits.float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        ladder = [log_p]

        self.entropy = entropy
        for name in mixture.transforms:
            if name == "tilt":
                self.hints = mixture.tilt.hints(self.nodes, log_p)
                ladder.append(mixture.tilt.apply(log_p, self.hints))
            elif name == "temperature":  # sharper where the model is sure: T = 1 - s (1 - H / ln V)
                t = 1 - cfg.temperature_strength * (1 - entropy / math.log(mixture.vocab_size))
                ladder.append((ladder[-1] / t[:, None]).log_softmax(-1))
            elif name == "calibration":
                ladder.append((ladder[-1] + mixture.calibration_bias()).log_softmax(-1))
        self.ladder = ladder
        # The entropy expert: the neural distribution flattened towards uniform, the more the less sure it is.
        self.flatten = (entropy / math.log(mixture.vocab_size)).clamp(0, 1)[:, None]
        self.bins = self._context_bins() if cfg.expert_mixer == "context" else torch.zeros_like(self.nodes[:, 0])
        self.weights = mixture.mixer.weights(self.bins)[0]

    def _context_bins(self) -> Tensor:
        """What kind of position this is [n]: matched order x its count x neural entropy x neural belief in the n-gram's hint."""
        history, groups, edges = self.mixture.history, self.mixture.order_groups, self.mixture.edges
        length = history.matched_order(self.nodes)
        node = self.nodes.gather(1, length[:, None]).squeeze(1)
        belief = self.ladder[-1].gather(1, history.hint(node)[0][:, None]).squeeze(1).exp()
        values = {"count": history.node_stats[node, 0].long(), "entropy": self.flatten.squeeze(1), "belief": belief}
        bins = groups[length.clamp_max(len(groups) - 1)]
        for name, value in values.items():
            bins = bins * (len(edges[name]) + 1) + torch.bucketize(value, edges[name], right=True)
        return bins

    def member_probs(self, candidates: Tensor | None, rows: Tensor | slice = slice(None)) -> Tensor:
        """Every member's probabilities [n, E, m] of candidate tokens [n, m], or of all (None), at the (selected) positions."""
        mixture, cfg = self.mixture, self.mixture.cfg

        def of(log_p: Tensor) -> Tensor:
            return (log_p[rows] if candidates is None else log_p[rows].gather(1, candidates)).exp()

        neural = of(self.ladder[-1])
        columns = {"neural": neural}
        if "entropy" in mixture.members:
            flatten = self.flatten[rows]
            columns["entropy"] = (1 - flatten) * neural + flatten / mixture.vocab_size
        if "model" in mixture.members:
            columns["model"] = of(self.ladder[0])
        if mixture.updates != self.updates_before:
            raise RuntimeError("a prediction was asked for probabilities after its block had been counted")
        if set(mixture.members) & {"ngram", "cache", "unigram", "bigram", "trigram"}:
            slices = mixture.history.probs(self.nodes[rows], candidates, cfg.ngram_smoothing)
            last = cfg.ngram_order - 1
            columns["ngram"] = slices[:, last]
            if "cache" in mixture.members:
                found = mixture.history.matched_order(self.nodes[rows], CACHE_MIN_COUNT)
                alpha = order_adaptive_alpha(self.entropy[rows], found + 1)[:, None]
                columns["cache"] = (1 - alpha) * neural + alpha * slices[:, last]
            for k, name in enumerate(("unigram", "bigram", "trigram")):
                columns[name] = slices[:, min(k, last)]
        return torch.stack([columns[name] for name in mixture.members], dim=1)

    def probs(self, candidates: Tensor | None, rows: Tensor | slice = slice(None)) -> Tensor:
        """Final probabilities [n, m] of candidate tokens [n, m], or of all (None), at the (selected) positions."""
        return (self.member_probs(candidates, rows) * self.weights[rows][:, :, None]).sum(1)

    def distribution(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """The full distribution [n, V] at the (selected) positions: `probs` of every token."""
        return self.probs(None, rows)

    def statistics(self, targets: Tensor) -> Tensor:
        """What the transforms learn from, float64, summed over positions: the neural distribution that calibration corrects [V], then
        `Tilt.statistics` where a tilt learns."""
        mixture = self.mixture
        parts = [self.ladder[-2 if "calibration" in mixture.transforms else -1].exp().sum(0, dtype=torch.float64)]
        if "tilt" in mixture.transforms and not mixture.tilt.fixed:  # the first of the transforms
            parts.append(mixture.tilt.statistics(self.ladder[1], self.hints, targets))
        return torch.cat(parts)

    def record(self, targets: Tensor) -> Tensor:
        """What scoring the targets gave [n, C], float64: one column a name of `ExpertMixture.series` (log-probabilities), then
        the context bin."""
        picked = targets[:, None]
        ladder = [log_p.gather(1, picked).squeeze(1) for log_p in self.ladder]
        if len(self.mixture.members) == 1:  # nothing is mixed: what the model says, not a logarithm of its exponential
            return torch.stack([ladder[-1], *ladder, ladder[-1], self.bins], dim=1).double()
        members = self.member_probs(picked).squeeze(2)
        final = (members * self.weights).sum(-1)
        logs = [final.log(), *ladder, *members.log().unbind(-1)]
        if self.mixture.pair_mixer:
            weights = self.mixture.pair_mixer.weights(self.bins)
            others = members[:, 1:].T
            logs += (weights[..., 0] * members[:, 0] + weights[..., 1] * others).log().unbind(0)
        return torch.stack([*logs, self.bins], dim=1).double()


# ----------------------------------------------------------------------------------------------------------------------
# The formula that is not a probability (reporting only)
# ----------------------------------------------------------------------------------------------------------------------

_PRIMES = (36313, 27191, 51647, 81929, 131071, 174763, 233017, 299993, 360007)


class InvalidTargetKeyedCache:
    """Card E's published cache, kept to show what it claims: hashed counts whose key contains the *target*, mixed only for the
    true token. It is no distribution: over the vocabulary its "probabilities" sum to far more than 1. It never enters a score.
    """

    def __init__(
        self, vocab_size: int, low: int = 2, high: int = 9, buckets: int = 1 << 22, min_count: int = 2, device: torch.device | str = "cpu"
    ):
        self.vocab_size, self.orders, self.buckets, self.min_count = vocab_size, range(low, high + 1), buckets, min_count
        self.context_counts = torch.zeros(len(self.orders), buckets, dtype=torch.int32, device=device)
        self.full_counts = torch.zeros(len(self.orders), buckets, dtype=torch.int32, device=device)

    def _keys(self, contexts: Tensor, candidates: Tensor, order: int) -> tuple[Tensor, Tensor]:
        """Bucket of the context [n] and of (context, candidate) [n, m]."""
        mixed = torch.zeros_like(contexts[:, 0])
        for k in range(order - 1):
            mixed = mixed ^ (contexts[:, k] * _PRIMES[k])
        full = mixed[:, None] ^ (candidates * _PRIMES[order - 1])
        return mixed % self.buckets, full % self.buckets

    def claim(self, neural: Tensor, entropy: Tensor, contexts: Tensor, candidates: Tensor) -> Tensor:
        """What the formula claims as the probability [n, m] of each candidate, were it the target; neural [n, m], entropy [n]."""
        cached = torch.zeros_like(neural)
        order_of = torch.zeros_like(candidates)
        for i, order in enumerate(self.orders):  # the highest order found wins
            context_key, full_key = self._keys(contexts, candidates, order)
            seen = self.context_counts[i][context_key][:, None]
            both = torch.minimum(self.full_counts[i][full_key], seen)
            found = (seen >= self.min_count) & (both > 0)
            cached = torch.where(found, both / seen.clamp_min(1), cached)
            order_of = torch.where(found, order, order_of)
        alpha = order_adaptive_alpha(entropy[:, None], order_of, self.orders[0], self.orders[-1])
        return (1 - alpha) * neural + alpha * cached

    def update(self, contexts: Tensor, targets: Tensor) -> None:
        for i, order in enumerate(self.orders):
            context_key, full_key = self._keys(contexts, targets[:, None], order)
            one = torch.ones_like(context_key, dtype=torch.int32)
            self.context_counts[i].index_add_(0, context_key, one)
            self.full_counts[i].index_add_(0, full_key.squeeze(1), one)

"""Test-time training by document: many documents side by side, each with adapters of its own that learn from what has been scored of it.

    trainer = DocumentTrainer(model, cfg.eval, seed, window, device)
    for first, logits in trainer.read(documents):      # of the targets from `first` on, a row a document
        ...                                            # they count before the next turn of the loop, which learns from them

A document is read from its first token in chunks (TTT_DOC_CHUNKS, by the position in the document). A chunk's forward gives its scores; its mean loss
then moves the document's own LoRAs, and the next chunk is read with the result. At a document's start the LoRAs are what they were for any
other, zero, and so is the optimizer's state. So a document's scores depend on the artifact and on the document alone, and within it on
what comes before: neither the other documents of a batch nor their order has a part in it. Batches of like lengths are only faster.

A chunk's forward reads the chunk: keys, values and recurrent states of what precedes it are remembered as they were computed when it was read
(`DecodeState`), by the adapters of then. The public record's form recomputes the whole window with the adapters of now for each chunk,
which at chunks of 48 in a window of 2,048 costs forty times as much; the gradient here ends at the chunk's beginning. DOCUMENT_TTT.md
beside this file has what that costs in bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.shards import BOS_ID
from parts.adapters import DocumentAdapters, RowAdamW, repeatable_gradients
from parts.audit import NEVER, Ledger
from train_gpt import GPT, DecodeState, EvalConfig, RunContext, sent


class Chunk:
    """A chunk of `size` targets in every lane: the model reads it, then the adapters learn from it.

    On a GPU both are recorded once and replayed from then on: two launches in place of some ten thousand.
    """

    def __init__(self, trainer: DocumentTrainer, size: int, graphs: bool):
        self.trainer = trainer
        self.tokens = torch.zeros(trainer.lanes, size + 1, dtype=torch.int64, device=trainer.device)
        self.weights = torch.zeros(trainer.lanes, size, device=trainer.device)
        self.graphs = [torch.cuda.CUDAGraph() for _ in range(2)] if graphs else []
        if graphs:
            self._record()

    def _record(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries choose their kernels before the recording
                self._read()
                self._learn()
        torch.cuda.current_stream().wait_stream(side)
        for graph, part in zip(self.graphs, (self._read, self._learn)):
            with torch.cuda.graph(graph, pool=self.trainer.pool):
                part()
            self.trainer.pool = graph.pool()

    def _read(self) -> None:
        trainer = self.trainer
        with torch.enable_grad(), trainer.adapters.attached():
            self.logits = trainer.model(self.tokens[:, :-1], state=trainer.state)

    def _learn(self) -> None:
        """A step on each document's weighted loss. Documents share no parameter, so that the gradient of the sum is each one's own."""
        trainer = self.trainer
        with torch.enable_grad():
            targets = self.tokens[:, 1:]
            nll = F.cross_entropy(self.logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
            gradients = torch.autograd.grad((nll * self.weights).sum(), trainer.params)
        self.logits = self.logits.detach()
        trainer.optimizer.step([gradient.contiguous() for gradient in gradients])

    def read(self, tokens: Tensor) -> Tensor:
        """tokens [lanes, size + 1] -> logits float32 [lanes, size, V], which hold until the next chunk is read."""
        self.tokens.copy_(tokens)
        self.graphs[0].replay() if self.graphs else self._read()
        return self.logits.detach()

    def learn(self, learned: Tensor) -> None:
        """learned: bool [lanes, 1 or size], the targets from which each lane's document learns: from their mean loss."""
        self.weights.copy_(learned / learned.expand_as(self.weights).sum(1, keepdim=True).clamp_min(1))
        self.graphs[1].replay() if self.graphs else self._learn()


class DocumentTrainer:
    """The model on up to `lanes` documents at once (0: TTT_DOC_LANES).

    one_document: all lanes begin one when `read` begins. Otherwise a lane's documents follow each other, and whoever reads them says with
    `restart(rows)` where another begins.
    """

    def __init__(
        self,
        model: GPT,
        cfg: EvalConfig,
        seed: int,
        window: int,
        device: torch.device,
        graphs: bool = True,
        lanes: int = 0,
        one_document: bool = True,
    ):
        self.model, self.cfg, self.device = model, cfg, device
        self.lanes = lanes or cfg.ttt_doc_lanes or (64 if device.type == "cuda" else 8)
        self.stages = cfg.document_chunks
        model.requires_grad_(False)
        self.adapters = DocumentAdapters(model, cfg.ttt_doc_sites.split(","), cfg.ttt_doc_rank, cfg.ttt_doc_alpha, self.lanes, seed)
        self.params = list(self.adapters.parameters())
        self.optimizer = RowAdamW(self.params, cfg.ttt_doc_lr, cfg.ttt_doc_beta2, cfg.ttt_doc_wd)
        self.state = DecodeState(self.lanes, window, max(size for size, _ in self.stages), device, endless=True, one_document=one_document)
        self.graphs, self.pool = graphs and device.type == "cuda", None
        self.chunks: dict[int, Chunk] = {}

    def chunk_size(self, position: int) -> int:
        """Targets of the chunk that begins at this position of a document."""
        return next(size for size, until in self.stages if position < until)

    def prepare(self) -> None:
        """Lay out the memory, and record what is recorded: before there is anything in the adapters that a rehearsal moves."""
        if self.chunks:
            return
        with torch.no_grad(), self.adapters.attached():
            self.model(torch.zeros(self.lanes, self.state.piece, dtype=torch.int64, device=self.device), state=self.state)
        self.state.restart()
        self.chunks = {size: Chunk(self, size, self.graphs) for size, _ in self.stages}

    def read(self, documents: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Score documents, each [n + 1] tokens of which n are targets, and learn from what has been scored.

        Yields (first, logits float32 [lanes, size, V]) of targets first … first + size - 1 of each; rows and columns beyond the documents are
        meaningless. Learns from a chunk once its scores have been taken, in those documents that go on after it.
        """
        self.prepare()
        lengths = torch.zeros(self.lanes, dtype=torch.int64)
        lengths[: len(documents)] = torch.tensor([len(document) - 1 for document in documents])
        longest = int(lengths.max())
        tokens = torch.zeros(self.lanes, longest + self.state.piece + 1, dtype=torch.int64, device=self.device)  # blank; blank is no BOS
        for row, document in zip(tokens, documents):
            row[: len(document)] = document
        lengths = lengths.to(self.device)
        self.restart()
        first = 0
        while first < longest:
            chunk = self.chunks[self.chunk_size(first)]
            after = first + self.chunk_size(first)
            yield first, chunk.read(tokens[:, first : after + 1])
            if after < longest:
                chunk.learn((lengths > after)[:, None])
            first = after

    def restart(self, rows: Tensor | None = None) -> None:
        """Other documents in all lanes, at position 0; or (int [n]) in some."""
        if rows is None:
            self.state.restart()
        which = slice(None) if rows is None else rows
        self.adapters.reset(which)
        self.optimizer.reset(which)


POOL = 16  # batches on each rank that are read ahead
POOL_BYTES = {"cuda": 4 << 30, "cpu": 1 << 28}  # of their logits, where whole distributions are wanted


class DocumentReader:
    """What the model says of a stream of documents of which more and more becomes known: logits or losses of any stretch, at most once each.

    A pool of documents is read ahead, the longest first, batches of like lengths; with several ranks each reads every so many'th batch.
    """

    def __init__(self, trainer: DocumentTrainer, tokens: Tensor, ledger: Ledger, ctx: RunContext):
        """tokens [N + 1]: the text, filled from the left by whoever calls."""
        self.trainer, self.tokens, self.ledger, self.ctx = trainer, tokens, ledger, ctx
        self.known = 0
        self.spans: list[tuple[int, int]] = []  # (start, end) of each document's targets as far as they are known
        self.done: dict[tuple[int, int], Tensor | None] = {}  # span -> its values [n, …]; None where another rank has them

    def values(self, begin: int, end: int, known: int, chunk: object, whole: bool) -> tuple[Tensor, Tensor]:
        """This rank's share of targets begin … end-1, as far as the `known` tokens allow: (positions [n] on the CPU, losses [n] or, whole,
        logits [n, V])."""
        self._look(known)
        shape = (self.trainer.model.cfg.vocab_size,) if whole else ()
        positions, values = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, *shape)]
        self.done = {span: value for span, value in self.done.items() if span[1] > begin}  # nobody comes back to those
        for index, (start, stop) in enumerate(self.spans):
            if start >= end or stop <= begin:
                continue
            if (start, stop) not in self.done:
                self._read_ahead(index, whole)
            found = self.done[start, stop]
            if found is not None:
                first, last = max(start, begin), min(stop, end)
                positions.append(torch.arange(first, last))
                values.append(found[first - start : last - start])
        return torch.cat(positions), torch.cat([part.to(self.ctx.device) for part in values])

    def _look(self, known: int) -> None:
        if known != self.known:
            self.known, ends = known, min(known, len(self.tokens) - 1)
            starts = (self.tokens[:ends] == BOS_ID).nonzero().flatten().tolist()
            starts = starts if starts[:1] == [0] else [0, *starts]
            self.spans = list(zip(starts, [*starts[1:], ends]))

    def _read_ahead(self, index: int, whole: bool) -> None:
        """Read the document at `index`, and such after it as fit the pool."""
        trainer, ctx = self.trainer, self.ctx
        room = POOL_BYTES[ctx.device.type] // (4 * trainer.model.cfg.vocab_size) if whole else len(self.tokens)
        pool: list[tuple[int, int]] = []
        for span in self.spans[index : index + POOL * trainer.lanes * ctx.world_size]:
            room -= span[1] - span[0]
            if pool and room < 0:
                break
            if span not in self.done:
                pool.append(span)
        pool.sort(key=lambda span: span[0] - span[1])
        batches = [pool[first : first + trainer.lanes] for first in range(0, len(pool), trainer.lanes)]
        self.done.update(dict.fromkeys(pool))
        for batch in batches[ctx.rank :: ctx.world_size]:
            self._read(batch, whole)

    def _read(self, batch: list[tuple[int, int]], whole: bool) -> None:
        """Each score is fixed before its chunk is learned from, and the ledger is told so where it happens."""
        starts, stops = torch.tensor(batch)[..., None].unbind(1)
        lengths = (stops - starts).to(self.ctx.device)
        places = lengths.cumsum(0) - lengths  # of each document's first value among all
        total = int(lengths.sum())
        with repeatable_gradients(self.ctx.device):
            values = None
            for first, logits in self.trainer.read([self.tokens[start : stop + 1].long() for start, stop in batch]):
                at = starts + first + torch.arange(logits.size(1))
                read = logits[: len(batch)]
                if not whole:
                    targets = self.tokens[sent((at + 1).clamp_max(len(self.tokens) - 1), self.ctx.device)].long()
                    read = -read.log_softmax(-1).gather(2, targets[..., None]).squeeze(2)
                if values is None:
                    values = read.new_empty(total + 1, *read.shape[2:])  # what is beyond its document goes to the last
                column = first + torch.arange(logits.size(1), device=self.ctx.device)
                values[torch.where(column < lengths, places + column, total)] = read
                self.ledger.fix(at[at < stops])
                if (goes_on := stops[:, 0] > at[:, -1] + 1).any():
                    self.ledger.fit(at[goes_on].flatten(), "training")
        for span, part in zip(batch, values.split([*lengths[:, 0].tolist(), 1])):
            self.done[span] = part

    def close(self) -> None:
        """With several ranks: put together what each one's ledger knows."""
        ledger = self.ledger
        if self.ctx.world_size > 1:
            for steps, nothing in ((ledger.fixed_step, -1), (ledger.first_fit, NEVER)):
                known = self.ctx.all_reduce_sum(torch.where(steps == nothing, 0, steps + 1).double().to(self.ctx.device)).cpu().long()
                steps.copy_(torch.where(known == 0, nothing, known - 1))

"""A training step on many GPUs, predicted from `train_gpt.py --bench` on one and on a few. Standard library only.

    python -m parts.predict ONE.json FEW.json [--gpus 8] [--tokens B] [--seconds 585] [--loop-at 0.35]

A step of B tokens on n GPUs, in micro-batches of m tokens, takes

    t(n) = B/(n·m) · c  +  o(n)  +  e(n)  +  r

    c     a micro-batch, forward and backward: what ONE's step takes without its optimizer, by its micro-batches
    o(n)  the optimizer, as profiled: o(n) = f + s/n, a part that every rank does and one that Muon splits over ranks, from ONE and FEW
    e(n)  exchanges that FEW shows exposed. Over a ring a rank carries (n-1)/n of what is gathered, 2(n-1)/n of what is reduced, so
          e(n) = e(few) · (1 - 1/n) / (1 - 1/few), the bus being as fast
    r     what FEW took more than the terms above: the gradients' way into one buffer and out of it, launches, a slower rank

ONE and FEW have the same micro-batch; their tokens a step may differ. The nearer B/(n·m) of FEW is to that of the GPUs asked for, the less c's
error counts. The exchange of clock and stop signals is the host's and not counted. Within a node: between nodes e is another.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from parts.files import UserError, cli


def terms(report: Mapping, phase: str) -> tuple[float, float, float, float]:
    """Of a benchmark's phase: micro-batches a rank, milliseconds of the step, of its optimizer, of its exposed exchanges."""
    row = report["phases"][phase]
    micro_batches = report["tokens_a_step"] / report["world_size"] / report["micro_batch_tokens"]
    exposed = sum(cost["exposed_ms"] for kind, cost in row["collectives"].items() if "(host)" not in kind)
    return micro_batches, row["milliseconds"], row["parts_ms"]["optimizer"], exposed


def predict(one: Mapping, few: Mapping, gpus: int, tokens: int) -> dict[str, dict[str, float]]:
    """By phase the milliseconds of a step of `tokens` tokens on `gpus` GPUs, and the terms of which they are the sum."""
    ranks, micro = few["world_size"], one["micro_batch_tokens"]
    if one["world_size"] != 1 or ranks < 2:
        raise UserError(f"benchmarks of {one['world_size']} and {ranks} GPUs: the first is to be of one, the second of several")
    if few["micro_batch_tokens"] != micro or few["phases"].keys() != one["phases"].keys():
        raise UserError("the benchmarks differ in their phases or in MICRO_BATCH_TOKENS")
    if tokens % (gpus * micro):
        raise UserError(f"{tokens} tokens a step do not divide into {gpus} GPUs of micro-batches of {micro}")
    result = {}
    for phase in one["phases"]:
        micro_batches, step, optimizer, _ = terms(one, phase)
        compute = (step - optimizer) / micro_batches
        few_batches, few_step, few_optimizer, exposed = terms(few, phase)
        rest = few_step - few_batches * compute - few_optimizer - exposed
        split = (optimizer - few_optimizer) / (1 - 1 / ranks)
        row = {
            "compute": compute * tokens / gpus / micro,
            "optimizer": optimizer - split * (1 - 1 / gpus),
            "exchanges": exposed * (1 - 1 / gpus) / (1 - 1 / ranks),
            "rest": rest,
        }
        result[phase] = {"milliseconds": sum(row.values()), **row}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m parts.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("one", type=Path, help="bench-*.json of one GPU")
    parser.add_argument("few", type=Path, help="bench-*.json of two or more")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=0, help="a step, over all GPUs (ONE's)")
    parser.add_argument("--seconds", type=float, default=585.0, help="of training: MAX_WALLCLOCK_SECONDS less GPTQ_RESERVE_SECONDS")
    parser.add_argument("--loop-at", type=float, default=0.35, help="ENABLE_LOOPING_AT")
    options = parser.parse_args()
    one, few = (json.loads(path.read_text()) for path in (options.one, options.few))
    tokens = options.tokens or one["tokens_a_step"]
    rows = predict(one, few, options.gpus, tokens)
    print(f"{'':<18}{'ms':>9}{'tok/s':>9}{'x one GPU':>11}{'compute':>10}{'optimizer':>11}{'exchanges':>11}{'rest':>8}")
    for phase, row in rows.items():
        rate = tokens / row["milliseconds"] * 1000
        scaling = rate / one["phases"][phase]["tokens_per_second"]
        parts = f"{row['compute']:>10.2f}{row['optimizer']:>11.2f}{row['exchanges']:>11.2f}{row['rest']:>8.2f}"
        print(f"{phase:<18}{row['milliseconds']:>9.2f}{rate / 1e6:>8.2f}M{scaling:>11.2f}{parts}")
    plain, looping = ([row["milliseconds"] for phase, row in rows.items() if phase.startswith(kind)] for kind in ("plain", "looping"))
    if len(plain) == 1:
        share = options.loop_at if looping else 1.0
        steps = options.seconds * 1000 * (share / plain[0] + ((1 - share) / looping[0] if looping else 0))
        print(f"{steps:,.0f} steps, {steps * tokens / 1e9:.2f}B tokens in {options.seconds:g} s")


if __name__ == "__main__":
    cli(main)

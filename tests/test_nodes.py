"""Several ranks and nodes as a user starts them: what their exchanges cost."""

import json
import subprocess
import sys

from conftest import ROOT, clean_environment

import train_gpt as T

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

SHORT_BENCHMARK = """
import sys
import train_gpt
train_gpt.Benchmark.SECONDS = 0
sys.argv = ["train_gpt.py", "--bench"]
train_gpt.main()
"""


def test_the_benchmark_says_what_exchanges_between_ranks_cost(launch, tmp_path):
    """Calls and bytes of every kind as the model's shapes give them; each rank sends as much as it must, and no more."""
    (tmp_path / "short.py").write_text(SHORT_BENCHMARK)
    settings = {**launch.settings, "RUNS_DIR": tmp_path, "RUN_ID": "two", "LAYER_PATTERN": "AT", "MICRO_BATCH_TOKENS": 128, "DEVICE": "cpu"}
    environment = clean_environment(**settings, PYTHONPATH=ROOT)
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", str(tmp_path / "short.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "bench-two.json").read_text())
    (phase,) = report["phases"].values()
    assert report["world_size"] == 2 and report["tokens_a_step"] == 512 and phase["tokens_per_second"] > 0
    model = T.build_model(T.resolve_config({name: str(value) for name, value in settings.items()}))
    shapes = [spec.shape for spec in T.parameter_table(model) if spec.optimizer == "muon"]
    padded = [(shapes.count(shape) + 1) // 2 * 2 * shape[0] * shape[1] for shape in set(shapes)]
    expected = {
        "clock, stop (host)": (2, 2 * 2 * 8),  # before a step, and between its two micro-batches of a rank: two float64
        "gradients": (1, 4 * (T.count_params(model) + 1)),  # and the loss
        "Muon's updates": (len(padded), 4 * sum(padded)),
    }
    assert {kind: (cost["calls"], cost["bytes"]) for kind, cost in phase["collectives"].items()} == expected
    for kind, cost in phase["collectives"].items():
        assert cost["alone_ms"] > 0 and cost["exposed_ms"] > 0 and cost["bus_gb_per_second"] > 0
        assert any(kind in line and "ms" in line for line in done.stdout.splitlines()), kind
    carried = {"gradients": 1.0, "Muon's updates": 0.5}  # of the bytes, over a bus of two: 2(n-1)/n and (n-1)/n
    for kind, share in carried.items():
        cost = phase["collectives"][kind]
        assert abs(cost["bus_gb_per_second"] * 1e6 * cost["alone_ms"] / cost["bytes"] - share) < 1e-6

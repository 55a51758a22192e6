"""Ops are timed by CUDA graphs, torch's and ours, in every direction: none of them falls back to a queue."""

import pytest
import torch

from fastvit_benchmarks import bench_ops, op_bench
from fastvit_benchmarks.harness import machine

pytestmark = pytest.mark.needs(runtime=True)


@pytest.mark.parametrize("op", bench_ops.OPS)
@pytest.mark.parametrize("direction", op_bench.DIRECTIONS)
def test_a_small_call_is_timed_by_a_graph(op, direction, gpu, monkeypatch):
    for peak in ("peak_gbps", "peak_tflops"):
        monkeypatch.setattr(op_bench, peak, lambda *where: 1.0)
    case, providers = bench_ops.cases([op], gpu, ["bfloat16"], f"{direction} B=1", True)[0]
    offered, _ = providers(case, gpu)
    first = next(iter(offered))
    chosen = {name: p for name, p in offered.items() if name == first or name.startswith("fastvit")}
    assert len(chosen) > 1
    rows = op_bench.run_case(case, chosen, gpu, machine(), rounds=3, seconds=0).rows
    assert {row.provider: (row.ok, row.timed) for row in rows} == dict.fromkeys(chosen, (True, "graph"))
    assert all(row.eager_ms_p50 > 0 for row in rows)
    torch.cuda.synchronize()

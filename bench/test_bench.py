"""Every op x case tagged "bench" x direction x backend that can run here, for pytest-benchmark.

    pytest bench -k "rms_norm and 4096x4096 and bf16" --benchmark-group-by=group

An op that is added appears here by itself. These are the raw times of one backend after the other;
`fastllm bench` measures ratios in interleaved rounds, proves before it times, and is what to quote.
"""

import functools
import itertools

import pytest
import torch

from fastllm.cli.bench.ops import DIRECTIONS, Inputs, stock
from fastllm.core.op import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORK = [
    pytest.param(op, case, direction, name, id=f"{op.name}-{case.name}-{direction}-{name}")
    for op in OPS.values()
    for case in op.cases
    if "bench" in case.tags
    for direction in DIRECTIONS
    for name in op.backends
    if name != "reference" and op.backends[name].missing is None
]


@pytest.mark.parametrize(("op", "case", "direction", "name"), WORK)
def test_bench(benchmark, op, case, direction, name):
    reason = op.why_not(name, case.args(DEVICE))
    if reason is not None:
        pytest.skip(reason)
    inputs = Inputs(op, case, DEVICE, direction)
    function = stock(op) if name == "torch" else functools.partial(op, backend=name)
    call = inputs.candidate(function)()
    turn = itertools.cycle(range(inputs.sets))
    gpu = torch.device(DEVICE).type == "cuda"

    def run():
        call(next(turn))
        if gpu:
            torch.cuda.synchronize()

    benchmark.group = f"{op.name} {case.name} {direction}"
    benchmark.extra_info.update(backend=name, nbytes=inputs.work[0], warm=inputs.sets == 1)
    benchmark(run)

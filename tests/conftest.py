"""Options, device markers and settings for every test."""

import os

# no test touches the network, whatever it imports
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# nor does one depend on what somebody measured: the tuner's own tests turn it on
os.environ["FASTLLM_TUNE"] = "off"
# a thread that waits leaves its core to the tests of other processes
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

settings.register_profile("fastllm", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("fastllm")


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="run every case, not the pruned set")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A plain `pytest` uses every core; a run of some files, or with -n, is left alone."""
    worker = "PYTEST_XDIST_WORKER" in os.environ  # has the same arguments, must not start others
    whole = config.args_source.name == "TESTPATHS" and not worker
    if whole and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = len(os.sched_getaffinity(0))
        config.option.dist = "worksteal"  # a file of long tests is not one process's


def pytest_configure(config):
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))


def pytest_collection_modifyitems(config, items):
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    pruned = pytest.mark.skip(reason="only with --exhaustive")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("slow") and not config.getoption("--exhaustive"):
            item.add_marker(pruned)
    if part := os.environ.get("FASTLLM_TEST_PART"):  # "1/4": every fourth test, from the second
        first, step = map(int, part.split("/"))
        items[:] = items[first::step]


@pytest.fixture(autouse=True)
def _clean():
    """Every test starts from the same random state and leaves the thread count alone."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _kernels():
    """Tests are small, and about our kernels: nothing goes to torch for its size."""
    from fastllm.core.op import OPS
    from fastllm.nn import worth
    from fastllm.ops.matmul import worth as products
    from fastllm.quant import config

    limits = [(worth, "PASS", 0), (products, "SMALL", 0), (products, "AT_PEAK", frozenset())]
    limits += [(config, "MIN_WEIGHTS", 0)]
    limits += [(op, "stock_first", None) for op in OPS.values()]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in limits]
    for owner, name, value in limits:
        setattr(owner, name, value)
    return before


@pytest.fixture
def by_size(monkeypatch, _kernels):
    """Sizes decide again, as they do for a user."""

    from fastllm.core.op import OPS

    def forget():
        for op in OPS.values():
            op.routes.forget()

    for owner, name, value in _kernels:
        monkeypatch.setattr(owner, name, value)
    forget()
    yield forget
    monkeypatch.undo()
    forget()


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """The tuner at work, with a cache of its own (the path) and nothing shipped."""
    from fastllm.core.tuner import facts, table

    monkeypatch.setattr(table, "MODE", "cached")
    monkeypatch.setenv("FASTLLM_TUNE", "cached")  # for processes that the test starts
    monkeypatch.setenv("FASTLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(facts, "shipped_folder", lambda: tmp_path / "shipped")
    table.forget()
    yield tmp_path
    monkeypatch.undo()
    table.forget()

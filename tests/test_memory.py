"""The output pool: reuse, bounds, lifetime through DLPack, threads, fork."""

import copy
import gc
import io
import os
import subprocess
import sys
import threading

import pytest
import torch

from fastllm import _C
from fastllm.core import memory

MIB = 1 << 20
LARGE = memory.POOL_FROM


@pytest.fixture(autouse=True)
def fresh():
    """Every test starts with nothing idle and a limit of its own, and leaves none of its blocks."""
    gc.collect()
    before = memory.set_limit(64 * LARGE)
    memory.empty_cache()
    live = stats("live_bytes")
    yield
    gc.collect()
    assert stats("live_bytes") == live
    memory.set_limit(before)
    memory.empty_cache()


def stats(name):
    return memory.memory_stats()[name]


def large(times=1.0):
    """A float32 tensor from the pool."""
    return memory.empty((int(LARGE * times) // 4,), torch.float32)


def test_a_dead_tensors_block_is_reused():
    first = large()
    at, reused = first.data_ptr(), stats("reused")
    assert at % (2 * MIB) == 0
    del first
    assert stats("idle_bytes") == LARGE
    assert large().data_ptr() == at
    assert stats("reused") == reused + 1


def test_live_tensors_do_not_share_memory():
    held = [large().fill_(i) for i in range(6)]
    assert len({t.data_ptr() for t in held}) == 6
    assert all((t == i).all() for i, t in enumerate(held))


def test_the_best_block_is_taken_and_little_is_wasted():
    sizes = (4, 2, 2.2)
    held = [large(s) for s in sizes]
    at = {s: t.data_ptr() for s, t in zip(sizes, held, strict=True)}
    held.clear()
    snug = large(2)
    assert snug.data_ptr() == at[2]
    loose = large(1.9)
    assert loose.data_ptr() == at[2.2]
    assert large(1.5).data_ptr() not in at.values()  # 4 is left, too large by far


def test_idle_memory_is_bounded_oldest_first():
    memory.set_limit(3 * LARGE)
    held = [large() for _ in range(5)]
    places = [t.data_ptr() for t in held]
    for _ in range(5):
        held.pop(0)
        assert stats("idle_bytes") <= 3 * LARGE
    assert stats("idle_blocks") == 3
    again = [large() for _ in range(3)]
    assert {t.data_ptr() for t in again} == set(places[2:])
    del again
    memory.set_limit(LARGE)
    assert stats("idle_bytes") == LARGE


def test_empty_cache_gives_all_back():
    del_me = large(3)
    del del_me
    assert stats("idle_blocks") == 1
    memory.empty_cache()
    assert stats("idle_blocks") == stats("idle_bytes") == 0


def test_limit_zero_is_plain_torch():
    assert memory.set_limit(0) == 64 * LARGE
    before = memory.memory_stats()
    for t in (large(2), memory.empty_like(torch.zeros(LARGE // 2))):
        assert t.untyped_storage().resizable()
    assert memory.memory_stats() == before
    with pytest.raises(ValueError, match="limit: expected 0 or more bytes, found -1"):
        memory.set_limit(-1)


def test_small_and_odd_tensors_are_torchs_own():
    before = memory.memory_stats()
    assert memory.empty((3, 0), torch.float32).shape == (3, 0)
    assert memory.empty((LARGE // 8 - 1,), torch.float64).nbytes < LARGE
    assert memory.empty((LARGE // 8,), torch.complex64).dtype is torch.complex64
    assert memory.memory_stats() == before


@pytest.mark.parametrize("dtype", list(memory._TYPES), ids=str)
def test_shapes_and_dtypes(dtype):
    n = LARGE // dtype.itemsize
    made = memory.empty((4, 1, n // 4), dtype)
    assert made.dtype is dtype and made.shape == (4, 1, n // 4) and made.is_contiguous()
    assert made.stride() == torch.empty((4, 1, n // 4), dtype=dtype).stride()
    assert stats("live_blocks") >= 1
    assert torch.equal(made.fill_(3), torch.full((4, 1, n // 4), 3, dtype=dtype))


def test_empty_like_is_contiguous_and_detached():
    like = torch.zeros(64, LARGE // 256, requires_grad=True).t()
    made = memory.empty_like(like)
    assert made.shape == like.shape and made.is_contiguous() and not made.requires_grad
    assert made.untyped_storage().nbytes() == like.nbytes
    small = memory.empty_like(torch.zeros(3, 4).t())
    assert small.shape == (4, 3) and small.is_contiguous()


def test_views_keep_the_block():
    whole = large().fill_(5)
    view = whole[100:200]
    del whole
    assert stats("idle_blocks") == 0
    other = large().fill_(7)
    assert (view == 5).all()
    del view
    assert stats("idle_blocks") == 1
    del other


def test_an_unused_capsule_gives_its_block_back():
    capsule = _C.pool_empty_tensor(2, 32, [LARGE // 4])
    assert stats("live_bytes") >= LARGE
    del capsule
    assert stats("idle_bytes") == LARGE


def test_it_behaves_as_any_tensor():
    t = large()
    torch.nn.init.normal_(t)
    version = t._version
    t.add_(1)
    assert t._version == version + 1
    assert torch.equal(copy.deepcopy(t), t)
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    assert torch.equal(torch.load(file), t)
    assert t.resize_(10, 10).shape == (10, 10)
    assert t.clone().resize_(4 * LARGE).numel() == 4 * LARGE
    # the one thing that it cannot do, as tensors from numpy cannot
    with pytest.raises(RuntimeError, match="not resizable"):
        t.resize_(4 * LARGE)
    shared = large().fill_(2).share_memory_()
    assert shared.is_shared() and (shared == 2).all()


def test_gradients_flow():
    weight = torch.randn(LARGE // 4, requires_grad=True)
    leaf = large().fill_(2.0).requires_grad_()
    (weight * leaf).sum().backward()
    assert torch.equal(leaf.grad, weight.detach()) and (weight.grad == 2).all()
    # a saved tensor that changed is noticed
    out = weight * leaf.detach().mul_(3)
    leaf.data.add_(1)
    saved = large().fill_(1.0)
    product = weight * saved
    saved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    out.sum().backward()


def test_threads():
    """Blocks taken and returned by many threads at once never overlap."""
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        held = []
        for step in range(60):
            size = LARGE * (1 + int(torch.randint(3, (), generator=generator))) // 4
            mark = seed * 1000 + step
            tensor = memory.empty((size,), torch.float32)
            tensor[::4096] = mark
            held.append((mark, tensor))
            if len(held) > 3:
                mark, tensor = held.pop(int(torch.randint(3, (), generator=generator)))
                if not bool((tensor[::4096] == mark).all()):
                    wrong.append(mark)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_block_may_come_back_from_a_thread_without_the_gil():
    """Autograd's own thread drops the last reference to what backward has used."""
    t = large().fill_(1.0)
    x = torch.ones(LARGE // 4, requires_grad=True)
    out = (x * t).sum()
    del t
    live = stats("live_blocks")
    worker = threading.Thread(target=out.backward)
    worker.start()
    worker.join()
    assert stats("live_blocks") == live - 1


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork():
    """Parent and child go on with memory of their own, even while another thread uses the pool."""
    code = """
import os, threading, torch
torch.set_num_threads(1)
from fastllm.core import memory
n = memory.POOL_FROM // 4
kept = memory.empty((n,), torch.float32).fill_(1)
stop = threading.Event()
def churn():
    while not stop.is_set():
        memory.empty((n,), torch.float32)
thread = threading.Thread(target=churn)
thread.start()
codes = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        mine = memory.empty((n,), torch.float32).fill_(2)
        kept.fill_(3)
        del mine
        memory.empty_cache()
        os._exit(0 if bool((kept == 3).all()) else 4)
    codes.append(os.waitpid(child, 0)[1])
stop.set()
thread.join()
print(set(codes), bool((kept == 1).all()))
"""
    done = python(code)
    assert done.stdout.strip() == "{0} True", done.stderr


def test_tensors_may_outlive_the_interpreter():
    code = """
import torch
from fastllm.core import memory
class Holder: pass
torch.kept = Holder()
torch.kept.tensor = memory.empty((memory.POOL_FROM,), torch.float32)
torch.kept.me = torch.kept
print("done")
"""
    done = python(code)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr


def test_the_environment_sets_the_limit():
    code = "from fastllm.core import memory; print(memory.memory_stats()['limit'])"
    assert python(code, FASTLLM_POOL_BYTES="123456789").stdout.strip() == "123456789"
    assert python(code, FASTLLM_POOL_BYTES="0").stdout.strip() == "0"
    assert int(python(code, FASTLLM_POOL_BYTES="").stdout) >= 64 * MIB
    wrong = python(code, FASTLLM_POOL_BYTES="2GB")
    assert wrong.returncode == 1
    assert "FASTLLM_POOL_BYTES: expected a number of bytes, found '2GB'" in wrong.stderr


@pytest.mark.parametrize("shape", [(1 << 50,), (1 << 60,), (1 << 62, 64)])
def test_more_than_there_is_is_a_memory_error(shape):
    before = stats("live_blocks")
    with pytest.raises(MemoryError):
        memory.empty(shape, torch.float32)
    assert stats("live_blocks") == before

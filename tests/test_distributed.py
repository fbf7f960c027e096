"""Two gloo processes: ops on DTensor, as tensor and sequence parallel training uses them."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastllm.functional as F


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def sequence_parallel(rank, port):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    x, r, w, dy = (
        torch.randn(2, 6, 32),
        torch.randn(2, 6, 32),
        torch.randn(32),
        torch.randn(2, 6, 32),
    )

    def step(x, r, w, dy):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y, h = F.add_rms_norm(x, r, (32,), w, 1e-6)
        z = F.layer_norm(y + h, (32,), w, None)
        return z, *torch.autograd.grad(z, (x, w), dy)

    expected = step(x, r, w, dy)
    sharded = [distribute_tensor(t, mesh, [Shard(1)]) for t in (x, r, dy)]
    weight = distribute_tensor(w, mesh, [Replicate()])
    found = step(sharded[0], sharded[1], weight, sharded[2])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.full_tensor(), b, rtol=1e-5, atol=1e-5)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_sequence_parallel_norms():
    mp.spawn(sequence_parallel, (free_port(),), nprocs=2)

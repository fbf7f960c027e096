"""Optimizers on DTensors in two gloo processes, and states through distributed checkpoints."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import Parameter

from fastllm import optim
from fastllm.optim import states

KEPT = ["fp32", "bf16", "int8", "fp8"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def gradients(shapes, steps=4):
    g = torch.Generator().manual_seed(3)
    return [[torch.randn(s, generator=g) for s in shapes] for _ in range(steps)]


def sharded(rank, port):
    """Shards are stepped as the whole tensors are, clipping to the whole norm included."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    shapes, places = ((128, 96), (65, 40), (33,)), ([Shard(0)], [Shard(1)], [Replicate()])
    start = gradients(shapes, 1)[0]
    for cls, options in (
        (optim.AdamW, {"max_grad_norm": 0.5}),
        (optim.SGD, {"momentum": 0.9, "max_grad_norm": 0.5}),
        (optim.AdamW, {"state_dtype": "bf16"}),
        (optim.AdamW, {"state_dtype": "int8"}),
    ):
        whole, other = ([Parameter(t.clone()) for t in start] for _ in range(2))
        parts = [
            Parameter(distribute_tensor(t.clone(), mesh, p))
            for t, p in zip(start, places, strict=True)
        ]
        one, many = cls(whole, lr=0.01, **options), cls(parts, lr=0.01, **options)
        chance = cls(other, lr=0.01, seed=1, **options)
        for grads in gradients(shapes):
            for p, r, q, g, place in zip(whole, other, parts, grads, places, strict=True):
                p.grad, r.grad, q.grad = g.clone(), g.clone(), distribute_tensor(g, mesh, place)
            one.step()
            many.step()
            chance.step()
        assert many.backend_used == "cpu"
        if "max_grad_norm" in options:
            assert abs(one.grad_norm - many.grad_norm) <= 1e-5 * one.grad_norm
        # small states are rounded at random, and a shard draws its own: it is no farther from the
        # whole than the whole with another seed is
        for p, r, q, t in zip(whole, other, parts, start, strict=True):
            size = (p - t).norm()
            off, drawn = (q.full_tensor() - p).norm() / size, (r - p).norm() / size
            assert off <= 1.2 * drawn + 2e-5, (cls, options, off, drawn)
    parts[0].grad = distribute_tensor(gradients(shapes, 1)[0][0], mesh, places[0])
    for cls in (optim.LAMB, optim.Adafactor, optim.Muon):
        with pytest.raises(RuntimeError, match="DTensor"):
            cls([parts[0]]).step()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_shards():
    mp.spawn(sharded, (free_port(),), nprocs=2)


@pytest.mark.parametrize("kept", KEPT)
def test_distributed_checkpoint(kept, tmp_path):
    """Codes, scales and steps come back from DCP as they were, and the run goes on bit by bit."""
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(0)
    p, q = Parameter(torch.randn(96, 64)), Parameter(torch.randn(9))
    optimizer = optim.AdamW([p, q], lr=0.01, state_dtype=kept)

    def train(optimizer, params, seed):
        for grads in gradients([x.shape for x in params], 3 + seed)[seed:]:
            for x, g in zip(params, grads, strict=True):
                x.grad = g
            optimizer.step()

    train(optimizer, (p, q), 0)
    saved = optimizer.state_dict()
    dcp.save({"optimizer": saved}, checkpoint_id=str(tmp_path), no_dist=True)
    a, b = Parameter(p.detach().clone()), Parameter(q.detach().clone())
    again = optim.AdamW([a, b], lr=0.01, state_dtype=kept)
    loaded = copy.deepcopy(saved)
    for state in loaded["state"].values():
        for value in state.values():
            states.flat(value.view(torch.uint8) if value.dim() else value).zero_()
    dcp.load({"optimizer": loaded}, checkpoint_id=str(tmp_path), no_dist=True)
    again.load_state_dict(loaded)
    for number, state in saved["state"].items():
        for name, value in state.items():
            found = again.state_dict()["state"][number][name]
            assert found.dtype == value.dtype
            assert torch.equal(found.float(), value.float())
    train(optimizer, (p, q), 1)
    train(again, (a, b), 1)
    assert torch.equal(a, p) and torch.equal(b, q)

"""One of several processes that train a model together: `torchrun --nproc-per-node 2 ... HOW FOLDER`.

Writes what each rank computed to FOLDER/rank{N}.pt, for test_distributed.py to compare.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerated import images, pair
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastvit
from fastvit.recording import recording

BATCH = 8


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(model, x, world):
    """One SGD step on this rank's share; the whole loss, gradients and weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recording() as recorder:
        loss = model(x).square().mean()
    loss.backward()
    grads = {name.removeprefix("module."): whole(p.grad).clone() for name, p in model.named_parameters()}
    optimizer.step()
    total = loss.detach()
    if world > 1:
        dist.all_reduce(total)
    weights = {n.removeprefix("module."): whole(p.detach()).clone() for n, p in model.named_parameters()}
    fallbacks = [event.reason for event in recorder.events if event.op is None]
    backends = {event.backend for event in recorder.events if event.op == "layer_norm_mlp"}
    facts = {"fallbacks": fallbacks, "backends": sorted(backends)}
    return {"loss": total / world, "grads": grads, "weights": weights} | facts


def sharded(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def main(how: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    _, model = pair(img_size=32)
    share = images(batch=BATCH).chunk(world)[rank]
    mesh = init_device_mesh("cpu", (world,))
    with fastvit.use_backend("cpp"):
        if how == "ddp":
            result = step(DistributedDataParallel(model.train()), share, world)
        else:
            result = step(sharded(model.train(), mesh), share, world)
            dcp.save(get_model_state_dict(model), checkpoint_id=folder / "sharded")
            _, other = pair(img_size=32)
            with torch.no_grad():
                [p.zero_() for p in other.parameters()]
            state = get_model_state_dict(sharded(other, mesh))
            dcp.load(state, checkpoint_id=folder / "sharded")
            set_model_state_dict(other, state)
            loaded = {name: whole(p.detach()).clone() for name, p in other.named_parameters()}
            result |= {"loaded": loaded}
    torch.save(result, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

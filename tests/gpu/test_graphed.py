"""A graphed model on a GPU: the model's bits from one launch, on any stream, with the weights of now."""

import pytest
import torch
from gpu_calls import DELAY, HOPPER, LIBRARY
from torch import nn
from torch.autograd import DeviceType

import fastvit
from fastvit import graphed, use_backend
from fastvit.backends import kernels_for
from fastvit.ops import choices
from fastvit.verification import randomize

pytestmark = pytest.mark.needs(runtime=True)
TIMM = pytest.mark.needs(package="timm")
SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 192, "depth": 3, "num_heads": 3}
MODELS = ["fastvit", *(pytest.param(f"timm, {mode}", marks=TIMM) for mode in ("train", "inference"))]


def ours():
    return use_backend(**kernels_for("cuda"))


BACKENDS = {"torch's": lambda: use_backend("reference"), "ours": ours}
EACH = ["torch's", pytest.param("ours", marks=LIBRARY)]


def model_of(kind="fastvit", dtype=torch.bfloat16, **options):
    options = SMALL | {"init_values": 0.1} | options
    if kind == "fastvit":
        model = fastvit.VisionTransformer(**options)
    else:
        import timm

        model = timm.create_model("vit_tiny_patch16_224", **options)
        fastvit.accelerate(model, mode=kind.removeprefix("timm, "))
    return randomize(model).to("cuda", dtype).eval()


def images(batch=8, dtype=torch.bfloat16, seed=0, size=64, device="cuda"):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator, device=device, dtype=dtype)


def assert_replays(runner, x):
    """The model's bits, from a graph."""
    before, found, expected = replays(runner), runner(x), runner.model(x)
    assert torch.equal(found, expected)
    assert replays(runner) > before, runner.explain()
    return found


def replays(runner):
    return sum(bucket.replays for bucket in runner._buckets.values())


@pytest.fixture(autouse=True)
def _no_grad(gpu):
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", EACH)
def test_the_bits_are_the_models(kind, dtype, backend):
    runner = graphed(model_of(kind, dtype))
    with BACKENDS[backend]():
        for seed in range(3):
            for batch in (8, 1):
                assert_replays(runner, images(batch, dtype, seed))
        assert_replays(runner, images(8, dtype).to(memory_format=torch.channels_last))
    assert len(runner._buckets) == 3


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backend", EACH)
def test_autocast(kind, backend):
    runner = graphed(model_of(kind, torch.float32))
    with BACKENDS[backend]():
        for _ in range(2):  # blocks of autocast: a cast in the cache of the first does not outlive it
            with torch.autocast("cuda", torch.bfloat16):
                for seed in range(2):
                    assert_replays(runner, images(8, torch.float32, seed))
            torch.cuda.empty_cache()
        assert_replays(runner, images(8, torch.float32))
    assert len(runner._buckets) == 2


def test_image_sizes_share_one_runner():
    runner = graphed(model_of(dynamic_img_size=True))
    for size in (64, 96, 64, 32, 96):
        assert_replays(runner, images(size=size))
    assert len(runner._buckets) == 3


def stepped(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.01, fused=True).step()


def edited_as_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.25)
    fastvit.refresh(model)


def in_place(model):
    for parameter in model.parameters():
        parameter.mul_(1.25)


def assigned(model):
    model.load_state_dict({name: t * 1.25 for name, t in model.state_dict().items()}, assign=True)


def to_the_cpu_and_back(model):
    in_place(model.cpu())
    torch.cuda.empty_cache()  # what the graph read would be unmapped, if nobody held it
    model.cuda()


# (change, whether it is followed without another capture)
CHANGES = {
    "in place": (in_place, True),
    "a fused step": (stepped, True),
    "through data, and refresh": (edited_as_data, True),
    "assigned": (assigned, False),
    "to the CPU and back": (to_the_cpu_and_back, False),
}


@LIBRARY
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("change", CHANGES)
def test_weights_are_followed(kind, change):
    edit, without_capture = CHANGES[change]
    runner = graphed(model_of(kind))
    with ours():
        before = assert_replays(runner, images())
        assert_replays(runner, images(1))
        captured = list(runner._buckets.values())
        edit(runner.model)
        assert not torch.equal(assert_replays(runner, images()), before)
        assert_replays(runner, images(1))
    assert (list(runner._buckets.values()) == captured) is without_capture


def test_another_dtype_is_captured_again():
    runner = graphed(model_of())
    assert_replays(runner, images())
    runner.model.half()
    assert_replays(runner, images(dtype=torch.float16))


@LIBRARY
@TIMM
def test_a_replay_runs_no_more_kernels_than_the_model():
    """So that what is derived from weights is not derived at each replay."""
    runner, x = graphed(model_of("timm, inference")), images()
    with ours():
        assert_replays(runner, x)
        eager, graph = kernels_of(lambda: runner.model(x)), kernels_of(lambda: runner(x))
    assert len(graph) <= len(eager) + 2  # the copies in and out, where those are kernels


def test_a_replay_is_one_launch():
    runner, x = graphed(model_of(), clone=False), images()
    assert_replays(runner, x)
    with torch.profiler.profile() as profile:
        runner(x)
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("cudaGraphLaunch") == 1
    assert sum(count for name, count in counts.items() if "LaunchKernel" in name) <= 1  # the copy in


def test_calls_on_two_streams_do_not_overlap():
    runner = graphed(model_of())
    inputs = [images(batch, seed=seed) for seed in range(4) for batch in (8, 1)]
    expected = [runner.model(x) for x in inputs]
    runner.capture(inputs[0])
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(streams[i % 2]):
            if i % 3 == 0:
                torch.cuda._sleep(DELAY)
            found.append(runner(x))
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected))


def test_a_replay_waits_for_what_gives_its_input():
    runner, x = graphed(model_of()), images()
    expected, late = assert_replays(runner, x), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(DELAY)
        late.copy_(x)
        found = runner(late)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_buckets_share_memory():
    sizes = (64, 48, 32, 16)
    model, x = model_of(img_size=224, embed_dim=768, num_heads=12), images(64, size=224)
    reserved = {}
    for used in (sizes[:1], sizes):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        runner = graphed(model, used).capture(x)
        torch.cuda.empty_cache()
        reserved[used] = torch.cuda.memory_reserved() - before
        assert len(runner._buckets) == len(used)
        runner.reset()
    own = sum(x[:size].nbytes for size in sizes[1:])
    assert reserved[sizes] < reserved[sizes[:1]] + own + 2**25


def test_reset_frees_everything():
    runner, x = graphed(model_of()), images()
    runner.capture(x).reset()  # cuBLAS's workspaces stay
    before = torch.cuda.memory_allocated()
    runner.capture(x)
    assert torch.cuda.memory_allocated() > before
    runner.reset()
    assert torch.cuda.memory_allocated() == before


def test_padding():
    model = model_of()
    runner = graphed(model, (4, 8), pad=True).capture(images())
    for batch in (8, 5, 3, 7, 1):
        x = images(batch, seed=batch)
        padded = torch.cat([x, x.new_zeros(4 * (1 + (batch > 4)) - batch, *x.shape[1:])])
        assert torch.equal(runner(x), model(padded)[:batch])
        torch.testing.assert_close(runner(x), model(x), rtol=0.05, atol=0.05)


class Breaks(nn.Module):
    """In a capture, or already where it is looked at before one."""

    def __init__(self, how):
        super().__init__()
        self.how, self.linear = how, nn.Linear(64, 64)

    def forward(self, x):
        x = self.linear(x)
        if self.how == "reads back":
            return x * (2 if x.sum().item() > 0 else 3)
        return x * torch.tensor([2.0], device=x.device)  # a copy from pageable memory


@pytest.mark.parametrize("how", ["reads back", "copies to the GPU"])
def test_cuda_is_usable_after_what_cannot_be_captured(how):
    runner, x = graphed(Breaks(how).cuda().eval()), torch.randn(8, 64, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="runs eagerly"):
        found = runner(x)
    assert torch.equal(found, runner.model(x))
    assert torch.equal(runner(x), found)
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.empty_cache()
    assert torch.randn(4, device="cuda").isfinite().all()
    assert_replays(graphed(model_of()), images())


@pytest.mark.needs(gpus=2)
def test_the_gpu_of_the_model():
    runner = graphed(model_of().to("cuda:1"))
    assert_replays(runner, images(device="cuda:1"))
    assert torch.cuda.current_device() == 0


def kernels_of(function):
    """The names of the kernels that it launches, copies and fills left out."""
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


@LIBRARY
@TIMM
@pytest.mark.parametrize("fused", [pytest.param(False, id="8"), pytest.param(True, id="7", marks=HOPPER)])
def test_how_many_kernels_a_block_is(fused, gpu):
    """Norm, qkv; attention; projection; norm, fc1, activation (in fc1, if fused), fc2."""
    base = {"img_size": 224, "embed_dim": 768, "depth": 1, "num_heads": 12}
    block = model_of("timm, inference", **base).blocks[0]
    x = torch.randn(8, 197, 768, device=gpu, dtype=torch.bfloat16)
    with ours(), choices.fusing(fused):
        block(x)  # compiles, and derives weights
        names = kernels_of(lambda: block(x))
    assert 0 < len(names) <= (7 if fused else 8), "\n".join(names)

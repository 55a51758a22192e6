"""Random sequences of what people do with a model, each step done to an accelerated model and to its twin.

A step says what it draws before it does it, and raises where the two differ.
"""

import contextlib
import copy
import gc
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from tiny_twins import assert_close, assert_same_weights, images, output, pair
from torch import Tensor, nn
from weight_writers import BROAD, NARROW, WRITERS
from writing import delta, other_state

import fastvit
from fastvit import backends

# Who was called by hooks: (whose, module).
CALLS: list[tuple[str, str]] = []


class Hook:
    """Counts the calls of a module, and may change what it returns; copied and pickled with the model."""

    def __init__(self, whose: str, module: str, factor: float) -> None:
        self.called, self.factor = (whose, module), factor

    def __call__(self, module, args, out):
        CALLS.append(self.called)
        return self.factor * out if isinstance(out, Tensor) and self.factor != 1 else None


class Alone(nn.Module):
    """The model, which returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return output(self.model, x)


class Both:
    """An accelerated model and its twin, and what was done to them."""

    def __init__(self, family: str, mode: str) -> None:
        self.ours, self.twin = pair(family, mode)
        self.mode = mode
        self.frames = contextlib.ExitStack()
        self.runner: fastvit.graphed | None = None
        self.done: list[str] = []

    def say(self, detail: object) -> None:
        """Of the step that is being done."""
        self.done[-1] += f" {detail}"

    def __iter__(self):
        return iter((self.ours, self.twin))

    def compare(self, batch: int = 2) -> None:
        """What both compute, what a runner of ours replays, and how often hooks are called."""
        x = images(batch)
        with torch.no_grad():
            found, called = outputs_and_calls(self.ours, x)
            expected, by_twin = outputs_and_calls(self.twin, x)
            assert_close(found, expected)
            assert called == by_twin, f"hooks are called {called}, the twin's {by_twin}"
            if self.runner is not None and self.runner.model is self.ours:
                replayed = self.runner(x.to(found.dtype))
                assert_close(replayed if isinstance(replayed, Tensor) else replayed[0], expected)


def outputs_and_calls(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, int]]:
    CALLS.clear()
    return output(model, x), Counter(module for _, module in CALLS)


def write(both: Both, rng: random.Random) -> None:
    allowed = [*BROAD, *(NARROW if both.mode == "train" else ())]
    name = rng.choice(allowed)
    both.say(name)
    for fast, plain in zip(*map(WRITERS[name], both), strict=True):
        both.ours, both.twin = fast, plain
        assert_same_weights(*both)
        both.compare()


def forward(both: Both, rng: random.Random) -> None:
    batch, inference = rng.randint(1, 5), rng.random() < 0.3
    both.say(f"of {batch}{' in inference mode' * inference}")
    with torch.inference_mode(inference):
        both.compare(batch)


def step(both: Both, rng: random.Random) -> None:
    """Gradients are compared; then the twin's serve both, so that rounding does not add up."""
    x, name = images(rng.randint(1, 4)), rng.choice(("SGD", "AdamW", "Adam"))
    options = {rng.choice(("fused", "foreach", "maximize")): True, "lr": rng.choice((0.001, 0.03))}
    both.say(f"{name} {options}")
    for model in both:
        model.train().zero_grad()
        output(model, x).square().mean().backward()
    expected = {n: p.grad for n, p in both.twin.named_parameters()}
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name_of, p in both.ours.named_parameters():
        assert (p.grad is None) == (expected[name_of] is None), name_of
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name_of], rtol=1e-3, atol=1e-4 * largest, msg=name_of)
            p.grad = expected[name_of].clone()
    for model in both:
        getattr(torch.optim, name)(model.parameters(), **options).step()
        model.eval().zero_grad()
    both.compare()


def load(both: Both, rng: random.Random) -> None:
    assign = rng.random() < 0.5
    both.say(f"assign={assign}")
    state = other_state(both.twin)
    for model in both:
        model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=assign)
    both.compare()


def convert(both: Both, rng: random.Random) -> None:
    dtype = rng.choice((torch.float16, torch.bfloat16, torch.float64))
    both.say(f"to {dtype} and back")
    for model in both:
        model.to(dtype)
    if dtype == torch.float64:
        both.compare()
    for model in both:
        model.float()
    both.compare()


def restore(both: Both, rng: random.Random) -> None:
    fastvit.restore(both.ours)
    both.mode = "train"
    both.compare()


def accelerate(both: Both, rng: random.Random) -> None:
    both.mode = rng.choice(("train", "inference"))
    options = {"checkpoint": rng.choice((None, "mlp"))}
    if rng.random() < 0.3:
        options["ops"] = rng.sample(sorted(backends.TABLE), 3)
    both.say(f"{both.mode} {options}")
    fastvit.accelerate(both.ours, both.mode, **options)
    both.compare()


def go_on_with_a_copy(both: Both, rng: random.Random) -> None:
    left = both.ours
    both.ours, both.twin = copy.deepcopy(both.ours), copy.deepcopy(both.twin)
    for name, p in left.named_parameters():
        p.data.add_(delta(name, p))  # of no concern to the copy
    both.compare()


def graph(both: Both, rng: random.Random) -> None:
    both.runner = fastvit.graphed(both.ours, (1, 2))
    for batch in (2, 1, 2):
        both.compare(batch)


def trace(both: Both, rng: random.Random) -> None:
    """Traced modules share the model's weights, and follow what is written there and what they load."""
    x = images(2)
    with torch.no_grad():
        traced = [torch.jit.trace(Alone(model), x, check_trace=False) for model in both]
        assert_close(*(each(x) for each in traced))
        for model in both:
            for name, p in model.named_parameters():
                p.data.add_(delta(name, p))
        assert_close(*(each(x) for each in traced))
        state = other_state(traced[1])
        for each in traced:
            each.load_state_dict(state)
        assert_close(*(each(x) for each in traced))
    del traced, each
    gc.collect()  # as long as they live, torch swaps no parameter of theirs
    both.compare()


def checkpoint(both: Both, rng: random.Random) -> None:
    """In training what was computed is computed again in backward, by the library's own switch or by ours."""
    on, switch = rng.random() < 0.7, "accelerate(checkpoint='mlp')"
    if hasattr(both.twin, "set_grad_checkpointing") and rng.random() < 0.7:
        switch = f"set_grad_checkpointing({on})"
        for model in both:
            model.set_grad_checkpointing(on)
    elif hasattr(both.twin, "gradient_checkpointing_enable") and rng.random() < 0.7:
        switch = f"gradient checkpointing {'on' if on else 'off'}"
        for model in both:
            (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
    else:
        fastvit.accelerate(both.ours, both.mode, checkpoint="mlp")
    both.say(f"{switch}, step")
    step(both, rng)


def hook(both: Both, rng: random.Random) -> None:
    ours = dict(both.ours.named_modules())
    names = [name for name, _ in both.twin.named_modules() if name in ours and name]
    if isinstance(both.ours, fastvit.VisionTransformer):
        # fastvit's own shows attention's weights to a hook, and timm's fused attention passes it by.
        names = [name for name in names if not name.endswith("attn_drop")]
    name = rng.choice(names)
    factor = rng.choice((1.0, 1.0, 1.3))
    both.say(f"on {name}, times {factor}")
    ours[name].register_forward_hook(Hook("ours", name, factor))
    both.twin.get_submodule(name).register_forward_hook(Hook("twin", name, factor))
    both.compare()
    both.compare()


def unhook(both: Both, rng: random.Random) -> None:
    names = [name for name, module in both.twin.named_modules() if module._forward_hooks]
    both.say(f"of {names[:1]}")
    for name in names[:1]:
        for model in both:
            model.get_submodule(name)._forward_hooks.popitem()
    both.compare()


def threads(both: Both, rng: random.Random) -> None:
    batches = [rng.randint(1, 4) for _ in range(4)]
    both.say(f"with batches {batches}")

    def run(batch: int) -> Tensor:
        with torch.no_grad():
            return output(both.ours, images(batch))

    # Triton's interpreter has one state for all threads.
    no_triton = fastvit.use_backend(patch_embed="reference", attention="reference")
    with no_triton, ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, batches))
    with torch.no_grad():
        for out, batch in zip(found, batches, strict=True):
            assert_close(out, output(both.twin, images(batch)))


FRAMES = ({"name": "reference"}, {"name": "cpp"}, {"layer_norm_mlp": "cpp"}, {"linear_residual": "reference"})


def frame(both: Both, rng: random.Random) -> None:
    chosen = rng.choice((None, *FRAMES))
    both.say(chosen or "no more")
    if chosen is None:
        both.frames.close()
    else:
        both.frames.enter_context(fastvit.use_backend(**chosen))
    both.compare()


Action = Callable[[Both, random.Random], None]
# How often each is drawn.
OFTEN: dict[int, tuple[Action, ...]] = {
    10: (write,),
    3: (forward, step, accelerate, frame),
    2: (load, convert, graph, checkpoint, hook),
    1: (restore, go_on_with_a_copy, trace, unhook, threads),
}
ACTIONS = [action for times, actions in OFTEN.items() for action in actions * times]

"""Accelerated models under torch.func's transforms and forward-mode derivatives: as the original has them."""

import copy

import huggingface_models
import pytest
import torch
import transformers as hf
from accelerated import images, pair
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap

import fastvit
from fastvit import BackendUnavailable
from fastvit.accelerate.idle import ATTRIBUTE
from fastvit.verification import randomize

X = images(2)


class Tokens(nn.Module):
    """A model of transformers, with tensors for its output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).last_hidden_state


def _timm(kind):
    model = pair(kind, depth=1)[0]
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # torch's fused attention has no forward-mode derivative
    return model


def _huggingface(kind, config, **options):
    small = huggingface_models.MLP | {"num_hidden_layers": 1} | options
    return Tokens(randomize(kind(config(**small, attn_implementation="eager")).eval())).eval()


MODELS = {
    "timm vit": lambda: _timm("vit"),
    "hf vit": lambda: _huggingface(hf.ViTModel, hf.ViTConfig),
    "hf dinov3": lambda: _huggingface(hf.DINOv3ViTModel, hf.DINOv3ViTConfig, layerscale_value=0.5),
}


@pytest.fixture(scope="module", params=MODELS)
def both(request):
    model = MODELS[request.param]()
    return model, fastvit.accelerate(copy.deepcopy(model), mode="inference")


def _weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def _directions(weights):
    return {name: torch.full_like(p, 0.01) for name, p in weights.items()}


def _jvp(model):
    weights = _weights(model)
    return jvp(lambda w: functional_call(model, w, (X,)), (weights,), (_directions(weights),))[1]


def _dual_weights(model):
    weights = _weights(model)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(w, torch.full_like(w, 0.01)) for name, w in weights.items()}
        return forward_ad.unpack_dual(functional_call(model, duals, (X,))).tangent


def _dual_images(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


def _ensemble(model):
    members = [copy.deepcopy(model) for _ in range(2)]
    for parameter in members[1].parameters():
        parameter.data.mul_(1.1)
    weights, buffers = stack_module_state(members)
    return vmap(lambda *state: functional_call(model, state, (X,)))(weights, buffers)


def _batch_of_batches(model):
    return vmap(model)(torch.stack([X, 2 * X]))


def _gradients_per_sample(model):
    def loss(weights, x):
        return functional_call(model, weights, (x[None],)).square().sum()

    return vmap(grad(loss), (None, 0))(_weights(model), X)


def _jacobian_backward(model):
    return jacrev(lambda x: model(x).flatten()[:3])(X)


def _jacobian_forward(model):
    name, bias = next((n, p) for n, p in _weights(model).items() if n.endswith("norm1.bias") or "norm" in n)
    return jacfwd(lambda b: functional_call(model, {name: b}, (X,)))(bias)


def _hessian_times_vector(model):
    def loss(weights):
        return functional_call(model, weights, (X,)).square().sum()

    weights = _weights(model)
    return jvp(grad(loss), (weights,), (_directions(weights),))[1]


TRANSFORMS = (
    *(_jvp, _dual_weights, _dual_images, _ensemble, _batch_of_batches, _gradients_per_sample),
    *(_jacobian_backward, _jacobian_forward, _hessian_times_vector),
)


# The very numbers of the original: it is its modules that run. An accelerated model has run before, as usual.
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*does not have a batching rule")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)
@pytest.mark.parametrize(("backend", "recorded"), [("auto", False), ("reference", True)])
def test_is_as_the_original_has_it(both, transform, backend, recorded):
    model, fast = both
    with torch.set_grad_enabled(recorded), fastvit.use_backend(backend):
        torch.testing.assert_close(transform(fast), transform(model), rtol=0, atol=0)


def test_a_kernel_that_is_named_says_why_not():
    fast = pair()[1]
    with fastvit.use_backend("cpp"), pytest.raises(BackendUnavailable, match="no rules for torch.func"):
        vmap(fast)(torch.stack([X, X]))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_no_block_remembers_a_transform_or_a_trace():
    """A call like it, of the same shape, is one that kernels may serve."""
    fast = pair()[1]
    with torch.no_grad():
        vmap(fast)(X[None])
        torch.jit.trace(fast, (X,), check_trace=False)
    assert not any(ATTRIBUTE in vars(module) for module in fast.modules())

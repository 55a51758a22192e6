"""torchvision's and open_clip's vision transformers, small, and what each is called with."""

import open_clip
import torch
from library_parity import images
from torch import Tensor, nn
from torchvision.models import VisionTransformer


def torchvision_model(**options) -> tuple[nn.Module, dict[str, Tensor]]:
    """ViT of torchvision, two blocks wide 64."""
    sizes = {"image_size": 32, "patch_size": 8, "num_classes": 60}
    blocks = {"num_layers": 2, "num_heads": 2, "hidden_dim": 64, "mlp_dim": 96}
    torch.manual_seed(0)
    return VisionTransformer(**(sizes | blocks | options)), {"x": images(24)}


def open_clip_model(vision: dict | None = None, text: dict | None = None, **options):
    """CLIP of open_clip, with LayerScale in the vision tower."""
    torch.manual_seed(0)
    tower = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2, "mlp_ratio": 1.5}
    tower |= {"ls_init_value": 0.5} | (vision or {})
    words = {"context_length": 12, "vocab_size": 50, "width": 64, "heads": 2, "layers": 2} | (text or {})
    model = open_clip.CLIP(embed_dim=32, vision_cfg=tower, text_cfg=words, **options)
    tokens = torch.randint(1, 49, (8, 12), generator=torch.Generator().manual_seed(2))
    return model, {"image": images(), "text": tokens}

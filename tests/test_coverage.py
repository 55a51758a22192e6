"""What explain says of timm's architectures is what they do: `make coverage` asks all, this a share."""

import pytest
import torch

from fastvit_benchmarks import coverage

# One for each thing that its class can be asked for. Left out: those that differ in sizes only, and those
# that take over half a minute.
SERVED = (
    *("vit_tiny_patch16_224", "vit_small_patch32_224", "vit_base_patch8_224", "vit_base_patch16_224_miil"),
    *("vit_medium_patch16_gap_240", "vit_base_patch32_clip_224", "vit_base_patch16_clip_quickgelu_224"),
    *("vit_base_patch16_siglip_224", "vit_so400m_patch14_siglip_gap_224", "vit_small_patch14_reg4_dinov2"),
    *("vit_giant_patch14_dinov2", "vit_intern300m_patch14_448", "vit_wee_patch16_reg1_gap_256"),
    *("vit_little_patch16_reg4_gap_256", "vit_so150m_patch16_reg4_map_256", "aimv2_large_patch14_224"),
    *("beit3_base_patch16_224", "flexivit_small", "vit_base_patch16_radio_v3", "test_vit2", "test_vit4"),
    *("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"),
    *("vit_tiny_r_s16_p8_224", "vitamin_small_224", "eva_large_patch14_196", "eva02_tiny_patch14_224"),
    *("eva02_base_patch16_clip_224", "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3"),
    *(
        "vit_medium_patch16_rope_reg1_gap_256",
        "vit_base_patch16_rope_ape_224",
        "vit_base_patch16_rope_mixed_224",
    ),
    *("vit_pe_core_tiny_patch16_384", "vit_pe_lang_large_patch14_448"),
)
LEFT_ALONE = {
    "vit_base_patch16_rpn_224": "its norms come behind attention and MLP",
    "vit_base_patch16_xp_224": "its attention and MLP are parallel",
    "vit_small_patch16_18x2_224": "its attentions are parallel",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention",
}


@pytest.mark.parametrize("name", SERVED)
def test_every_block_is_served_and_right(name):
    line = coverage.line(name, depth=1)
    assert line.blocks == 1.0, line.reasons
    assert line.within
    stem = "_r_s16" in name or "vitamin" in name
    apart = "distilled" in name or "aimv2" in name  # tokens of its own, and a norm behind the projection
    assert line.embedding == (not stem and not apart), line.reasons


@pytest.mark.parametrize(("name", "reason"), LEFT_ALONE.items())
def test_what_is_left_alone_is_right_too(name, reason):
    line = coverage.line(name, depth=1)
    assert line.blocks == 0.0
    assert line.within
    assert any(reason in said for said in line.reasons)


def test_a_claim_that_a_run_does_not_bear_out_is_found(monkeypatch):
    monkeypatch.setattr(coverage, "calls", lambda model: {("blocks.0", "attention")})
    with pytest.raises(AssertionError, match="explain alone says"):
        coverage.line("test_vit", depth=1)


def test_the_families_are_the_ones_that_are_counted():
    assert {family: len(coverage.architectures(family)) for family in coverage.FAMILIES} == {
        "VisionTransformer": 206,
        "Eva": 65,
    }


def test_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(coverage, "FAMILIES", {"VisionTransformer": ("vision_transformer",)})
    monkeypatch.setattr(
        coverage, "architectures", lambda family: ["test_vit", "vit_dwee_patch16_reg1_gap_256"]
    )
    coverage.main(tmp_path / "docs" / "coverage.md", depth=1)
    text = (tmp_path / "docs" / "coverage.md").read_text()
    assert "VisionTransformer: every block served in 1 of 2 architectures" in text
    assert "| test_vit | 100% | fused |" in text
    assert f"torch {torch.__version__}" in text

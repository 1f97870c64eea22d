"""The models of the sweep: their names, and how each is built with random weights and a batch that it takes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from zoo import import_timm, import_torchvision

TORCHVISION = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "squeezenet1_0",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vgg11_bn",
    "vit_b_32",
    "wide_resnet50_2",
    "segmentation.fcn_resnet50",
    "segmentation.deeplabv3_mobilenet_v3_large",
    "segmentation.lraspp_mobilenet_v3_large",
    "video.r3d_18",
    "video.mc3_18",
    "video.r2plus1d_18",
    "video.s3d",
    "video.swin3d_t",
    "video.mvit_v1_b",
]

#: The smallest model of each of timm's families (a family is a file of timm.models).
TIMM = {
    "beit": "beit_base_patch16_224", "byoanet": "halonet_h1", "byobnet": "test_byobnet", "cait": "cait_xxs24_224",
    "coat": "coat_tiny", "convit": "convit_tiny", "convmixer": "convmixer_768_32", "convnext": "test_convnext",
    "cpubone": "cpubone_nano", "crossvit": "crossvit_tiny_240", "csatv2": "csatv2", "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny", "davit": "davit_tiny", "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224", "densenet": "densenet121", "dla": "dla46x_c", "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small", "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0", "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0", "efficientvit_msra": "efficientvit_m0", "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0", "fastvit": "fastvit_t8", "focalnet": "focalnet_tiny_srf", "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m", "ghostnet": "ghostnet_050", "hardcorenas": "hardcorenas_b", "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224", "hieradet_sam2": "sam2_hiera_tiny", "hrnet": "hrnet_w18_small", "iformer": "iformer_t",
    "inception_next": "inception_next_atto", "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3", "inception_v4": "inception_v4", "lcnetv2": "lcnetv2_small", "levit": "levit_128s",
    "lowformer": "lowformer_b0", "mambaout": "test_mambaout", "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformerv2_s12", "mlp_mixer": "gmlp_ti16_224", "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base", "mobilevit": "mobilevit_xxs", "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap", "nasnet": "nasnetalarge", "nest": "jx_nest_tiny",
    "nextvit": "nextvit_small", "nfnet": "test_nfnet", "pit": "pit_ti_224", "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0", "qwen3_vit": "qwen3_vit_88m", "rdnet": "rdnet_tiny", "regnet": "regnetx_002",
    "repghost": "repghostnet_050", "repvit": "repvit_m1", "res2net": "res2next50", "resnest": "resnest14d",
    "resnet": "resnet10t", "resnetv2": "resnetv2_18", "rexnet": "rexnet_100", "selecsls": "selecsls42",
    "senet": "legacy_seresnet18", "sequencer": "sequencer2d_s", "shvit": "shvit_s1", "sknet": "skresnet18",
    "starnet": "starnet_s050", "swiftformer": "swiftformer_xs", "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256", "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224", "tnt": "tnt_s_legacy_patch16_224", "tresnet": "tresnet_m",
    "twins": "twins_svt_small", "vgg": "vgg11", "visformer": "visformer_tiny", "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224", "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224", "vitamin": "vitamin_small_224", "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw", "xception": "legacy_xception", "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}  # fmt: skip


def names() -> list[str]:
    """Every model of the sweep as zoo:name."""
    return [f"torchvision:{name}" for name in TORCHVISION] + [f"timm:{name}" for name in TIMM.values()]


def randomise(model: nn.Module) -> nn.Module:
    """Random statistics and affine parameters: an untrained norm is the identity, and folds to nothing."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for held, low, high in (
                (module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5), (module.bias, -0.2, 0.2),
            ):  # fmt: skip
                if held is not None:
                    with torch.no_grad():
                        held.copy_(torch.rand(held.shape, generator=generator) * (high - low) + low)
    return model


def _candidates(name: str) -> Any:
    """(model, input) at growing sizes, the first of which that runs is taken."""
    zoo, _, rest = name.partition(":")
    if zoo == "torchvision":
        models = import_torchvision().models
        home, _, leaf = rest.rpartition(".")
        keywords: dict[str, Any] = {"weights": None}
        if home == "segmentation":
            keywords["weights_backbone"] = None
        if leaf in ("googlenet", "inception_v3"):
            keywords["init_weights"] = False
        if home == "video":
            model = models.get_model(leaf, **keywords)
            sizes = [(16, 64), (16, 224)]
            yield from ((model, (2, 3, frames, size, size)) for frames, size in sizes)
            return
        model = models.get_model(leaf, **keywords)
        yield from ((model, (2, 3, size, size)) for size in (64, 96, 224, 299))
        return
    timm = import_timm()
    for size in (64, 128):
        try:
            yield timm.create_model(rest, img_size=size), (2, 3, size, size)
        except Exception as error:  # a model says in many ways that it has no img_size, or not this one
            print(f"img_size={size}: {error}", file=sys.stderr)
    model = timm.create_model(rest)
    own = model.default_cfg["input_size"]
    sizes = sorted({64, 96, 128, own[-1]}) if not model.default_cfg.get("fixed_input_size") else [own[-1]]
    yield from ((model, (2, 3, size, size)) for size in sizes if size <= own[-1])


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model of the zoo with random weights, in eval mode, and a batch of two that it takes."""
    failure: Exception | None = None
    torch.manual_seed(0)
    for model, shape in _candidates(name):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                randomise(model).eval()(x)
        except Exception as error:  # too small an input shows as any kind of error
            failure = error
            continue
        return model, x
    raise RuntimeError(f"{name} takes none of the inputs tried") from failure

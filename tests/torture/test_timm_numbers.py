"""Numbers that break careless code, in the networks of timm: random, with denormals and tensors that never vary."""

from typing import Any

import pytest
import torch

from rpgcli.targets.timm_model import TimmConfig, import_timm
from tests.test_numbers import round_trip
from tests.torture.conftest import Record

NAMES = [
    "resnet18", "resnext26ts", "skresnet18", "regnetx_002", "regnety_002", "nf_regnet_b0",
    "mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mnasnet_small", "lcnet_050", "tinynet_e",
    "ghostnet_050", "efficientnet_b0", "efficientnet_lite0", "tf_efficientnetv2_b0", "rexnet_100", "fbnetc_100",
    "convnext_atto", "convnextv2_atto", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "pit_ti_224", "levit_128s",
    "xcit_nano_12_p16_224", "coat_lite_tiny", "tiny_vit_5m_224", "gmlp_ti16_224", "mixer_s32_224", "resmlp_12_224",
    "densenet121", "inception_next_atto", "dla46_c", "edgenext_xx_small", "mobilevit_xxs", "mobileone_s0", "repvgg_a0",
    "poolformer_s12", "fastvit_t8", "hgnetv2_b0", "starnet_s1", "mambaout_femto", "hrnet_w18_small", "test_nfnet",
    "test_coatnet", "test_maxvit",
]  # fmt: skip
"""Batch norm, layer norm, group norm and none; grouped and depth-wise convolutions; attention, with integer buffers."""
SHRUNK: dict[str, dict[str, Any]] = {
    "vgg11_bn": {"mlp_ratio": 0.01},
    "inception_v3": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
}
"""Networks that are too large, or take large images only, and timm's options that shrink them."""

pytestmark = [pytest.mark.torture, pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", [*NAMES, *SHRUNK])
def test_networks_of_timm_survive_tokens_and_name_what_is_not_finite(name, tmp_path, record: Record):
    with torch.device("meta"):
        if name in SHRUNK:
            network = import_timm().create_model(name, pretrained=False, in_chans=1, num_classes=10, **SHRUNK[name])
        else:
            network = TimmConfig(name=name).build(1, (8, 8), 10)
    round_trip(network, tmp_path)
    record("networks of timm whose numbers survive", 1, 1)

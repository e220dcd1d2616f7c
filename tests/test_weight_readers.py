"""Layers whose weight other code reads are left as they are: what finds them, and models that have them."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    MambaConfig,
    MambaModel,
    RwkvConfig,
    RwkvModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.modules import QuantLinear
from hf_pcdvq.weight_readers import read_layers


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("a", "b", "c", "d", "e"):
            setattr(self, name, nn.Linear(8, 8))
        self.list = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.blocks = nn.ModuleList(nn.ModuleDict({"out": nn.Linear(8, 8), "in": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x):
        return self.e(x) + self.a(x)


class Direct(Base):
    def forward(self, x):
        return x @ self.a.weight + self.b(x)


class Dtype(Base):
    def forward(self, x):
        return self.a(x.to(self.a.weight.dtype).to(self.b.weight.device))


class Through(Base):
    """Through a method, a property and a base class."""

    @property
    def scaled(self):
        return 2 * self.b.weight

    def helper(self, x):
        return x @ self.c.weight

    def forward(self, x):
        return self.helper(x) + x @ self.scaled

    def never_called(self):
        return self.d.weight


class Inheriting(Direct):
    def forward(self, x):
        return super().forward(x) + self.c(x)


class Overriding(Direct):
    def forward(self, x):
        return self.a(x)


class Variables(Base):
    def forward(self, x):
        layer = self.d
        for other in self.list:
            x = x @ other.weight
        return x @ layer.weight


class Indexed(Base):
    def forward(self, x):
        for _, block in enumerate(self.blocks):
            x = block["in"](x) @ block.out.weight
        return x + sum(x @ entry.weight for entry in self.list)


class Configured(Base):
    """One branch is ruled out by a setting, one depends on what the call is given."""

    slices = 1
    memory = None
    names = ["a", "b"]  # an attribute of the class that is neither method nor property

    def forward(self, x, mask=None):
        x = x * len(self.names)
        if self.memory is not None and self.memory > 0:
            x = x @ self.e.weight
        if self.slices > 1 and self.training:
            x = x @ self.a.weight
        elif self.slices is None:
            x = x @ self.b.weight
        else:
            x = self.c(x)
        if mask is None or self.training:
            return x @ self.d.weight
        return self.e(x)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Base, set()),
        (Direct, {"a"}),
        (Dtype, {"a"}),
        (Through, {"b", "c"}),
        (Inheriting, {"a"}),
        (Overriding, set()),
        (Variables, {"d", "list.0", "list.1"}),
        (Configured, {"d"}),
        (Indexed, {"blocks.0.out", "blocks.1.out", "list.0", "list.1"}),
    ],
)
def test_reads_are_found_in_the_source_of_the_forward_pass(kind, expected):
    model = nn.Sequential(kind())
    read = read_layers(model)
    assert {name.removeprefix("0.") for name, module in model.named_modules() if module in read} == expected
    assert set(read.values()) <= {f"{kind.__name__} reads its weight"}


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
VISION = {"intermediate_size": 128, "num_attention_heads": 2, "num_patches": 16, "patch_size": 4}
IDS = {"input_ids": torch.arange(3, 30)[None]}
PATCHES = {
    "pixel_values": torch.linspace(-1, 1, 16 * 48).view(1, 16, 48),
    "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int64),
    "spatial_shapes": torch.tensor([[4, 4]]),
}
MODELS = {
    "mamba": (
        lambda: MambaModel(MambaConfig(**SIZES, state_size=8, time_step_rank=8)),
        IDS,
        "layers.*.mixer.dt_proj",
    ),
    "rwkv": (lambda: RwkvModel(RwkvConfig(**SIZES, attention_hidden_size=64)), IDS, "blocks.*.attention.output"),
    "siglip2": (
        lambda: Siglip2VisionModel(Siglip2VisionConfig(hidden_size=64, num_hidden_layers=2, **VISION)),
        PATCHES,
        "embeddings.patch_embedding",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_read_weights_compute_what_their_dequantized_twins_do(kind, tmp_path):
    build, inputs, left = MODELS[kind]
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "dense")
    model = AutoModel.from_pretrained(tmp_path / "dense", quantization_config=PcdvqConfig()).eval()
    assert "reads its weight" in model.config.quantization_config.left_unpacked[f"{left}.weight"]
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    model.save_pretrained(tmp_path / "packed")
    twin = AutoModel.from_pretrained(tmp_path / "packed").eval().dequantize(torch.float32)
    with torch.no_grad():
        out, expected = model(**inputs)[0], twin(**inputs)[0]
    assert (out - expected).norm() < 1e-3 * expected.norm()  # the CPU kernels quantize activations to 15 bits

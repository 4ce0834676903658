"""Adapters: they start as nothing, leave the network as it is, travel in small files and can be merged."""

import copy

import pytest
import torch
from omegaconf import OmegaConf
from user_errors import error_of

from common.checkpoint_files import fingerprint
from common.errors import UserError
from ddpm.adapter_files import build_adapter, parse_adapters, read_adapter, write_adapter
from ddpm.BiFlowNet import BiFlowNet
from ddpm.frozen_base import part_of, with_part
from ddpm.lora import AdaptedBiFlowNet, Adapter

GIVEN = OmegaConf.create({"lora_rank": 2, "lora_alpha": 4.0, "lora_blocks": [], "num_classes": 2, "class_map": []})


def network() -> BiFlowNet:
    torch.manual_seed(0)
    model = BiFlowNet(
        dim=24, cond_classes=2, dim_mults=(1, 1, 2), use_sparse_linear_attn=(0, 0, 1), channels=4, patch_size=2,
        resnet_groups=8, DiT_num_heads=4, attn_heads=2,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():  # adaLN starts at zero: without this few layers would have an effect
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def trained_adapter(model: BiFlowNet, seed: int = 1, **options) -> Adapter:
    torch.manual_seed(seed)
    adapter = Adapter(model, **{"rank": 2, "alpha": 4.0, **options})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return adapter


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((2, 4, 8, 8, 8), generator=generator)
    return {"x": x, "time": torch.tensor([3, 700]), "y": torch.tensor([0, 1]), "res": torch.tensor([1 / 8] * 3)}


def test_an_adapter_starts_as_nothing_and_leaves_the_network_as_it_is(inputs):
    model = network()
    plain, before = model(**inputs), fingerprint(model.state_dict())
    adapted = AdaptedBiFlowNet(model, Adapter(model, 2, 4.0))
    assert torch.equal(adapted(**inputs), plain)
    adapted = AdaptedBiFlowNet(model, trained_adapter(model)).train()
    adapted(**inputs).square().mean().backward()
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {
        f"adapters.0.{name}" for name, _ in adapted.part.named_parameters()
    }
    assert all(parameter.grad is not None for parameter in adapted.part.parameters())  # every layer has an effect
    assert not adapted.biflownet.training
    assert (adapted(**inputs) - plain).abs().max() > 1e-3
    assert torch.equal(model(**inputs), plain)
    assert fingerprint(model.state_dict()) == before


def test_several_are_added_by_their_weights_and_merged(inputs):
    model = network()
    first, second = trained_adapter(model), trained_adapter(model, seed=2, blocks=["downs", "mid_block1"])
    assert all(name.startswith(("downs.", "mid_block1.", "cond_emb")) for name in second.differences())
    second.strengthen(0.5)
    both = AdaptedBiFlowNet(model, first, second).eval()
    merged = both.merged()
    assert list(merged.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(merged(**inputs), both(**inputs), rtol=1e-3, atol=1e-4)
    assert (merged(**inputs) - AdaptedBiFlowNet(model, first).merged()(**inputs)).abs().max() > 1e-3
    second.strengthen(0)
    torch.testing.assert_close(both(**inputs), AdaptedBiFlowNet(model, first)(**inputs))


def test_copies_have_adapters_of_their_own_and_share_the_base(inputs):
    model = network()
    adapted = AdaptedBiFlowNet(model, trained_adapter(model))
    other = with_part(adapted, trained_adapter(model, seed=5))
    assert part_of(other) is other.part
    assert part_of(model) is model
    own = {id(p) for p in adapted.biflownet.parameters()}
    assert own == {id(p) for p in other.biflownet.parameters()} == {id(p) for p in model.parameters()}
    assert (other(**inputs) - adapted(**inputs)).abs().max() > 1e-3
    copied = copy.deepcopy(adapted)  # as previews have one
    before = adapted(**inputs)
    part_of(copied).load_state_dict(other.part.state_dict())
    torch.testing.assert_close(copied(**inputs), other(**inputs))
    assert torch.equal(adapted(**inputs), before)


def test_recomputing_gives_the_same_gradients(inputs):
    model = network()
    gradients = []
    for checkpointing in (False, True):
        adapted = AdaptedBiFlowNet(model, trained_adapter(model)).train()
        adapted.gradient_checkpointing = checkpointing
        adapted(**inputs).square().mean().backward()
        assert adapted.gradient_checkpointing == checkpointing == adapted.biflownet.gradient_checkpointing
        gradients.append([parameter.grad for parameter in adapted.part.parameters()])
    torch.testing.assert_close(*gradients)


def test_an_adapter_file_says_what_it_belongs_to(tmp_path, inputs):
    model = network()
    adapter = trained_adapter(model)
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, adapter.state_dict(), GIVEN, fingerprint(model.state_dict()))
    found = read_adapter(path)
    assert (found.base, found.rank, found.alpha) == (fingerprint(model.state_dict()), 2, 4.0)
    loaded = build_adapter(path, found, model, 1.0)
    assert torch.equal(AdaptedBiFlowNet(model, loaded)(**inputs), AdaptedBiFlowNet(model, adapter)(**inputs))
    assert "downs.0.0.block1.proj.lora_A.weight" in found.weights
    path.write_bytes(path.read_bytes()[:-10])
    assert "not a readable adapter file" in error_of(read_adapter, path)
    wide = BiFlowNet(dim=48, cond_classes=2, dim_mults=(1, 1, 2), use_sparse_linear_attn=(0, 0, 1), channels=4)
    assert "do not fit" in error_of(build_adapter, path, found, wide, 1.0)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["a.safetensors"], [("a.safetensors", 1.0)]),
        (["b:0.5", "c:-1"], [("b", 0.5), ("c", -1.0)]),
        (["hf://o/n/a", "hf://o/n/a@v1:0.5"], [("hf://o/n/a", 1.0), ("hf://o/n/a@v1", 0.5)]),
    ],
)
def test_adapters_on_the_command_line(words, found):
    assert parse_adapters(words) == found


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="FILE or FILE:WEIGHT is expected, 'half' is no number"):
        parse_adapters(["a.safetensors:half"])
    with pytest.raises(ValueError, match="block 'upps': the network has init_conv, time_mlp, "):
        Adapter(network(), 2, 2.0, ["upps"])
    assert "no such adapter file" in error_of(read_adapter, tmp_path / "none")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    assert "not an adapter of this project" in error_of(read_adapter, tmp_path / "other.safetensors")

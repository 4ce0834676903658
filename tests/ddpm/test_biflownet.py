"""BiFlowNet: parity with the official network, structure, conditions, errors, and that it traces as one graph."""

import pytest
import torch
from golden import GOLDEN_SEED, fill_module, golden_normal, load_golden, load_keys

from ddpm.BiFlowNet import BiFlowNet, GaussianDiffusion, PatchEmbed_Voxel, grid_multiple
from ddpm.blocks import ChannelNorm

SMALL = {
    "dim": 24,
    "dim_mults": (1, 1, 2),
    "use_sparse_linear_attn": (0, 0, 1),
    "resnet_groups": 8,
    "DiT_num_heads": 4,
    "channels": 4,
    "cond_classes": 2,
    "patch_size": 2,
}
TINY = {**SMALL, "dim": 12, "resnet_groups": 4, "DiT_num_heads": 2, "attn_heads": 2}
OFFICIAL = {"dim": 72, "cond_classes": 7, "channels": 8}
GOLDEN_CASES = {
    "biflownet_8x": {
        "arguments": {**OFFICIAL, "patch_size": 1},
        "shape": (1, 8, 16, 16, 16),
        "time": [417],
        "y": [3],
        "res": [16 / 64] * 3,
        "step": 2,
    },
    "biflownet_small": {
        "arguments": SMALL,
        "shape": (2, 4, 16, 8, 16),
        "time": [3, 999],
        "y": [0, 1],
        "res": [16 / 64, 8 / 64, 16 / 64],
        "step": 1,
    },
}


def inputs(batch=1, channels=4, grid=(8, 8, 8)):
    x = golden_normal(GOLDEN_SEED, "x", (batch, channels, *grid))
    return x, torch.arange(batch) * 100 + 7, torch.arange(batch) % 2, torch.tensor(grid) / 64


def assert_close_in_std(actual, expected):
    """Within 1e-4 of the reference's standard deviation, which the official code holds between machines."""
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.std()


@pytest.fixture(scope="module")
def tiny():
    return fill_module(BiFlowNet(**TINY))


# -------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(("name", "patch_size"), [("biflownet_8x", 1), ("biflownet_4x", 2)])
def test_state_dict_is_the_official_one(name, patch_size):
    with torch.device("meta"):
        model = BiFlowNet(**OFFICIAL, patch_size=patch_size)
    ours = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
    assert ours == list(load_keys(name).items())


@pytest.mark.parametrize("name", list(GOLDEN_CASES))
def test_golden_forward_and_losses(name):
    case, golden = GOLDEN_CASES[name], load_golden(name)
    model = fill_module(BiFlowNet(**case["arguments"]))
    x, noise = (golden_normal(GOLDEN_SEED, key, case["shape"]) for key in ("x", "noise"))
    time, y, res = torch.tensor(case["time"]), torch.tensor(case["y"]), torch.tensor(case["res"])

    assert_close_in_std(model.pos_embed.detach(), golden["pos_embed"])
    with torch.no_grad():
        eps = model(x, time, y, res)
    every = slice(None, None, case["step"])
    assert_close_in_std(eps[:, :, every, every, every], golden["eps"])

    predictions = []  # of the first loss serve the second: the full-size network is slow on a CPU
    hook = model.register_forward_hook(lambda _, __, output: predictions.append(output.detach()))
    loss = GaussianDiffusion(x.shape[1]).p_losses(model, x.clamp(-1, 1), time, y, res, noise)
    hook.remove()
    assert loss.item() == pytest.approx(float(golden["loss_l1"]), rel=1e-4)
    loss_l2 = GaussianDiffusion(x.shape[1], loss_type="l2").p_losses(
        lambda *_, **__: predictions[0], x.clamp(-1, 1), time, y, res, noise
    )
    assert loss_l2.item() == pytest.approx(float(golden["loss_l2"]), rel=1e-4)

    loss.backward()
    norms = {key: value.grad.norm() for key, value in model.named_parameters() if value.grad is not None}
    total = torch.stack(list(norms.values())).norm()
    assert total.item() == pytest.approx(float(golden["grad_norm_total"]), rel=1e-4)
    single = [key for key in golden if key.startswith("grad_norm/")]
    assert len(single) == 4
    for key in single:
        assert norms[key.removeprefix("grad_norm/")].item() == pytest.approx(float(golden[key]), rel=1e-4), key


# ----------------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize(
    ("changes", "grid", "channels"),
    [
        ({}, (8, 8, 8), 4),
        ({"patch_size": 1}, (16, 8, 8), 4),
        ({"learn_sigma": True}, (8, 8, 8), 8),
        ({"num_mid_DiT": 3}, (8, 8, 8), 4),
        ({"num_mid_DiT": 0, "init_kernel_size": 7}, (8, 8, 8), 4),
        ({"dim_mults": (1, 2, 4), "use_sparse_linear_attn": (0, 1, 0)}, (8, 16, 8), 4),
        ({"dim_mults": (1, 1), "use_sparse_linear_attn": (0, 0)}, (8, 8, 8), 4),
        ({"dim_mults": (2, 2), "init_dim": 24, "use_sparse_linear_attn": (0, 1)}, (8, 8, 8), 4),
        ({"sub_volume_size": (4, 8, 8), "dim_mults": (1,), "use_sparse_linear_attn": (0,)}, (4, 8, 16), 4),
    ],
)
def test_output_shape(changes, grid, channels):
    model = BiFlowNet(**{**TINY, **changes})
    x, time, y, res = inputs(2, grid=grid)
    with torch.no_grad():
        assert model(x, time, y, res).shape == (2, channels, *grid)


def test_fresh_network_ignores_the_intra_patch_flow():
    model = BiFlowNet(**TINY)
    x, time, y, res = inputs()
    condition = model.embed_conditions(time, y, res)
    features = model.intra_patch_flow(x, condition)
    assert len(features) == 2 * model.num_flow_levels == 4
    assert all((feature == 0).all() for feature in features)
    tokens = torch.randn(1, 1, 64, 12)
    torch.testing.assert_close(model.IntraPatchFlow_mid[0](tokens, condition), tokens, rtol=0, atol=0)
    assert model.mid_block1.mlp[1].bias.abs().max() == 0
    bound = (6 / (48 + 48)) ** 0.5  # Xavier-uniform of a Linear(48, 48)
    assert 0.9 * bound < model.time_mlp[3].weight.abs().max() <= bound
    bound = (6 / (12 + 4 * 2**3)) ** 0.5  # the token embedding counts as a Linear layer of the whole cube
    assert 0.9 * bound < model.x_embedder.proj.weight.abs().max() <= bound
    assert not model.pos_embed.requires_grad


def test_intra_patch_flow_sees_one_sub_volume_at_a_time(tiny):
    x, time, y, res = inputs(grid=(16, 8, 16))
    changed = x.clone()
    changed[:, :, 8:, :, :8] += 1
    with torch.no_grad():
        condition = tiny.embed_conditions(time, y, res)
        pairs = zip(tiny.intra_patch_flow(x, condition), tiny.intra_patch_flow(changed, condition), strict=True)
    for before, after in pairs:
        differs = (before - after).abs().amax(dim=(0, 1)) > 1e-6  # (16, 8, 16)
        assert differs[8:, :, :8].all()
        differs[8:, :, :8] = False
        assert not differs.any()


def test_modulation_is_computed_once_per_sample(tiny):
    shapes = []
    layers = [module.adaLN_modulation for module in tiny.modules() if hasattr(module, "adaLN_modulation")]
    hooks = [layer.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape))) for layer in layers]
    with torch.no_grad():
        tiny(*inputs(2, grid=(16, 16, 8)))  # four sub-volumes each
    for hook in hooks:
        hook.remove()
    assert shapes == [(2, 8 * 12)] * len(layers)


def test_all_attention_is_fused(tiny, monkeypatch):
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(q, k, v, **kwargs):
        calls.append(q.shape)
        return attend(q, k, v, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        tiny(*inputs())
    assert len(calls) == 5 + 5  # transformer blocks; U-Net: twice on the way down, in the middle, twice on the way up


def test_attention_flags_are_mirrored():
    model = BiFlowNet(**{**TINY, "use_sparse_linear_attn": (0, 1, 0)})
    prefixes = {key.split(".fn.")[0] for key in model.state_dict() if ".fn.norm" in key}
    assert prefixes == {"downs.1.1", "downs.1.3", "ups.1.1", "ups.1.3", "mid_spatial_attn"}


def test_token_embedding_stays_in_float32_under_autocast(tiny):
    seen = []
    hook = tiny.x_embedder.proj.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        eps = tiny(*inputs())
    hook.remove()
    assert seen == [torch.float32]
    assert eps.dtype == torch.bfloat16


def test_channel_norm_holds_large_values_in_half_precision():
    """Of a standard deviation of 300, whose variance fp16 cannot hold."""
    x = 300 * torch.randn(2, 16, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    norm = ChannelNorm(16)
    torch.testing.assert_close(norm(x.half()), norm(x), rtol=2e-3, atol=2e-3)


def test_patch_embedding_orders_tokens_by_axis():
    embed = PatchEmbed_Voxel(voxel_size=4, patch_size=2, in_chans=1, embed_dim=1)
    embed.requires_grad_(False)
    embed.proj.weight.fill_(1 / 8)
    embed.proj.bias.zero_()
    corners = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    volume = corners.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert embed(volume).flatten().tolist() == list(range(8))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_forward_traces_as_one_graph(patch_size):
    torch.compiler.reset()
    levels = {
        "dim_mults": (1, 2),
        "use_sparse_linear_attn": (0, 1),
    }  # every kind of layer, few of each: tracing is slow
    model = fill_module(BiFlowNet(**{**TINY, **levels, "patch_size": patch_size})).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for batch in (1, 2):
        arguments = inputs(batch)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), model(*arguments))


# ---------------------------------------------------------------------------------------------------------- conditions


def test_one_resolution_serves_the_whole_batch(tiny):
    x, time, y, res = inputs(2)
    with torch.no_grad():
        torch.testing.assert_close(tiny(x, time, y, res), tiny(x, time, y, res.expand(2, 3)))


@pytest.mark.parametrize("condition", ["time", "y", "res"])
def test_each_condition_matters(tiny, condition):
    x, time, y, res = inputs()
    given = {"time": time, "y": y, "res": res}
    with torch.no_grad():
        before = tiny(x, **given)
        after = tiny(x, **{**given, condition: given[condition] + 1})
    assert (before - after).abs().max() > 1e-3


def test_network_without_conditions():
    model = BiFlowNet(**{**TINY, "cond_classes": None}, res_condition=False)
    assert model.init_conv.weight.shape[0] == 12
    assert model.downs[0][0].mlp[1].in_features == 4 * 12
    x, time, _, _ = inputs()
    assert model(x, time).shape == x.shape


def test_null_label_is_one_more_class():
    assert BiFlowNet(**TINY).null_label is None
    model = BiFlowNet(**TINY, null_label=True)
    assert model.null_label == 2
    assert model.cond_emb.weight.shape == (3, 48)
    model.check_conditions({"y": torch.tensor([0, 2])})


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 16}, "multiple of 6"),
        ({"DiT_num_heads": 5}, "divisible by DiT_num_heads 5"),
        ({"resnet_groups": 5}, "divisible by resnet_groups 5"),
        ({"init_dim": 24}, "as wide as init_dim 24"),
        ({"use_sparse_linear_attn": (0, 1)}, "2 flags for 3 levels"),
        ({"sub_volume_size": (8, 8)}, "needs three sizes"),
        ({"patch_size": 3}, "divisible by patch_size 3"),
        ({"init_kernel_size": 4}, "has to be odd"),
        ({"cond_classes": None, "null_label": True}, "null_label needs cond_classes"),
        ({"dim": 16, "patch_size": 3}, "multiple of 6.*patch_size 3"),
    ],
)
def test_constructor_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        BiFlowNet(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 4, 8, 12, 8)}, r"\(8, 12, 8\) has to be divisible by \(8, 8, 8\)"),
        ({"x": torch.zeros(1, 8, 8, 8, 8)}, r"expected \(B, 4, d, h, w\)"),
        ({"x": torch.zeros(4, 8, 8, 8)}, r"expected \(B, 4, d, h, w\)"),
        ({"time": torch.zeros(())}, "one timestep per sample"),
        ({"y": None}, "needs class ids y"),
        ({"y": torch.zeros(2, dtype=torch.long)}, "one class id per sample"),
        ({"res": None}, "needs res"),
        ({"res": torch.zeros(2, 3)}, r"expected \(3,\) or \(1, 3\)"),
    ],
)
def test_forward_errors(tiny, changes, message):
    arguments = dict(zip(("x", "time", "y", "res"), inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        tiny(**{**arguments, **changes})


def test_grid_has_to_suit_the_unet_too():
    mults = {"dim_mults": (1, 2, 4, 4, 4, 4), "use_sparse_linear_attn": (0,) * 6}
    with torch.device("meta"):
        model = BiFlowNet(**{**TINY, **mults, "sub_volume_size": (8, 8, 8)})
    assert model.down_factor == 32
    assert model.grid_multiple == grid_multiple([1, *mults["dim_mults"]]) == (32, 32, 32)
    with pytest.raises(ValueError, match=r"\(32, 32, 16\) has to be divisible by \(32, 32, 32\)"):
        model(*inputs(grid=(32, 32, 16)))


def test_superfluous_conditions_are_refused():
    model = BiFlowNet(**{**TINY, "cond_classes": None}, res_condition=False)
    x, time, y, res = inputs()
    with pytest.raises(ValueError, match="leave y out"):
        model(x, time, y)
    with pytest.raises(ValueError, match="leave it out"):
        model(x, time, res=res)


@pytest.mark.parametrize("y", [[0, 2], [-1, 1]])
def test_class_ids_out_of_range_are_refused(tiny, y):
    with pytest.raises(ValueError, match="knows 0 to 1"):
        tiny.check_conditions({"y": torch.tensor(y)})


def test_patch_embedding_errors():
    with pytest.raises(ValueError, match="does not divide into patches of 3"):
        PatchEmbed_Voxel(voxel_size=8, patch_size=3)
    with pytest.raises(ValueError, match=r"built for \(4, 4, 4\)"):
        PatchEmbed_Voxel(voxel_size=4, in_chans=1)(torch.zeros(1, 1, 8, 8, 8))

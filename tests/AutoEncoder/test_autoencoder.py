"""The Patch-Volume autoencoder's behaviour: encoding and decoding, frozen parts, gradients, checkpoints."""

import copy

import pytest
import torch
from configs import official_autoencoder, tiny_autoencoder
from torch import nn

from AutoEncoder.latents import denormalise_latents, normalise_latents
from AutoEncoder.model import PatchVolume, autoencoder
from AutoEncoder.model.autoencoder import evaluation_mode
from AutoEncoder.model.networks import AttentionBlock, normalize
from AutoEncoder.model.PatchVolume import patchvolumeAE


@pytest.fixture
def model() -> patchvolumeAE:
    torch.manual_seed(0)
    model = patchvolumeAE(tiny_autoencoder())
    model.codebook.N.fill_(1.0)
    return model.eval()


def sub_modes(model: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in model.named_modules()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downsample": [8, 8, 4]}, "three equal powers of two"),
        ({"downsample": [6, 6, 6]}, "three equal powers of two"),
        ({"num_groups": 3}, "num_groups 3 does not divide 8 channels"),
        ({"norm_type": "layer"}, "expected 'group' or 'batch'"),
        ({"disc_loss_type": "wgan"}, "expected one of hinge, vanilla"),
        ({"stage": 3}, "expected 1 or 2"),
        ({"patch_size": 18}, "dataset.patch_size 18 does not divide by the compression 4"),
    ],
)
def test_impossible_options_are_refused(options, message):
    patch_size = options.pop("patch_size", 16)
    with pytest.raises(ValueError, match=message):
        patchvolumeAE(tiny_autoencoder(patch_size, **options))


def test_batch_norm_is_available():
    assert isinstance(normalize(8, "batch", 4), nn.SyncBatchNorm)
    model = patchvolumeAE(tiny_autoencoder(norm_type="batch")).train()
    reconstruction, _ = model.forward_patches(torch.randn(2, 1, 16, 16, 16))
    assert torch.isfinite(reconstruction).all()


def test_attention_is_the_paper_s_formula():
    torch.manual_seed(0)
    block = AttentionBlock(8, lambda channels: normalize(channels, "group", 4))
    x = torch.randn(2, 8, 2, 3, 4)
    tokens = block.norm(x).flatten(2).transpose(1, 2)  # (B, n, C), tokens in z, x, y order
    q, k, v = block.to_qkv(tokens).chunk(3, dim=-1)
    heads = []
    for head in range(4):
        part = slice(32 * head, 32 * head + 32)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 32**0.5).softmax(dim=-1)
        heads.append(weights @ v[..., part])
    out = torch.cat(heads, dim=-1).transpose(1, 2).reshape(2, 128, 2, 3, 4)
    torch.testing.assert_close(block(x), x + block.to_out(out), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, None])
def test_patches_are_encoded_independently(model, window):
    x = torch.randn(2, 1, 32, 16, 32)
    latent = model.patch_encode_sliding(x, sliding_window=window)
    assert latent.shape == (2, 4, 8, 4, 8)
    last = model.encode(x[..., 16:, :, 16:], quantize=False)
    torch.testing.assert_close(latent[..., 4:, :, 4:], last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latent, model.patch_encode(x), rtol=1e-4, atol=1e-5)


def test_out_of_memory_is_recovered_from(model, monkeypatch):
    """Without gradients: patches are encoded fewer at a time, volumes decoded in smaller blocks."""
    x = torch.randn(2, 1, 32, 32, 16)
    model.eval()
    with torch.no_grad():
        expected = model(x)[0]
        encode, decode, seen = model.encode, autoencoder.decode_exactly, {"patches": [], "bytes": []}

        def encode_few(patches, **options):
            seen["patches"].append(len(patches))
            if len(patches) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return encode(patches, **options)

        def decode_little(decoder, vectors, max_bytes):
            seen["bytes"].append(max_bytes)
            if max_bytes > 10**9:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode(decoder, vectors, max_bytes)

        monkeypatch.setattr(model, "encode", encode_few)
        monkeypatch.setattr(autoencoder, "decode_exactly", decode_little)
        torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-5)
        assert seen["patches"] == [8, 4, 2, 2, 2, 2]
        assert seen["bytes"][0] > 10**9 >= seen["bytes"][-1] > 5 * 10**8
        seen["patches"].clear()
        model.patch_encode_sliding(x, sliding_window=1)
        assert seen["patches"] == [2, 2, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):  # with gradients all patches are needed at once
        model.patch_encode(x)


@pytest.mark.parametrize(("free", "at_once"), [(10**12, 8), (2 * 8 * 4 * 8 * 16**3, 2), (0, 1)])
def test_patches_are_encoded_by_the_memory_that_is_free(model, monkeypatch, free, at_once):
    monkeypatch.setattr(autoencoder, "free_memory", lambda device: free)
    encode, seen = model.encode, []
    monkeypatch.setattr(model, "encode", lambda x, **options: seen.append(len(x)) or encode(x, **options))
    with torch.no_grad():
        model.eval().patch_encode(torch.randn(1, 1, 48, 48, 16))
    assert max(seen) == at_once


@pytest.mark.parametrize("max_bytes", [None, 10**9])
def test_half_precision_does_not_quantise_intensities(model, max_bytes):
    latent = torch.randn(1, 4, 8, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        volume = model.eval().decode(latent, max_bytes=max_bytes)
    assert volume.dtype == torch.float32
    assert len(volume.unique()) > 30_000  # of 32,768 voxels; in bf16 all values of its range are some 500


def test_codes_and_latents_decode_alike(model):
    x = torch.randn(1, 1, 16, 32, 16)
    codes = model.patch_encode(x, quantize=True)
    assert codes.shape == (1, 4, 8, 4)
    assert codes.dtype == torch.int64
    by_codes = model.decode(codes, quantize=False)
    torch.testing.assert_close(by_codes, model.decode(model.patch_encode(x), quantize=True))
    embeddings, encodings = model.encode(x, include_embeddings=True)
    torch.testing.assert_close(embeddings, model.codebook.lookup(encodings))
    torch.testing.assert_close(model.encode(x), encodings)


def test_sliding_decode_without_overlap(model):
    codes = torch.randint(0, 32, (2, 6, 4, 5))
    tiled = model.decode_sliding(codes, patch_size=16, sliding_window=2)
    assert tiled.shape == (2, 1, 24, 16, 20)
    torch.testing.assert_close(tiled[..., :16, :16, :16], model.decode(codes[:, :4, :4, :4], quantize=False))
    torch.testing.assert_close(tiled[..., 16:, :, 16:], model.decode(codes[:, 4:, :, 4:], quantize=False))
    whole = model.decode_sliding(codes, patch_size=64, compress_ratio=4)
    torch.testing.assert_close(whole, model.decode(codes, quantize=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"compress_ratio": 8}, "compresses 4 times"), ({"patch_size": 30}, "30 does not divide by the compression 4")],
)
def test_wrong_tiles_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.decode_sliding(torch.zeros(1, 4, 4, 4, dtype=torch.int64), **options)


def test_sizes_that_do_not_divide_are_padded_and_cropped_back(model):
    x = torch.randn(1, 1, 20, 16, 9)
    reconstruction, _ = model(x)
    assert reconstruction.shape == x.shape
    padded = torch.full((1, 1, 32, 16, 16), -1.0)
    padded[..., :20, :, :9] = x
    torch.testing.assert_close(reconstruction, model(padded)[0][..., :20, :, :9])
    assert model.patch_encode(x).shape == (1, 4, 8, 4, 4)
    with pytest.raises(ValueError, match="patch_size 10 does not divide by the compression 4"):
        model.patch_encode(x, patch_size=10)


def test_latents_are_normalised_by_the_range_of_the_whole_codebook():
    embeddings = torch.tensor([[-3.0, 0.0], [1.0, 5.0]])
    latents = torch.tensor([-3.0, 1.0, 5.0])
    torch.testing.assert_close(normalise_latents(latents, embeddings), torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(denormalise_latents(normalise_latents(latents, embeddings), embeddings), latents)
    with pytest.raises(ValueError, match="span no range"):
        normalise_latents(latents, torch.ones(2, 2))


def test_stage_2_keeps_frozen_parts_in_eval_whatever_else_runs():
    model = patchvolumeAE(tiny_autoencoder(stage=2))
    model.train()
    with evaluation_mode(model):  # as a callback that logs volumes
        pass
    model.eval()
    model.train()
    modes = sub_modes(model)
    frozen = [name for name in modes if name.startswith(("encoder", "pre_vq_conv", "codebook"))]
    assert len(frozen) > 10
    assert not any(modes[name] for name in frozen)
    assert all(modes[name] for name in modes if name.startswith(("decoder", "post_vq_conv", "volume_discriminator")))


def test_reconstructing_leaves_every_mode_as_it_was(model):
    model.train()
    model.decoder.mid_block.eval()
    before = sub_modes(model)
    codes = model.codebook.embeddings.clone()
    model.reconstruct(torch.randn(1, 1, 16, 16, 16))
    assert sub_modes(model) == before
    torch.testing.assert_close(model.codebook.embeddings, codes, rtol=0, atol=0)


def drive(model: patchvolumeAE, monkeypatch, steps: list[int], x: torch.Tensor) -> list[dict[str, bool]]:
    """Runs training steps at given global steps without a trainer; tells which parameters got a gradient in each."""
    optimizers = model.configure_optimizers()
    for optimizer in optimizers:  # as Lightning does
        optimizer.register_step_pre_hook(lambda optimizer, *_: model.on_before_optimizer_step(optimizer))
    monkeypatch.setattr(model, "optimizers", lambda: optimizers)
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(model, "log_dict", lambda values, **_: None)
    gradients = []
    for step in steps:
        monkeypatch.setattr(type(model), "global_step", step)
        model.zero_grad(set_to_none=True)
        model.training_step({"data": x}, step)
        gradients.append({name: p.grad is not None for name, p in model.named_parameters()})
    return gradients


@pytest.mark.parametrize("stage", [1, 2])
def test_each_step_computes_only_the_gradients_it_uses(monkeypatch, stage):
    model = patchvolumeAE(tiny_autoencoder(stage=stage, discriminator_iter_start=0)).train()
    model.codebook.N.fill_(1.0)
    generator, discriminator = drive(model, monkeypatch, [2, 3], torch.rand(1, 1, 32, 32, 32))
    for name, has_gradient in generator.items():
        trained = ("decoder", "post_vq_conv", "encoder", "pre_vq_conv")[: 4 if stage == 1 else 2]
        assert has_gradient == name.startswith(trained), name
    for name, has_gradient in discriminator.items():
        assert has_gradient == name.startswith("volume_discriminator"), name


def test_discriminator_steps_build_no_generator_graph(monkeypatch):
    model = patchvolumeAE(tiny_autoencoder(discriminator_iter_start=0)).train()
    seen = []
    model.decoder.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    drive(model, monkeypatch, [1, 2], torch.rand(1, 1, 16, 16, 16))
    assert seen == [False, True]


def test_turns_go_by_the_step_not_by_the_batch_of_an_epoch(monkeypatch):
    """An epoch of a single batch has batch 0 for ever; the discriminator must still get its turns."""
    model = patchvolumeAE(tiny_autoencoder(discriminator_iter_start=0)).train()
    turns = []
    monkeypatch.setattr(model, "_optimise", lambda name, optimizer, loss: turns.append((name, optimizer)))
    monkeypatch.setattr(model, "optimizers", lambda: ["first", "second"])
    monkeypatch.setattr(model, "log_dict", lambda values, **_: None)
    for step in range(4):
        monkeypatch.setattr(type(model), "global_step", step)
        model.training_step({"data": torch.rand(1, 1, 16, 16, 16)}, 0)
    assert turns == [("generator", "first"), ("discriminator", "second")] * 2


@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_step_moves_the_codebook_only_in_stage_1(monkeypatch, stage):
    model = patchvolumeAE(tiny_autoencoder(stage=stage)).train()
    model.codebook.N.fill_(1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drive(model, monkeypatch, [0, 1], torch.rand(1, 1, 16, 16, 16))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("decoder.") for name in changed)
    frozen_changed = {name for name in changed if name.startswith(("encoder.", "pre_vq_conv.", "codebook."))}
    assert bool(frozen_changed) == (stage == 1)


def test_codebook_start_can_be_put_off(monkeypatch):
    model = patchvolumeAE(tiny_autoencoder(codebook_init_step=2)).train()
    x = torch.rand(2, 1, 16, 16, 16)
    drive(model, monkeypatch, [0, 1], x)
    assert not model.codebook.initialised
    drive(model, monkeypatch, [2], x)
    assert model.codebook.initialised


def poison_gradient(model: patchvolumeAE) -> None:
    model.decoder.conv_first.weight.register_hook(lambda gradient: gradient * torch.inf)


def poison_loss(model: patchvolumeAE) -> None:
    """Its gradient is finite, being a sign."""
    torch.nn.init.constant_(model.decoder.final_block[2].bias, torch.inf)


@pytest.mark.parametrize(("poison", "bad"), [(poison_gradient, "gradient"), (poison_loss, "loss")])
def test_a_step_that_is_not_finite_is_left_out(monkeypatch, poison, bad):
    """Weights and Adam's averages stay what they are; the numbers are there to be read."""
    model = patchvolumeAE(tiny_autoencoder()).train()
    x = torch.rand(1, 1, 16, 16, 16)
    drive(model, monkeypatch, [0], x)
    optimizer = model.optimizers()[0]
    poison(model)
    before = copy.deepcopy([dict(model.named_parameters()), optimizer.state_dict()["state"]])
    model.training_step({"data": x}, 1)
    torch.testing.assert_close(
        [dict(model.named_parameters()), optimizer.state_dict()["state"]], before, rtol=0, atol=0
    )
    assert [name for name, value in model.watched.items() if not torch.isfinite(value)] == [bad]


def test_steps_take_the_scheduled_learning_rate(monkeypatch):
    model = patchvolumeAE(tiny_autoencoder(lr=0.5, lr_schedule="cosine", lr_warmup=2, max_steps=4))
    found = []
    for step in range(2):
        drive(model, monkeypatch, [step], torch.zeros(1, 1, 16, 16, 16))
        found.append([group["lr"] for group in model.optimizers()[0].param_groups])
    assert found == [[0.5 * 0.5], [pytest.approx(0.5 * 0.8535533905932737)]]


def test_official_perceptual_weights_are_passed_over(model):
    state = {**model.state_dict(), "perceptual_loss.net.slice1.0.weight": torch.zeros(3)}
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="unexpected"):
        model.load_state_dict({**state, "unexpected": torch.zeros(1)})


@pytest.mark.parametrize(("weight", "stage", "built"), [(2, "fit", 1), (2, "validate", 1), (0, "fit", 0)])
def test_perceptual_network_only_where_it_is_used(monkeypatch, weight, stage, built):
    calls = []

    def fake(perceptual_3d, weights_dir):
        calls.append(perceptual_3d)
        return nn.Conv3d(1, 1, 1)

    monkeypatch.setattr(PatchVolume, "build_perceptual", fake)
    model = patchvolumeAE(official_autoencoder(perceptual_weight=weight, n_codes=8))
    model.patch_encode(torch.zeros(1, 1, 8, 8, 8), patch_size=8)
    assert calls == []
    for _ in range(2):
        model.setup(stage)
    assert len(calls) == built
    assert not any("perceptual" in name for name in model.state_dict())
    assert len(list(model.children())) == 6

"""Decoding block by block gives what one pass gives, whatever the blocks."""

import pytest
import torch
from configs import official_autoencoder, tiny_autoencoder
from torch import nn
from torch._subclasses import FakeTensorMode

from AutoEncoder import exact_decoding
from AutoEncoder.exact_decoding import decode_exactly, plan_blocks
from AutoEncoder.model.PatchVolume import patchvolumeAE

GRID = (5, 4, 7)


def decoder(downsample: int = 4, dtype=torch.float64, **model) -> nn.Module:
    """A tiny decoder whose norms do something, in float64 so that only real differences are seen."""
    torch.manual_seed(0)
    network = patchvolumeAE(tiny_autoencoder(downsample=[downsample] * 3, **model)).decoder.eval().to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for norm in (part for part in network.modules() if isinstance(part, nn.SyncBatchNorm)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return network


def in_blocks(monkeypatch, edges) -> list[tuple[int, ...]]:
    """Lets every stage run in blocks of these edges; returns the grids of the stages that did, filled later."""
    grids = []
    run = exact_decoding._run_in_blocks

    def record(stage, x, block):
        grids.append(tuple(x.shape[2:]))
        return run(stage, x, block)

    monkeypatch.setattr(exact_decoding, "plan_blocks", lambda network, *_: [edges] * (len(network.conv_blocks) - 1))
    monkeypatch.setattr(exact_decoding, "_run_in_blocks", record)
    return grids


@pytest.mark.parametrize("downsample", [2, 4, 8])
@pytest.mark.parametrize("edges", [(3, 3, 3), (2, 9, 4), (1, 5, 99)])
def test_blocks_give_what_one_pass_gives(monkeypatch, downsample, edges):
    network = decoder(downsample)
    grid = GRID if downsample < 8 else (3, 2, 4)
    z = torch.randn(2, 4, *grid, dtype=torch.float64)
    grids = in_blocks(monkeypatch, edges)
    with torch.no_grad():
        expected = network(z)
    found = decode_exactly(network, z)
    assert found.shape == expected.shape == (2, 1, *(downsample * extent for extent in grid))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * expected.std().item())
    assert grids == [tuple(extent * 2**i for extent in grid) for i in range(len(network.conv_blocks) - 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(monkeypatch, dtype):
    """float32 as the weights have it; bf16 by autocast, where blocks and one pass round at other places."""
    network = decoder(dtype=torch.float32)
    z = torch.randn(1, 4, *GRID)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = network(z)
        in_blocks(monkeypatch, (3, 3, 3))
        found = decode_exactly(network, z)
    assert found.dtype == expected.dtype
    error = (found - expected).float().std() / expected.float().std()
    assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_batch_norm_needs_no_statistics(monkeypatch):
    network = decoder(norm_type="batch")
    z = torch.randn(1, 4, *GRID, dtype=torch.float64)
    in_blocks(monkeypatch, (3, 3, 3))
    monkeypatch.setattr(exact_decoding, "_measured_affine", None)
    with torch.no_grad():
        torch.testing.assert_close(decode_exactly(network, z), network(z), rtol=0, atol=1e-11)


def test_a_large_offset_loses_no_digits(monkeypatch):
    """Variances far below the squared mean: sums of squares would cancel, in float32 all digits of them."""
    network = decoder(dtype=torch.float32)
    z = torch.randn(1, 4, *GRID)
    with torch.no_grad():
        network.conv_blocks[0].up.conv_trans.bias.fill_(1e3)
        expected = network(z)
    in_blocks(monkeypatch, (3, 3, 3))
    assert (decode_exactly(network, z) - expected).std() < 1e-2 * expected.std()


def test_memory_decides_the_blocks(monkeypatch):
    """Without a limit every stage runs whole; with less and less memory in smaller and smaller blocks."""
    network = decoder(dtype=torch.float32)
    z = torch.randn(1, 4, 24, 24, 16)
    voxels = []
    run_with = exact_decoding.Stage.run_with

    def record(stage, affines, x):
        voxels.append(x[0, 0].numel())
        return run_with(stage, affines, x)

    monkeypatch.setattr(exact_decoding.Stage, "run_with", record)
    with torch.no_grad():
        expected = network(z)
    largest = []
    for max_bytes in (None, 10**9, 150_000_000, 110_000_000):
        voxels.clear()
        torch.testing.assert_close(decode_exactly(network, z, max_bytes), expected, rtol=1e-4, atol=1e-4)
        largest.append(max(voxels, default=0))
    assert largest[:2] == [0, 0]
    assert largest[2] > largest[3] > 0


@pytest.mark.parametrize("max_bytes", [1000, 80_000_000])
def test_too_little_memory(monkeypatch, max_bytes):
    """Too little for the attention, or for the smallest blocks of a later stage: said before anything is computed."""
    network = decoder(dtype=torch.float32, n_hiddens=64)
    monkeypatch.setattr(network.conv_first, "forward", None)
    match = rf"latents of \(24, 24, 16\) needs 0\.\d+ GB even in the smallest blocks, {max_bytes / 1e9:.2g} GB are"
    with pytest.raises(ValueError, match=match):
        decode_exactly(network, torch.randn(1, 4, 24, 24, 16), max_bytes)


@pytest.mark.parametrize("grid", [(64, 64, 64), (64, 32, 32)])
def test_512_voxels_at_paper_size_fit_in_16_gb(grid):
    """What the plan counts; docs/performance.md has measured peaks beside counted ones."""
    network = patchvolumeAE(official_autoencoder()).decoder
    blocks = plan_blocks(network, (1, 8, *grid), 4, 16 * 10**9)
    assert blocks[0] == tuple(2**0 * extent for extent in grid)  # 128³ voxels at most: in one pass
    assert min(blocks[-1]) >= 64


@pytest.mark.parametrize("batch", [1, 2])
def test_no_tensor_of_a_block_is_too_large_for_32_bits(monkeypatch, batch):
    """However much memory there is: the tensors that convolutions see at 512³, counted without computing."""
    network = patchvolumeAE(official_autoencoder()).decoder.eval()
    sizes = []
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.register_forward_hook(lambda module, given, out: sizes.extend([given[0].numel(), out.numel()]))

    def any_statistics(norm, *_):
        return exact_decoding._affine(norm, torch.zeros(1, norm.num_channels), torch.ones(1, norm.num_channels))

    monkeypatch.setattr(exact_decoding, "_measured_affine", any_statistics)
    with FakeTensorMode(allow_non_fake_inputs=True):
        decode_exactly(network, torch.empty(batch, 8, 64, 64, 64))
    assert 2**29 < max(sizes) < 2**31


def test_the_model_decodes_within_a_limit(monkeypatch):
    """`decode` and `decode_sliding` hand the limit on; codes and raw latents are both taken."""
    torch.manual_seed(0)
    model = patchvolumeAE(tiny_autoencoder()).eval()
    model.codebook.embeddings.normal_()
    latent = torch.randn(1, 4, *GRID)
    codes = model.codebook(latent)["encodings"]
    with torch.no_grad():
        whole, tiles = model.decode(latent), model.decode_sliding(latent, quantize=True, patch_size=16)
    grids = in_blocks(monkeypatch, (3, 3, 3))
    with torch.no_grad():
        for found in (model.decode(latent, max_bytes=10**9), model.decode(codes, quantize=False, max_bytes=10**9)):
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
        assert len(grids) == 4
        found = model.decode_sliding(codes, patch_size=16, max_bytes=10**9)
    torch.testing.assert_close(found, tiles, rtol=1e-4, atol=1e-4)
    assert len(grids) == 4 + 2 * 4

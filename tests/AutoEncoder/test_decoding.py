"""From latents to volumes: whole, in tiles, in little memory, in other precisions."""

import json
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from generation_models import CUBE, WIDE, config, row, save_models, voxels
from torch import nn

from AutoEncoder import exact_decoding
from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.decoding import decode
from AutoEncoder.latents import denormalise_latents
from AutoEncoder.model.autoencoder import Autoencoder
from AutoEncoder.model.codebook import Codebook
from common import memory
from common.compilation import CompiledDenoiser
from common.errors import UserError
from common.memory import free_memory
from ddpm.BiFlowNet import BiFlowNet
from evaluation.generation import run as generation
from evaluation.generation.run import generate
from evaluation.metrics.seams import seam_index

HEAD = [row(1, "Head", WIDE)]  # 32 x 64 x 96 voxels (z, x, y)
LITTLE = 0.03  # GB: enough for the attention, too little for the last stages in one pass


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def autoencoder(models) -> Autoencoder:
    return load_autoencoder(models / "ae.ckpt")


@pytest.fixture
def latent() -> torch.Tensor:
    return torch.rand(4, *WIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def whole(autoencoder, latent) -> torch.Tensor:
    with torch.no_grad():
        return autoencoder.decode(denormalise_latents(latent[None], autoencoder.codebook.embeddings))[0].clamp(-1, 1)


# The three ways -----------------------------------------------------------------------------------------------------


def test_exact_is_one_pass(autoencoder, latent):
    found = decode(autoencoder, latent)
    assert (found.dtype, found.shape) == (torch.float32, (1, 32, 64, 96))
    torch.testing.assert_close(found, whole(autoencoder, latent), rtol=1e-5, atol=1e-5)


def test_tiles_are_the_official_ones(autoencoder, latent):
    raw = denormalise_latents(latent[None], autoencoder.codebook.embeddings)
    with torch.no_grad():
        expected = autoencoder.decode_sliding(raw, quantize=True, patch_size=16)[0].clamp(-1, 1)
    torch.testing.assert_close(decode(autoencoder, latent, "tiles", 16), expected, rtol=1e-5, atol=1e-5)
    assert (expected - whole(autoencoder, latent)).abs().mean() > 1e-3


def test_blended_tiles_lie_where_they_belong(autoencoder, latent, monkeypatch):
    """A decoder that only enlarges gives the enlarged latent, whatever the tiles; odd sizes too."""
    vectors = autoencoder.codebook.embeddings

    def enlarge(raw, quantize, max_bytes):
        big = raw[:, :1].repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
        return 2 * (big - vectors.min()) / (vectors.max() - vectors.min()) - 1

    monkeypatch.setattr(autoencoder, "decode", enlarge)
    for part in (latent, latent[:, :7, :11, :13]):
        expected = part[:1].repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
        torch.testing.assert_close(decode(autoencoder, part, "blended", 24), expected, rtol=1e-4, atol=1e-4)


def test_a_blended_tile_as_large_as_the_volume_is_one_pass(autoencoder, latent):
    found = decode(autoencoder, latent, "blended", 96)
    torch.testing.assert_close(found, whole(autoencoder, latent), rtol=1e-4, atol=1e-4)


def test_seams(models):
    """How differences at the borders of tiles compare with one pass: as there, less so, not at all.

    A decoder with random weights darkens the edges of its tiles, so that the index falls instead of rising.
    """
    autoencoder = load_autoencoder(models / "ae.ckpt")
    z = torch.linspace(-0.5, 0.5, 16)
    smooth = torch.stack([z[:, None, None] * w + z[None, :, None] - z * (1 - w) for w in (0.2, 0.4, 0.6, 0.8)])
    # Codes all along a line, so that quantising leaves a smooth latent smooth.
    autoencoder.codebook.embeddings.copy_(torch.linspace(-1, 1, 32)[:, None].expand(32, 4))
    one_pass = seam_index(whole(autoencoder, smooth), 32)
    exact, blended, tiles = (
        abs(seam_index(decode(autoencoder, smooth, method, 32, max_bytes), 32) / one_pass - 1)
        for method, max_bytes in (("exact", 30_000_000), ("blended", None), ("tiles", None))
    )
    assert exact < 1e-3
    assert tiles > 0.2
    assert blended < 0.75 * tiles


def test_an_overflow_is_not_clamped_away(autoencoder, latent, monkeypatch):
    monkeypatch.setattr(autoencoder, "decode", lambda raw, quantize, max_bytes: torch.full((1, 1, 8, 8, 8), torch.inf))
    assert decode(autoencoder, latent).isnan().all()


# Memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [{}, {"decoding": "blended"}, {"decoding": "tiles"}])
def test_max_memory_changes_no_image(models, tmp_path, monkeypatch, tiles):
    values = {**tiles, "max_single_pass": 1, "tile": 64}
    (plenty,) = generate(config(models, tmp_path / "a", HEAD, **values))
    calls = []
    run = exact_decoding._run_in_blocks
    monkeypatch.setattr(exact_decoding, "_run_in_blocks", lambda *args: calls.append(1) or run(*args))
    (little,) = generate(config(models, tmp_path / "b", HEAD, max_memory=LITTLE, **values))
    assert calls
    torch.testing.assert_close(voxels(little), voxels(plenty), rtol=0, atol=1e-4)


def test_too_little_memory_is_said_before_sampling(models, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "sample_latents", None)
    with pytest.raises(UserError, match=r"Head_64x96x32.nii.gz: decoding .* needs 0\.\d+ GB even .*raise max_memory"):
        generate(config(models, tmp_path / "out", HEAD, max_memory=0.001))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="raise max_memory"):
        decode(load_autoencoder(models / "ae.ckpt"), torch.zeros(4, *WIDE), max_bytes=1000)


def test_tiles_need_less_memory_than_the_whole(models, tmp_path):
    values = {"max_memory": 0.012, "max_single_pass": 1, "tile": 16}
    with pytest.raises(UserError, match="raise max_memory"):
        generate(config(models, tmp_path / "a", HEAD, **values))
    assert generate(config(models, tmp_path / "b", HEAD, decoding="blended", **values))


def test_free_memory_is_shared_and_heeds_the_container(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    alone = free_memory(cpu)
    assert 10**8 < alone < 10**13
    places = [(tmp_path, "memory.max", "memory.current"), (tmp_path / "missing", "memory.max", "memory.current")]
    monkeypatch.setattr(memory, "_control_groups", lambda: iter(places))
    (tmp_path / "memory.stat").write_text("anon 10\ninactive_file 300\nactive_file 200\n")
    (tmp_path / "memory.current").write_text("510\n")  # 500 of it cached files
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(cpu) == pytest.approx(alone, rel=0.2)
    (tmp_path / "memory.max").write_text("2010\n")
    assert free_memory(cpu) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(cpu) == 500


@pytest.mark.parametrize(
    ("line", "folders", "name"),
    [
        ("0::/a/b", ["a/b", "a", "."], "memory.max"),
        ("8:cpu,memory:/a", ["memory/a", "memory"], "memory.limit_in_bytes"),
        ("8:cpu:/a", [], ""),
    ],
)
def test_control_groups(tmp_path, monkeypatch, line, folders, name):
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(Path, "read_text", lambda path: line + "\n")
    assert [group[:2] for group in memory._control_groups()] == [(tmp_path / folder, name) for folder in folders]


# Speed --------------------------------------------------------------------------------------------------------------


def test_bf16_is_near_and_recorded_and_codes_stay_in_float32(models, tmp_path, monkeypatch):
    chest = [row(0, "Chest", CUBE)]
    (plain,) = generate(config(models, tmp_path / "a", chest))
    types = []
    nearest = Codebook.nearest
    monkeypatch.setattr(Codebook, "nearest", lambda self, x: types.append(x.dtype) or nearest(self, x))
    (half,) = generate(config(models, tmp_path / "b", chest, precision="bf16"))
    assert types == [torch.float32]
    difference = (voxels(plain) - voxels(half)).abs().mean()
    assert 1e-6 < difference < 0.3 * voxels(plain).std()
    assert json.loads(half.with_name("Chest_32x32x32.json").read_text())["precision"] == "bf16"
    with pytest.raises(UserError, match=r"other settings \(precision: precision was 'bf16', is '32'\)"):
        generate(config(models, tmp_path / "b", chest))


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_precision_reaches_the_denoiser(models, tmp_path, monkeypatch, precision):
    seen = []
    forward = BiFlowNet.forward

    def record(network, x, *conditions, **named):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return forward(network, x, *conditions, **named)

    monkeypatch.setattr(BiFlowNet, "forward", record)
    generate(config(models, tmp_path, [row(0, "Chest", CUBE)], precision=precision))
    assert set(seen) == {(torch.float32, precision == "bf16", torch.bfloat16)}


def test_bf16_decodes_near_float32(autoencoder, latent):
    plain, half = decode(autoencoder, latent), decode(autoencoder, latent, precision="bf16")
    assert half.dtype == torch.float32
    assert 1e-4 < (half - plain).abs().mean() < 0.1 * plain.std()


def test_half_precision_needs_a_gpu(models, tmp_path):
    with pytest.raises(UserError, match="precision is 16, which needs a GPU: take bf16 on a CPU"):
        generate(config(models, tmp_path, precision="16"))
    assert not list(tmp_path.iterdir())


def test_layout_changes_rounding_only(models, tmp_path):
    chest = [row(0, "Chest", CUBE)]
    (plain,) = generate(config(models, tmp_path / "a", chest))
    (fast,) = generate(config(models, tmp_path / "b", chest, channels_last=True))
    # Rounding may move a latent over the border between two codes, which changes a few voxels around it.
    assert ((voxels(plain) - voxels(fast)).abs() > 1e-4).float().mean() < 1e-3


class TinyDenoiser(nn.Module):
    """What may be called on several grids."""

    vq_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.scale * x) * res.sum() + (t - y).reshape(-1, 1, 1, 1, 1)


def biflownet() -> nn.Module:
    network = BiFlowNet(
        24, False, 2, (1,), channels=2, use_sparse_linear_attn=(0,), resnet_groups=4, DiT_num_heads=4, num_mid_DiT=0
    )
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.slow  # compiling takes a minute
@pytest.mark.parametrize(("build", "grids"), [(biflownet, [(8, 8, 16)]), (TinyDenoiser, [(8, 8, 8), (8, 8, 16)])])
def test_a_compiled_denoiser_gives_what_the_network_gives(build, grids):
    torch.manual_seed(0)
    network = build()
    compiled = CompiledDenoiser(network)
    assert compiled.vq_size == network.vq_size
    for grid in grids:
        x = torch.randn(1, 2, *grid)
        conditions = (torch.tensor([5]), torch.tensor([1]), torch.tensor(grid) / 64)
        with torch.no_grad():
            expected = type(network).forward(network, x, *conditions)
            torch.testing.assert_close(compiled(x, *conditions), expected, rtol=1e-4, atol=1e-4)


def test_compile_compiles_the_denoiser(models, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(generation, "CompiledDenoiser", lambda network: seen.append(network) or network)
    generate(config(models, tmp_path, [row(0, "Chest", CUBE)], compile=True))
    assert [type(network) for network in seen] == [BiFlowNet]


def test_channels_last_reaches_both_networks(models, tmp_path):
    for network in generation.load_models(config(models, tmp_path, channels_last=True), torch.device("cpu"))[:2]:
        weights = [value for value in network.parameters() if value.ndim == 5 and value.shape[1] > 1]
        assert weights
        assert all(value.is_contiguous(memory_format=torch.channels_last_3d) for value in weights)


@pytest.mark.slow  # as long as compiling
def test_no_compiler(models, tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/no/compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    with pytest.raises(UserError, match=r"compile: torch cannot compile on this machine \(.*\): leave --compile out"):
        generate(config(models, tmp_path / "out", [row(0, "Chest", [8, 8, 16])], compile=True))
    torch.compiler.reset()


# The seam index -----------------------------------------------------------------------------------------------------


def test_seam_index_by_hand():
    """A ramp of 1 a voxel along x with a step of 3 at each multiple of 4; elsewhere 1 (x) and 0 (y, z)."""
    steps = torch.tensor([3.0 if i % 4 == 0 else 1.0 for i in range(1, 8)])
    line = torch.cat([torch.zeros(1), steps.cumsum(0)])
    volume = line.expand(1, 8, 8, 8)
    across, elsewhere = 3 / 3, 6 / 18  # one border of 3 on one axis and of 0 on two; six steps of 1 of 18
    assert seam_index(volume, 4) == pytest.approx(across / elsewhere)
    assert seam_index(volume.movedim(-1, 1), 4) == pytest.approx(across / elsewhere)


@pytest.mark.parametrize("edge", [8, 16])
def test_seam_index_of_noise_is_one(edge):
    noise = torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(0))
    assert seam_index(noise, edge) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("volume", "edge", "message"),
    [
        (torch.zeros(8, 8, 8), 8, "larger than one"),
        (torch.zeros(8, 8), 4, r"got \(8, 8\)"),
        (torch.zeros(8, 8, 8), 4, "constant"),
        (torch.full((8, 8, 8), torch.nan), 4, "NaN"),
    ],
)
def test_volumes_without_a_seam_index(volume, edge, message):
    with pytest.raises(UserError, match=message):
        seam_index(volume, edge)

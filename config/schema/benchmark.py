"""Options of the parts of evaluation/benchmark.py."""

from dataclasses import dataclass

from config.schema.option import Rule, at_least, device_key, key, one_of

PARTS = ("data", "codebook", "autoencoder", "biflownet", "sample", "decode", "write", "scaling")
three = Rule(lambda value: len(value) == 3, "three whole numbers z x y")


def batch_key(default: int, meaning: str) -> int:
    return key(default, meaning, at_least(1), flag=True)


def grid_key(default: str) -> list[int] | None:
    return key(None, f"latent grid z x y; null = {default} at paper size", three, flag=True)


def compile_key() -> bool:
    return key(False, "also measure torch.compile, which takes minutes first", flag=True)


@dataclass
class BenchmarkConfig:
    """What all parts have."""

    part: str | None = key(None, "what is measured", one_of(*PARTS), flag="PART")
    size: str = key("paper", "paper | tiny: in seconds, shows that it runs", one_of("paper", "tiny"), flag=True)
    repetitions: int = key(5, "of which the median counts", at_least(1), flag=True)
    json: str | None = key(None, "file for the figures", flag=True)


@dataclass
class DataBenchmark(BenchmarkConfig):
    items: str = key("patches", "what is loaded: patches | latents", one_of("patches", "latents"), flag=True)
    num_workers: int = key(2, "processes, or threads, that load", at_least(1), flag=True)
    folder: str | None = key(None, "where the files lie or are made; null = a temporary folder", flag=True)


@dataclass
class CodebookBenchmark(BenchmarkConfig):
    device: str = device_key()


@dataclass
class AutoencoderBenchmark(BenchmarkConfig):
    batch_size: int = batch_key(1, "patches of a step")
    no_perceptual: bool = key(False, "leaves the perceptual network out of all ways", flag=True)
    compile: bool = compile_key()
    device: str = device_key()


@dataclass
class BiFlowNetBenchmark(BenchmarkConfig):
    grid: list[int] | None = grid_key("16 16 16")
    batch_size: int = batch_key(1, "latents of a step")
    compile: bool = compile_key()
    device: str = device_key()


@dataclass
class SampleBenchmark(BenchmarkConfig):
    grid: list[int] | None = grid_key("32 32 32")
    batch_size: int = batch_key(4, "latents of the batched way")
    compile: bool = compile_key()
    device: str = device_key()


@dataclass
class DecodeBenchmark(BenchmarkConfig):
    grid: list[int] | None = grid_key("16 16 16")
    max_memory: float | None = key(None, "GB of the way with little memory; null = 1 at paper size", flag=True)
    tile: int | None = key(None, "edge of a tile in voxels; null = half the volume", flag=True)
    AE_ckpt: str | None = key(None, "a trained autoencoder; needs latents", flag=True)
    latents: str | None = key(None, "folder of its latents, of which the first is decoded", flag=True)
    device: str = device_key()


@dataclass
class WriteBenchmark(BenchmarkConfig):
    folder: str | None = key(None, "where files are written; null = a temporary folder", flag=True)


@dataclass
class ScalingBenchmark(BenchmarkConfig):
    loop: str = key("biflownet", "biflownet | autoencoder", one_of("biflownet", "autoencoder"), flag=True)
    config: str | None = key(None, "of the training script; null = the demo's, small networks", flag=True)
    processes: int = key(2, "processes beside one", at_least(2), flag=True)
    device: str = device_key()


SCHEMAS = dict(
    zip(
        PARTS,
        (
            DataBenchmark,
            CodebookBenchmark,
            AutoencoderBenchmark,
            BiFlowNetBenchmark,
            SampleBenchmark,
            DecodeBenchmark,
            WriteBenchmark,
            ScalingBenchmark,
        ),
        strict=True,
    )
)

"""Options of the parts of evaluation/benchmark.py."""

from dataclasses import dataclass

from config.schema.option import device_flag, flag, key
from config.schema.rules import Rule, at_least, batch, between, one_of, positive, positive_triple, workers

PARTS = tuple("hardware data codebook convolution autoencoder biflownet sample decode generate write scaling".split())
three = positive_triple("three whole numbers from 1 to 4,096, z x y", 4096)


def grid_key(default: str) -> list[int] | None:
    return flag(None, f"latent grid z x y; null = {default} at paper size", three)


def compile_key() -> bool:
    return flag(False, "also measure torch.compile, which takes minutes first")


def ways_key() -> str | None:
    return flag(None, "ways to measure, with commas between, the first as the baseline; null = all without compile")


@dataclass
class BenchmarkConfig:
    """What all parts have."""

    part: str | None = key(None, "what is measured", one_of(*PARTS), flag="PART")
    size: str = flag("paper", "paper | tiny: in seconds, shows that it runs", one_of("paper", "tiny"))
    repetitions: int = flag(5, "of which the median counts", between(1, 10_000))
    json: str | None = flag(None, "file for the figures")


@dataclass
class HardwareBenchmark(BenchmarkConfig):
    device: str = device_flag()


@dataclass
class DataBenchmark(BenchmarkConfig):
    items: str = flag("patches", "what is loaded: patches | latents", one_of("patches", "latents"))
    num_workers: int = flag(2, "processes, or threads, that load", at_least(1), workers)
    folder: str | None = flag(None, "where the files lie or are made; null = a temporary folder")


@dataclass
class CodebookBenchmark(BenchmarkConfig):
    ways: str | None = ways_key()
    device: str = device_flag()


@dataclass
class ConvolutionBenchmark(BenchmarkConfig):
    """Always on a CPU."""


@dataclass
class AutoencoderBenchmark(BenchmarkConfig):
    batch_size: int = flag(1, "patches of a step", batch)
    no_perceptual: bool = flag(False, "leaves the perceptual network out of all ways")
    ways: str | None = ways_key()
    compile: bool = compile_key()
    device: str = device_flag()


@dataclass
class BiFlowNetBenchmark(BenchmarkConfig):
    grid: list[int] | None = grid_key("16 16 16")
    batch_size: int = flag(1, "latents of a step", batch)
    ways: str | None = ways_key()
    compile: bool = compile_key()
    device: str = device_flag()


@dataclass
class SampleBenchmark(BenchmarkConfig):
    grid: list[int] | None = grid_key("32 32 32")
    batch_size: int = flag(4, "latents of the batched way", batch)
    steps: int = flag(2, "denoising steps of a sampling", between(1, 100_000))
    ways: str | None = ways_key()
    compile: bool = compile_key()
    device: str = device_flag()


@dataclass
class DecodeBenchmark(BenchmarkConfig):
    grid: list[int] | None = grid_key("16 16 16")
    max_memory: float | None = flag(None, "GB of the way with little memory; null = 1 at paper size")
    tile: int | None = flag(None, "edge of a tile in voxels; null = half the volume")
    ways: str | None = ways_key()
    AE_ckpt: str | None = flag(None, "a trained autoencoder; needs latents")
    latents: str | None = flag(None, "folder of its latents, of which the first is decoded")
    device: str = device_flag()


@dataclass
class GenerateBenchmark(BenchmarkConfig):
    grid: list[int] | None = grid_key("64 64 64")
    steps: int = flag(20, "denoising steps", between(1, 100_000))
    max_memory: float | None = flag(None, "GB for decoding; null = 16 at paper size")
    ways: str | None = ways_key()
    compile: bool = compile_key()
    folder: str | None = flag(None, "where files are written; null = a temporary folder")
    device: str = device_flag()


@dataclass
class WriteBenchmark(BenchmarkConfig):
    folder: str | None = flag(None, "where files are written; null = a temporary folder")


@dataclass
class ScalingBenchmark(BenchmarkConfig):
    loop: str = flag("biflownet", "biflownet | autoencoder", one_of("biflownet", "autoencoder"))
    config: str | None = flag(None, "of the training script; null = the demo's, small networks")
    processes: int = flag(2, "processes beside one", between(2, 1024))
    device: str = device_flag()


GPU_STEPS = (
    *("hardware", "tests", "training", "training-compiled", "codebook", "pair", "sampling", "decode", "generate"),
    *("pair-compiled", "write", "data", "scaling"),
)


@dataclass
class GpuCheckConfig:
    """evaluation/gpu_check.py"""

    only: list[str] = flag(
        [],
        f"steps, in place of all: {' '.join(GPU_STEPS)}",
        Rule(lambda value: set(value) <= set(GPU_STEPS), f"some of {' '.join(GPU_STEPS)}"),
    )
    minutes: float = flag(8.0, "for all steps together; what does not fit in is left out", positive)
    json: str | None = flag(None, "file for the figures; null = gpu_check_DEVICE.json")
    size: str = flag("paper", "paper | tiny: in a minute, shows that it runs", one_of("paper", "tiny"))
    device: str = flag("cuda", "cuda | cpu, for a rehearsal", one_of("cuda", "cpu"))


SCHEMAS = {
    "hardware": HardwareBenchmark,
    "data": DataBenchmark,
    "codebook": CodebookBenchmark,
    "convolution": ConvolutionBenchmark,
    "autoencoder": AutoencoderBenchmark,
    "biflownet": BiFlowNetBenchmark,
    "sample": SampleBenchmark,
    "decode": DecodeBenchmark,
    "generate": GenerateBenchmark,
    "write": WriteBenchmark,
    "scaling": ScalingBenchmark,
}

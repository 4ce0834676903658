"""The codebook: quantisation, moving averages, start from data and restarts, also over two processes."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from AutoEncoder.model import codebook as codebook_module
from AutoEncoder.model.codebook import Codebook


def two_codes(**options) -> Codebook:
    """Codes (0, 0) and (1, 1), already initialised."""
    codebook = Codebook(2, 2, no_random_restart=True, **options)
    codes = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    codebook.load_state_dict({"embeddings": codes, "z_avg": codes.clone(), "N": torch.ones(2)})
    return codebook


def test_one_training_step_by_hand():
    codebook = two_codes().train()
    # three vectors: two nearest to code 0, one nearest to code 1
    z = torch.tensor([[0.1, 0.3], [0.2, -0.1], [0.8, 1.0]]).t().reshape(1, 2, 3, 1, 1)
    out = codebook(z)
    assert out["encodings"].flatten().tolist() == [0, 0, 1]
    torch.testing.assert_close(out["embeddings"].flatten(2)[0].t(), torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
    expected = 0.25 * (0.1**2 + 0.3**2 + 0.2**2 + 0.1**2 + 0.2**2 + 0) / 6
    assert out["commitment_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert out["perplexity"].item() == pytest.approx(3 / 2 ** (2 / 3), rel=1e-5)  # exp(entropy of 2/3, 1/3)
    torch.testing.assert_close(codebook.N, torch.tensor([0.99 + 0.02, 0.99 + 0.01]))
    z_avg = torch.tensor([[0.003, 0.002], [0.998, 1.0]])
    torch.testing.assert_close(codebook.z_avg, z_avg)
    torch.testing.assert_close(codebook.embeddings, z_avg / codebook.N[:, None], rtol=1e-5, atol=1e-7)


def test_eval_mode_changes_nothing():
    codebook = two_codes().eval()
    before = copy.deepcopy(codebook.state_dict())
    codebook(torch.randn(1, 2, 4, 4, 4))
    for name, value in codebook.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_gradient_passes_straight_through():
    codebook = two_codes().eval()
    z = torch.randn(1, 2, 3, 3, 3, requires_grad=True)
    weight = torch.randn_like(z)
    (codebook(z)["embeddings"] * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)


def test_starts_from_the_first_training_batch_and_never_again():
    torch.manual_seed(0)
    codebook = Codebook(8, 3, no_random_restart=True).train()
    assert not codebook.initialised
    z = torch.randn(1, 3, 4, 4, 4) + 5
    codebook(z)
    vectors = z.flatten(2)[0].t()
    assert codebook.initialised
    # after one moving-average step every code is still close to some encoder output
    assert torch.cdist(codebook.embeddings, vectors).min(dim=1).values.max() < 1.0

    resumed = Codebook(8, 3, no_random_restart=True).train()
    resumed.load_state_dict(codebook.state_dict())
    far = torch.randn(1, 3, 4, 4, 4) - 50
    resumed(far)
    unused = resumed.N < 1
    assert unused.any()
    torch.testing.assert_close(resumed.embeddings[unused].mean(), torch.tensor(5.0), rtol=0.3, atol=0)


def test_loading_into_a_used_codebook_reads_its_state_anew():
    used = two_codes()
    assert used.initialised
    used.load_state_dict(Codebook(2, 2).state_dict())
    assert not used.initialised


def test_restart_takes_encoder_outputs_for_unused_codes():
    torch.manual_seed(0)
    codebook = Codebook(4, 2, restart_thres=1.0).train()
    far = torch.tensor([[0.0, 0.0], [90.0, 90.0], [91.0, 91.0], [92.0, 92.0]])
    codebook.load_state_dict({"embeddings": far, "z_avg": far * 2, "N": torch.tensor([2.0, 1.001, 0.5, 0.2])})
    z = 0.1 * torch.randn(1, 2, 3, 3, 3)
    codebook(z)
    vectors = z.flatten(2)[0].t()
    distances = torch.cdist(codebook.embeddings, vectors).min(dim=1).values
    assert (distances[1:] < 1e-6).all()  # N of all three fell below 1
    assert distances[0] > 1e-6


def test_fewer_vectors_than_codes_are_repeated_with_noise():
    torch.manual_seed(0)
    codebook = Codebook(64, 4, no_random_restart=True)
    vectors = torch.randn(5, 4)
    start = codebook._random_vectors(vectors)
    assert start.shape == (64, 4)
    assert len(torch.unique(start, dim=0)) == 64
    nearest = torch.cdist(start, vectors).min(dim=1).values
    assert 0 < nearest.max() < 0.05  # noise of std 0.01/sqrt(4)


@pytest.mark.parametrize("chunk", [1, 7, 10**9])
def test_chunks_give_the_same_codes(monkeypatch, chunk):
    torch.manual_seed(0)
    codebook = Codebook(16, 3)
    vectors = torch.randn(50, 3)
    expected = torch.cdist(vectors, codebook.embeddings).argmin(dim=1)
    monkeypatch.setitem(codebook_module.CHUNK_ELEMENTS, "cpu", chunk * 16)
    torch.testing.assert_close(codebook.nearest(vectors), expected)


def test_other_channel_count_is_refused():
    with pytest.raises(ValueError, match=r"quantises \(B, 4, D, H, W\), got \(1, 8, 2, 2, 2\)"):
        Codebook(16, 4)(torch.zeros(1, 8, 2, 2, 2))


def test_half_precision_input_is_quantised_in_float32():
    codebook = two_codes().eval()
    out = codebook(torch.full((1, 2, 1, 1, 1), 0.9, dtype=torch.bfloat16))
    assert out["embeddings"].dtype == torch.bfloat16
    assert out["commitment_loss"].dtype == torch.float32


def test_memory_does_not_grow_with_tokens_times_codes():
    # 65,536 tokens x 8,192 codes: one one-hot matrix alone would be 2 GiB in float32
    script = (
        "import resource, torch; from AutoEncoder.model.codebook import Codebook; torch.set_num_threads(1)\n"
        "codebook = Codebook(8192, 8).train(); z = torch.randn(1, 8, 16, 64, 64)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "codebook(z); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 512 * 1024  # KiB


def test_two_processes_update_as_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist; from AutoEncoder.model.codebook import Codebook\n"
        "dist.init_process_group('gloo'); rank = dist.get_rank(); torch.manual_seed(rank)\n"
        "codebook = Codebook(8, 3, restart_thres=3.0).train()\n"
        "z = torch.load(sys.argv[1])\n"
        "for batch in z: codebook(batch[rank : rank + 1])\n"
        "torch.save(codebook.state_dict(), f'{sys.argv[1]}.{rank}'); dist.destroy_process_group()\n"
    )
    z = torch.randn(3, 2, 3, 4, 4, 4)
    torch.save(z, tmp_path / "z.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, str(script), str(tmp_path / "z.pt")],
        check=True,
        capture_output=True,
        env=_environment(),
        timeout=120,
    )
    first, second = (torch.load(tmp_path / f"z.pt.{rank}") for rank in (0, 1))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)  # restarts too are the same on all ranks
    assert first["N"].sum().item() == pytest.approx(8 * 0.99**3 + 0.01 * 128 * (1 + 0.99 + 0.99**2), rel=1e-5)


def _environment() -> dict[str, str]:

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def test_recent_counts_add_up_in_training_and_are_in_no_checkpoint():
    codebook, z = Codebook(8, 4), torch.randn(2, 4, 2, 2, 2)
    found = torch.zeros(8)
    for _ in range(3):
        found += torch.bincount(codebook(z)["encodings"].flatten(), minlength=8)
    codebook.eval()(z)
    assert codebook.recent_counts.tolist() == found.tolist()
    assert found.sum() == 3 * 16
    assert "recent_counts" not in codebook.state_dict()

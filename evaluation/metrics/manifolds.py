"""Which volumes of two sets lie within the other set's manifold. A pure function, computed in float64."""

from math import inf

import torch
from torch import Tensor

from common.errors import UserError
from evaluation.metrics.distances import check_sets, squared_distance_rows

TIE = 1 + 1e-9  # of a squared distance: a vector on the border of a ball is inside, whatever rounding says


def precision_recall_density_coverage(
    real: Tensor, generated: Tensor, k: int = 5, subjects: tuple[Tensor | None, Tensor | None] = (None, None)
) -> dict[str, Tensor]:
    """Precision, recall, density and coverage, one value per volume; the metrics are their means.

    A set's manifold is the union of balls around its vectors, each as large as the distance to the k-th nearest
    other vector of the set. Borders belong to the balls.

    * precision (M,): 1 where the generated volume is in some real ball; recall (N,): 1 where the real volume is in
      some generated ball. Kynkäänniemi et al., "Improved Precision and Recall Metric", NeurIPS 2019, equation 2.
    * density (M,): how many real balls the generated volume is in, over k: can exceed 1; coverage (N,): 1 where the
      real volume's ball holds some generated volume. Naeem et al., "Reliable Fidelity and Diversity Metrics",
      ICML 2020, equations 3 and 4.

    real: (N, F), generated: (M, F) features. k: neighbours; the papers take 3 and 5.
    subjects: of the real (N,) and the generated vectors (M,); None: each of another one. A neighbour is a vector of
        another subject: balls that end at a scan of the same one would be too small for anybody else's.
    Raises UserError for other shapes, a vector with fewer than k others, values that are not finite, or k below 1.
    """
    if k < 1:
        raise UserError(f"a manifold needs at least 1 neighbour, got k = {k}")
    real, generated = check_sets(real, generated, minimum=k + 1)
    radii = (_squared_radii(vectors, k, of) for vectors, of in zip((real, generated), subjects, strict=True))
    real_radii, generated_radii = radii  # (N,), (M,)

    precision, density = (real.new_zeros(len(generated)) for _ in range(2))
    recall, coverage = (real.new_zeros(len(real), dtype=torch.bool) for _ in range(2))
    for rows, squared in squared_distance_rows(generated, real):
        in_real_ball = squared <= real_radii  # (rows, N)
        precision[rows] = in_real_ball.any(1).double()
        density[rows] = in_real_ball.sum(1).double() / k
        coverage |= in_real_ball.any(0)
        recall |= (squared <= generated_radii[rows, None]).any(0)
    return {"precision": precision, "recall": recall.double(), "density": density, "coverage": coverage.double()}


def _squared_radii(vectors: Tensor, k: int, subjects: Tensor | None) -> Tensor:
    """(N, F) -> (N,) squared distance of each vector to its k-th nearest other one."""
    if subjects is None:
        subjects = torch.arange(len(vectors))
    most = int(subjects.unique(return_counts=True)[1].max())
    if len(vectors) - most < k:
        raise UserError(f"{k} neighbours need as many vectors of other subjects, got {len(vectors) - most}")
    radii = []
    for rows, squared in squared_distance_rows(vectors, vectors):
        squared[subjects[rows, None] == subjects] = inf
        radii.append(squared.kthvalue(k, dim=1).values)
    return TIE * torch.cat(radii)

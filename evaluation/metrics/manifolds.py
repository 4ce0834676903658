"""Which volumes of two sets lie within the other set's manifold. A pure function, computed in float64."""

import torch
from torch import Tensor

from common.errors import UserError
from evaluation.metrics.distances import check_sets, squared_distance_rows

TIE = 1 + 1e-9  # of a squared distance: a vector on the border of a ball is inside, whatever rounding says


def precision_recall_density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> dict[str, Tensor]:
    """Precision, recall, density and coverage, one value per volume; the metrics are their means.

    A set's manifold is the union of balls around its vectors, each as large as the distance to the k-th nearest
    other vector of the set. Borders belong to the balls.

    * precision (M,): 1 where the generated volume is in some real ball; recall (N,): 1 where the real volume is in
      some generated ball. Kynkäänniemi et al., "Improved Precision and Recall Metric", NeurIPS 2019, equation 2.
    * density (M,): how many real balls the generated volume is in, over k: can exceed 1; coverage (N,): 1 where the
      real volume's ball holds some generated volume. Naeem et al., "Reliable Fidelity and Diversity Metrics",
      ICML 2020, equations 3 and 4.

    real: (N, F), generated: (M, F) features. k: neighbours; the papers take 3 and 5.
    Raises UserError for other shapes, a set with fewer than k + 1 vectors, values that are not finite, or k below 1.
    """
    if k < 1:
        raise UserError(f"a manifold needs at least 1 neighbour, got k = {k}")
    real, generated = check_sets(real, generated, minimum=k + 1)
    real_radii, generated_radii = _squared_radii(real, k), _squared_radii(generated, k)  # (N,), (M,)

    precision, density = (real.new_zeros(len(generated)) for _ in range(2))
    recall, coverage = (real.new_zeros(len(real), dtype=torch.bool) for _ in range(2))
    for rows, squared in squared_distance_rows(generated, real):
        in_real_ball = squared <= real_radii  # (rows, N)
        precision[rows] = in_real_ball.any(1).double()
        density[rows] = in_real_ball.sum(1).double() / k
        coverage |= in_real_ball.any(0)
        recall |= (squared <= generated_radii[rows, None]).any(0)
    return {"precision": precision, "recall": recall.double(), "density": density, "coverage": coverage.double()}


def _squared_radii(vectors: Tensor, k: int) -> Tensor:
    """(N, F) -> (N,) squared distance of each vector to its k-th nearest other one."""
    rows = squared_distance_rows(vectors, vectors)
    # The nearest of all is the vector itself, at the distance 0.
    return TIE * torch.cat([squared.kthvalue(k + 1, dim=1).values for _, squared in rows])

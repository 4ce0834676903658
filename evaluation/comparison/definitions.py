"""What each metric of generated volumes is here, in the words that stand in the results."""

DEFINITIONS = {
    "FID-3D": "Fréchet distance of Gaussians fitted to features of whole volumes (Heusel et al. 2017), covariances "
    "over N - 1, float64; HA-GAN's protocol with medicalnet_resnet50 (global average pool, 2048 features, volumes in "
    "[-1, 1])",
    "FID-2.5D": "the same on slices of the axial, coronal and sagittal planes, all slices of a set together; the mean "
    "of the three planes, and each plane (MAISI's protocol with radimagenet_resnet50)",
    "MMD": "squared maximum mean discrepancy, unbiased, on features of whole volumes; Gaussian kernel, its bandwidth "
    "the median distance between two real volumes, so that values against the same real set can be compared; pairs of "
    "one subject are left out, as a volume with itself is",
    "precision": "share of generated volumes within the k-nearest-neighbour balls of real ones (Kynkäänniemi et al. "
    "2019); a neighbour is of another subject, here and in the next three",
    "recall": "share of real volumes within the k-nearest-neighbour balls of generated ones (Kynkäänniemi et al. 2019)",
    "density": "mean number of real volumes' balls that a generated volume lies in, over k (Naeem et al. 2020); about "
    "1 for real volumes, less for noise, more where generated ones crowd in the middle of the real ones",
    "coverage": "share of real volumes with a generated one in their ball (Naeem et al. 2020)",
    "MS-SSIM of generated pairs": "mean 3D MS-SSIM of random pairs, data range 2; compare with real pairs: a "
    "collapsed generator has a higher one",
    "MS-SSIM of real pairs": "the same for as many pairs of real volumes, each of two subjects",
    "diversity gap": "MS-SSIM of generated pairs minus that of real pairs; 0: as varied as real volumes; above "
    "0: less variety, a collapsed generator; below 0: less alike than real volumes are, as noise is",
    "nearer than held-out": "probability that a generated volume lies nearer to its nearest training volume than a "
    "real one that was not trained on lies to its own; 0.5 without memorisation, 1 for a copied training set",
    "nearest distance ratio": "median distance of generated volumes to their nearest training volume over that of "
    "real ones that were not trained on; 0 for a copied training set",
    "interval": "95 %, by subjects: one that is drawn brings all of its volumes. Of distances, precision, recall, "
    "density and coverage by resamples of 80 % of the subjects without replacement, their spread scaled to all of them "
    "(m out of n bootstrap; within each class); of pairs and nearest distances by bootstrap over subjects, or over "
    "pairs that share none. Percentiles are shifted to lie around the value: the spread at this N, no correction of a "
    "bias, and within the figure's bounds. Distances near the floor: wider than due. Of shares that are 0 or 1 in all "
    "resamples the exact one (Clopper and Pearson). None (n too small) of fewer than 3 subjects or pairs",
    "floor": "real against real: mean over random halvings of the real subjects, one volume of each; beside it the "
    "same figure of as many generated volumes against such a half, since distances fall with N",
    "subjects": "of real volumes as subject_pattern or the split of the data set tells them, else each volume is one; "
    "each generated volume is one. Every value is that of all volumes",
}

"""Training and validation data of the Patch-Volume autoencoder at compression 4x."""

from dataset.vqgan import CropRule, VQGANDataset


class VQGANDataset_4x(VQGANDataset):
    """As `VQGANDataset`; whole volumes are cropped to 256 x 256 x 128 voxels (x, y, z) instead."""

    train_crop = CropRule(256 * 256 * 128, (128, 256, 256))
    val_crop = CropRule(256 * 256 * 128, (128, 256, 256))

from common.public_names import export

export(__name__, dict.fromkeys(["BiFlowNet", "GaussianDiffusion", "PatchEmbed_Voxel"], "BiFlowNet"))

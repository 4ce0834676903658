from common.public_names import export

export(
    __name__,
    {
        "patchvolumeAE": "PatchVolume",
        "AE_finetuning": "PatchVolume",
        "Codebook": "codebook",
        "MedicalNetPerceptual": "MedicalNetPerceptual",
    },
)

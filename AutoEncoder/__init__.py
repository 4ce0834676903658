from common.public_names import export

export(
    __name__,
    {
        "patchvolumeAE": "model.PatchVolume",
        "AE_finetuning": "model.PatchVolume",
        "Codebook": "model.codebook",
        "MedicalNetPerceptual": "model.MedicalNetPerceptual",
    },
)

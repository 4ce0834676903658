from common.public_names import export

export(
    __name__,
    {
        "VQGANDataset": "vqgan",
        "VQGANDataset_4x": "vqgan_4x",
        "Singleres_dataset": "Singleres_dataset",
        "Multires_dataset": "Multires_dataset",
        "GenerateTrData_dataset": "tr_generate",
    },
)

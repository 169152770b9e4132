"""What is computed: tensors and bytes in, tensors and bytes out. No Ray, Zarr, MLflow, WebDataset, and no paths."""

"""The mathematics of the papers: kernels, sparsification, allocation; torch only, no files."""

"""Data on its way to a run: raw files or formulas -> prepared data set -> batches.

`folder` reads the community's VTAB-1k layout, `quick` renders the quick suite, `prepared` stores
and opens prepared data sets, `transforms` turns their pixels into batches. This file imports
nothing, so that listing data sets does not cost the import of torch.
"""

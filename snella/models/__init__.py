"""Backbones: the table of families, pre-trained weights, and which parameters train."""

"""SNELLA: kernelized sparse fine-tuning, and a reproducibility benchmark for vision PEFT."""

__version__ = "0.1.0"

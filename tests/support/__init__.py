"""Helpers that several test rooms share: comparisons, models, a stub of the CUDA driver, an emulator of its threads."""

"""Hugging Face models with our heads: finding, loading, LoRA, log-probs, saving.

Backbones and configs are `transformers`' own; what is written here any of its readers can load.
"""

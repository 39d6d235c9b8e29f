"""Evaluation: statistics, preference pairs, policies against each other, capability.

Reads finished models and run directories, never a live trainer.
"""

"""Weighting methods, one file each or per small family. They import the contract of ``statistics`` and nothing else."""

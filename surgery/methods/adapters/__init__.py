"""Merging adapters into one."""

"""Fewer experts from a mixture: grouping and merging."""

"""Fewer experts from a mixture: keep some of them as they are and drop the others."""

"""Tensors in, tensors out: the numerical pieces that methods share."""

"""Convolutions with block-sparse weights."""

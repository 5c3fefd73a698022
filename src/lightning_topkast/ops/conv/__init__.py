"""Convolutions with unstructured sparse weights."""

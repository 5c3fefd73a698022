"""Products of unstructured sparse matrices."""

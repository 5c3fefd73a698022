"""Products with unstructured sparse matrices on CPU."""

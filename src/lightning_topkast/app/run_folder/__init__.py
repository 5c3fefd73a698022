"""Read and write what a run leaves in its folder."""

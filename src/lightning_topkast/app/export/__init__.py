"""Export the weights or the network of a trained run."""

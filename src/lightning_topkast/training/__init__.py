"""What surrounds a Trainer: averages, gradient reduction and checkpoints."""

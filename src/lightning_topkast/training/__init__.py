"""Extensions of the Trainer: weight averages, gradient reduction and checkpoints."""

"""The method: which entries, how many, and when."""

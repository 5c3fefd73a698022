"""Top-k choices beyond Top-KAST's: each a function of tensors for a problem of its own."""

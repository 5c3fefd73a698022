"""The engine, which keeps the weights of a model sparse while an optimizer trains them."""

"""The target tasks: what a pretrained encoder is worth downstream."""

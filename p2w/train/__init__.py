"""The train loop: DDP, AMP, optimizer, checkpoint, log. It knows no method by name."""

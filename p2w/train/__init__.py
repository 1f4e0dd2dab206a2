"""The train loop: DDP, AMP, optimizer, checkpoint, log. It does not depend on which pretext it trains."""

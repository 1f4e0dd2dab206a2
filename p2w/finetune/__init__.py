"""Fine-tuning of a pretrained encoder on a target task, in trials."""

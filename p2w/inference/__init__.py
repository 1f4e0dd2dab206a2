"""Predictions of fine-tuned networks on whole scans."""

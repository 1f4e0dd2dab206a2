"""Target tasks: what a pretrained encoder is fine-tuned for. `dataset` reads what preprocess/prepare_target.py wrote."""

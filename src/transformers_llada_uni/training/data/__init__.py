"""Datasets to rows of token ids: formats of the field, messages, images as codes. No losses, no trainers."""

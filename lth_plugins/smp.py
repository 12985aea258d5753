"""Ticket backbones for segmentation_models_pytorch."""

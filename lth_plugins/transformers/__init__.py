"""Ticket backbones for Hugging Face transformers."""

"""Ticket backbones for torchvision."""

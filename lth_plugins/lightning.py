"""Ticket backbones for Lightning."""

"""Damages files at random and holds every command to one sentence."""

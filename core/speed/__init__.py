"""Measures how fast a recipe's work is on this machine."""

"""Numerics of the model's packages: properties and exact values, each named after the pitfall it guards."""

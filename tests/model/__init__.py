"""Numerics of the model rooms: properties and exact values, each named after the assertion or pitfall it guards."""

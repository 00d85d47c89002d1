"""Tests of the repository itself: README, documents, packaging, import contracts, shipped recipes, CI."""

"""The tests of finding plugins and of what they offer."""

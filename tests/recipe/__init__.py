"""The tests of reading recipes: mistakes, layers, schedules, plans."""

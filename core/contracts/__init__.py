"""The extension points: one file for each slot, its abstract class and the data that crosses it.

This package imports nothing when it is imported, so that the command line can read schemas, errors
and schedules without paying for torch. Import the file that you need.
"""

"""The extension points: one file for each slot, its abstract class and the data that crosses it.

This package imports nothing when it is imported, so that the command line can read schemas, errors
and schedules without paying for torch. Import the file that you need.
"""

VERSION = "2.0"
"""Version of the contracts, major.minor: a plugin built for the same major and no later minor works.

A new slot, a new method with a default or a new optional field raises the minor; whatever can break a plugin
that kept the contract raises the major. A plugin states the version it was built for as `CONTRACTS`.
docs/migration.md says what the author of a plugin for another major changes.
"""

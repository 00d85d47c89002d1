"""The conformance kit: does a plugin keep the contracts of the slots it fills?"""

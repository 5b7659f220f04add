"""Measures of real videos, and intervals of paired differences."""

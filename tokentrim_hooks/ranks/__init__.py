"""Ranks of one model that communicates agree before any of them calls it again."""

"""Schemas of recipes and stage cards, YAML with line numbers, merging and messages for people."""

"""Neighbors and their weights."""

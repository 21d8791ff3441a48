"""Graphs of whole data sets."""

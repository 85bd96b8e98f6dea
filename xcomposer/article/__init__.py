"""Illustrated articles: the steps of writing one, and its files."""

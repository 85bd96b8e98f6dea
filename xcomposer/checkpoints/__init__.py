"""Folders of weights: adopt, inspect, merge, export, quantise, and tiny ones for tests."""

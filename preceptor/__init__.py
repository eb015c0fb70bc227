"""Turns unlabelled clinical cases into a small open model that names diseases and shows the evidence."""

__version__ = "0.1.0"

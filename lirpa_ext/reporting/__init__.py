"""Shared by everything that reports: tables, figures with alt texts, and the safe writing of files."""

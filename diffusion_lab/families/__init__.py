"""Families of models, a folder each: how one is built, opened, drawn from and trained."""
